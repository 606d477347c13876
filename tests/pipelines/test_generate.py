"""olavlm-generate: one image, a folder, a dialogue; greedy, sampled, streamed."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import TextStreamer

from olavlm import student
from olavlm.cache import images
from olavlm.pipelines import generate
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.model import OlaVLM
from olavlm.student.text.conversation import encode_prompt, load_tokenizer
from olavlm.student.text.dialogue import Dialogue
from olavlm.student.tokens import TaskSpec
from olavlm.teachers import load_teacher
from olavlm.teachers.tiny import make_tiny


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
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda s, text, stream_end=False: pieces.append(text))
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


def test_weights_are_loaded_in_another_dtype_if_that_is_asked(checkpoint, sample_images, capsys, monkeypatch):
    loaded, load = [], student.load_checkpoint

    def keep(*asked):
        model, tokenizer = load(*asked)
        loaded.append(model)
        return model, tokenizer

    monkeypatch.setattr(student, "load_checkpoint", keep)
    words = ["--image", sample_images / "cat.jpg", "--prompt", "What?", "--max-new-tokens", "3"]
    assert run(capsys, checkpoint, *words) is not None
    assert run(capsys, checkpoint, *words, "--dtype", "bfloat16") is not None
    assert [model.llm.dtype for model in loaded] == [torch.float32, torch.bfloat16]


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
    record = json.loads((tmp_path / "answers.jsonl.run.json").read_text())
    assert record["arguments"]["checkpoint"] == str(checkpoint)
    assert record["versions"]["torch"]
    assert [line["image"] for line in lines] == ["b.jpg", "more/a.JPG"]
    assert len(lines) == 2
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


def test_an_image_that_may_not_be_read_is_one_of_the_lines(checkpoint, sample_images, tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(sample_images / "cat.jpg", photos / name)
    read = images._Folder.read

    def refused(root, path):
        if path == "a.jpg":
            raise PermissionError(13, "Permission denied")
        return read(root, path)

    monkeypatch.setattr(images._Folder, "read", refused)
    words = [str(checkpoint), "--image", str(photos), "--prompt", "What?", "--max-new-tokens", "3"]
    assert generate.main([*words, "--device", "cpu"]) == 1
    said = capsys.readouterr()
    first, second = map(json.loads, said.out.splitlines())
    assert first["error"] == "a.jpg: unreadable (Permission denied)"
    assert second["answer"]
    assert "1 of 2 images" in said.err


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


def test_several_dialogues_in_one_pass_are_answered_as_one_by_one(loaded):
    model, tokenizer = loaded
    dialogues = [
        ([{"from": "human", "value": "<image>\nWhat is this?"}], Image.new("RGB", (40, 30), "red")),
        ([{"from": "human", "value": "Name an animal, any animal that you have ever heard of."}], None),
        ([{"from": "human", "value": "<image>\nWhy?"}], Image.new("RGB", (30, 40), "green")),
    ]
    alone = [model.reply(tokenizer, *dialogue, max_new_tokens=8) for dialogue in dialogues]
    assert model.replies(tokenizer, dialogues, max_new_tokens=8) == alone
    assert len(set(alone)) == 3
    assert model.replies(tokenizer, dialogues[1:2], max_new_tokens=8) == alone[1:2]
    first = alone[0][: len(alone[0]) // 2]
    assert first
    (stopped,) = model.replies(tokenizer, dialogues[:1], max_new_tokens=8, stop_strings=[first])
    assert stopped.startswith(first)
    assert len(stopped) < len(alone[0])


def test_an_answer_has_no_image_token(loaded, monkeypatch):
    model, tokenizer = loaded
    image, head = model.config.image_token_id, model.llm.get_output_embeddings()

    def louder(module, inputs, logits):
        logits[..., image] = 1e4
        return logits

    hook = head.register_forward_hook(louder)
    seen = []
    generate_ = model.llm.generate
    monkeypatch.setattr(model.llm, "generate", lambda **kwargs: seen.append(generate_(**kwargs)) or seen[-1])
    model.reply(tokenizer, [{"from": "human", "value": "What?"}], max_new_tokens=3)
    hook.remove()
    assert image not in seen[0]


def test_a_dialogue_at_the_terminal(checkpoint, sample_images, capsys, monkeypatch, tmp_path):
    asked = []

    class Recorded(Dialogue):
        def ask(self, question, streamer=None):
            asked.append((question, len(self.turns), self.image is not None))
            return super().ask(question, streamer)

    monkeypatch.setattr("olavlm.student.text.dialogue.Dialogue", Recorded)
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
        (["--prompt", "x", "--temperature", "nan"], "--temperature is nan: 0 for greedy answers, or above"),
        (["--prompt", "x", "--temperature", "inf"], "--temperature is inf: 0 for greedy answers, or above"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature is -1.0: 0 for greedy answers, or above"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "--top-p is 0.0: above 0 and at most 1"),
        (["--prompt", "x", "--top-p", "0.9"], "--top-p is for sampling; add --temperature"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0: at least 1"),
        (["--prompt", "\udcff"], "--prompt '\\udcff' is not UTF-8"),
        (["--image", "."], "is a folder; add the --prompt"),
        (["--prompt", "x", "--output", "out.jsonl"], "--output is for the answers about a folder"),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(words, message, capsys):
    assert generate.main(["runs/none", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("seed", ["-1", "x", str(2**63)])
def test_a_seed_that_is_none(seed, capsys):
    with pytest.raises(SystemExit) as end:
        generate.main(["runs/none", "--prompt", "x", "--seed", seed])
    assert end.value.code == 2
    assert f"argument --seed: {seed} is not a whole number from 0 to 2**63 - 1" in capsys.readouterr().err


def test_an_empty_folder_is_a_failed_job(checkpoint, tmp_path, capsys):
    assert generate.main([str(checkpoint), "--image", str(tmp_path), "--prompt", "x", "--device", "cpu"]) == 1
    assert "no image in this folder" in capsys.readouterr().err


class TestTeachersOfAFusionBaseline:
    @pytest.fixture(scope="class")
    def fused(self, tiny, tmp_path_factory):
        """A token_concat model of random weights that reads gen and depth, and the teachers in other folders."""
        folder, moved = tmp_path_factory.mktemp("fused"), tmp_path_factory.mktemp("moved")
        torch.manual_seed(0)
        cards = {name: load_teacher(name, model=tiny[name], device="cpu").card.to_dict() for name in ("gen", "depth")}
        gone = {name: {**card, "model": str(moved / "gone")} for name, card in cards.items()}
        model = OlaVLM.build(
            tiny["llm"],
            tiny["encoder"],
            load_tokenizer(tiny["llm"]),
            num_task_tokens=0,
            fusion="token_concat",
            fused_teachers=[FusedTeacher(name, card) for name, card in gone.items()],
        )
        model.save_pretrained(folder)
        return folder, {name: shutil.copytree(tiny[name], moved / name) for name in gone}

    def words(self, fused, **places):
        folder, moved = fused
        named = [word for name, place in {**moved, **places}.items() for word in ("--teacher", f"{name}={place}")]
        return [str(folder), "--prompt", "What is this?", "--max-new-tokens", "4", *named]

    def test_they_are_found_where_they_are_said_to_be(self, fused, sample_images, capsys):
        image = ["--image", sample_images / "cat.jpg"]
        answer = run(capsys, *self.words(fused), *image)
        model = OlaVLM.from_pretrained(fused[0]).eval()
        model.load_teachers(fused[1])
        picture = generate.open_image(sample_images / "cat.jpg")
        assert answer.strip() == model.answer(model.tokenizer, picture, "What is this?", max_new_tokens=4)

    def test_several_pictures_in_one_pass(self, fused, sample_images):
        model = OlaVLM.from_pretrained(fused[0]).eval()
        model.load_teachers(fused[1])
        asked = [{"from": "human", "value": "<image>\nWhat is this?"}]
        pictures = [generate.open_image(sample_images / name) for name in ("cat.jpg", "rocket.jpg")]
        dialogues = [(asked, pictures[0]), ([{"from": "human", "value": "Hello"}], None), (asked, pictures[1])]
        alone = [model.reply(model.tokenizer, *dialogue, max_new_tokens=4) for dialogue in dialogues]
        assert model.replies(model.tokenizer, dialogues, max_new_tokens=4) == alone

    def test_without_an_image_none_is_loaded(self, fused, sample_images, capsys):
        assert run(capsys, fused[0], "--prompt", "Hello", "--max-new-tokens", "2")
        command = [str(fused[0]), "--prompt", "x", "--image", str(sample_images / "cat.jpg"), "--device", "cpu"]
        assert generate.main(command) == 1
        err = capsys.readouterr().err
        assert "teacher gen, which this model reads: " in err
        assert "--teacher gen=MODEL" in err
        assert err.count("\n") == 1

    def test_another_one_is_refused(self, fused, tiny, sample_images, tmp_path, capsys):
        other = make_tiny(tmp_path / "other", seed=1)
        command = [*self.words(fused, depth=other["depth"]), "--image", str(sample_images / "cat.jpg")]
        assert generate.main([*command, "--device", "cpu"]) == 1
        assert "has the fingerprint" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--teacher", "depth"], "--teacher depth: give NAME=MODEL"),
            (["--teacher", "depth=a", "--teacher", "depth=b"], "--teacher depth is given twice: a and b"),
        ],
    )
    def test_wrong_words(self, words, message, capsys):
        assert generate.main(["runs/none", "--prompt", "x", *words]) == 2
        assert message in capsys.readouterr().err

    def test_a_model_without_fusion_takes_none(self, checkpoint, capsys):
        assert generate.main([str(checkpoint), "--prompt", "x", "--teacher", "depth=a", "--device", "cpu"]) == 1
        assert "teacher 'depth': this model reads no teacher" in capsys.readouterr().err
