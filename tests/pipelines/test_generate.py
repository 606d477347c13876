"""olavlm-generate: one image, a folder, a dialogue; greedy, sampled, streamed."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image

from olavlm.pipelines import generate
from olavlm.student.conversation import encode_prompt, load_tokenizer
from olavlm.student.dialogue import Dialogue
from olavlm.student.model import OlaVLM
from olavlm.student.tokens import TaskSpec


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A whole model of random weights, whose projector makes much of the picture."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tasks = [TaskSpec("depth", tokens=16, dim=24)]
    model = OlaVLM.build(tiny["llm"], tiny["encoder"], load_tokenizer(tiny["llm"]), tasks)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(10)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model = OlaVLM.from_pretrained(checkpoint)
    return model.eval(), model.tokenizer


def run(capsys, *words):
    assert generate.main([*map(str, words), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_an_answer_is_streamed_and_the_models_own(checkpoint, loaded, sample_images, capsys, monkeypatch):
    model, tokenizer = loaded
    pieces = []
    monkeypatch.setattr(
        generate.TextStreamer, "on_finalized_text", lambda s, text, stream_end=False: pieces.append(text)
    )
    words = ["--prompt", "What is this?", "--max-new-tokens", "12"]
    run(capsys, checkpoint, "--image", sample_images / "cat.jpg", *words)
    picture = generate.open_image(sample_images / "cat.jpg")
    assert "".join(pieces).strip() == model.answer(tokenizer, picture, "What is this?", max_new_tokens=12)
    assert len(pieces) >= 12  # a piece a token, and the end


def test_text_alone_and_the_image_matters(checkpoint, sample_images, capsys):
    words = ["--prompt", "What is this?", "--max-new-tokens", "12"]
    answers = {
        run(capsys, checkpoint, *image, *words)
        for image in ([], ["--image", sample_images / "cat.jpg"], ["--image", sample_images / "rocket.jpg"])
    }
    assert len(answers) == 3


def test_sampling_follows_the_seed_and_greedy_does_not(checkpoint, capsys):
    words = [checkpoint, "--prompt", "Tell me a story.", "--max-new-tokens", "8"]
    sampled = [run(capsys, *words, "--temperature", "1.5", "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = [run(capsys, *words, "--seed", seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1] != sampled[0]
    narrow = run(capsys, *words, "--temperature", "1.5", "--top-p", "1e-6", "--seed", 3)
    assert narrow == greedy[0], "the likeliest token alone is left"


def test_a_folder_gives_a_line_an_image(checkpoint, loaded, sample_images, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    shutil.copy(sample_images / "cat.jpg", photos / "b.jpg")
    shutil.copy(sample_images / "rocket.jpg", photos / "more" / "a.JPG")
    (photos / "notes.txt").write_text("no image")
    output = tmp_path / "answers.jsonl"
    words = ["--image", photos, "--prompt", "What?", "--max-new-tokens", "3", "--temperature", "1"]
    assert run(capsys, checkpoint, *words, "--output", output) == ""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["b.jpg", "more/a.JPG"]
    for line in lines:
        picture = generate.open_image(photos / line["image"])
        assert line["prompt"] == "What?"
        assert line["answer"] == Dialogue(*loaded, picture, max_new_tokens=3, temperature=1.0).ask("What?")

    (photos / "a.png").write_bytes(b"not a picture")
    assert generate.main([str(checkpoint), *map(str, words), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    broken, *rest = [json.loads(line) for line in out.splitlines()]
    assert broken["image"] == "a.png"
    assert "answer" not in broken
    assert broken["error"]
    assert rest == lines
    assert "1 of 3 images in" in err


def test_a_dialogue_remembers_what_was_said(loaded):
    model, tokenizer = loaded
    picture = Image.new("RGB", (40, 30), "red")
    dialogue = Dialogue(model, tokenizer, picture, max_new_tokens=5)
    first = dialogue.ask("What is this? <image>")
    second = dialogue.ask("And now?")
    assert dialogue.turns == [
        {"from": "human", "value": "<image>\nWhat is this? < image>"},
        {"from": "gpt", "value": first},
        {"from": "human", "value": "And now?"},
        {"from": "gpt", "value": second},
    ]
    assert second == model.reply(tokenizer, dialogue.turns[:3], picture, max_new_tokens=5)
    ids = encode_prompt(tokenizer, dialogue.turns[:3], model.config.template)
    assert ids.count(model.config.image_token_id) == 1


def test_a_dialogue_at_the_terminal(checkpoint, sample_images, capsys, monkeypatch, tmp_path):
    asked = []

    class Recorded(Dialogue):
        def ask(self, question, streamer=None):
            asked.append((question, len(self.turns), self.image is not None))
            return super().ask(question, streamer)

    monkeypatch.setattr(generate, "Dialogue", Recorded)
    (tmp_path / "broken.jpg").write_bytes(b"")
    pictures = [f"/image {folder / name}" for folder, name in (
        (sample_images, "cat.jpg"), (tmp_path, "none.jpg"), (tmp_path, "broken.jpg")
    )]  # fmt: skip
    typed = ["Hello", "", "Again", "/new", "Anew", pictures[0], "What?", "/help", *pictures[1:], "More?", "/quit", "No"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    out = run(capsys, checkpoint, "--max-new-tokens", "2")
    assert asked == [
        ("Hello", 0, False),
        ("Again", 2, False),
        ("Anew", 0, False),
        ("What?", 0, True),
        ("More?", 2, True),
    ]
    assert generate.DIALOGUE_HELP in out
    assert "none.jpg" in out
    assert "broken.jpg" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x", "--temperature", "-1"], "--temperature is -1.0: 0 for greedy answers, or above"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "--top-p is 0.0: above 0 and at most 1"),
        (["--prompt", "x", "--top-p", "0.9"], "--top-p is for sampling; add --temperature"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0: at least 1"),
        (["--image", "."], "is a folder; add the --prompt"),
        (["--prompt", "x", "--output", "out.jsonl"], "--output is for the answers about a folder"),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(words, message, capsys):
    assert generate.main(["runs/none", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_empty_folder_is_a_failed_job(checkpoint, tmp_path, capsys):
    assert generate.main([str(checkpoint), "--image", str(tmp_path), "--prompt", "x", "--device", "cpu"]) == 1
    assert "no image in this folder" in capsys.readouterr().err
