"""olavlm-export of the authors' checkpoints, and what goes on from its result: questions and training."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from olavlm.pipelines import export, generate
from olavlm.student.adapter import load_checkpoint
from olavlm.student.errors import RecipeError
from olavlm.student.model import OlaVLM
from olavlm.student.probing.model import load_probed
from olavlm.student.training.trainer import train as train_stage

KINDS = ("ola_llama", "llava_phi3")


@pytest.fixture(scope="module")
def starts(visper, tmp_path_factory):
    """What the command makes of them, by kind; their config says what they are."""
    made = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp("export") / kind
        assert export.main([str(visper(kind).folder), str(out), "--to", "olavlm"]) == 0
        made[kind] = out
    return made


@pytest.fixture
def recipe_from(recipe, starts, ift_json):
    """recipe_from(kind, **overrides) -> a recipe of ift that starts from it and reads no base models."""

    def make(kind, **overrides):
        base = {"init.from": starts[kind], "model.llm": "not/read", "model.encoder": "not/read"}
        base |= {"model.num_task_tokens": 4, "data.file": ift_json, "train.max_steps": 1}
        return recipe(
            "ift", **base | {f"tasks.{name}.layers": "[1, 3]" for name in ("gen", "depth", "seg")} | overrides
        )

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_and_a_record(starts, sample_images, capsys, kind):
    record = json.loads((starts[kind] / export.RECORD).read_text())
    assert (record["from"], record["to"]) == ("visper-lm", "olavlm")
    assert record["template"] == {"ola_llama": "llama_3", "llava_phi3": "phi_3"}[kind]
    assert len(record["notes"]) == {"ola_llama": 4, "llava_phi3": 0}[kind]
    capsys.readouterr()
    words = ["--image", str(sample_images / "cat.jpg"), "--prompt", "What is this?", "--max-new-tokens", "4"]
    assert generate.main([str(starts[kind]), *words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()


def test_it_can_be_probed(starts):
    for start in starts.values():
        model, notes = load_probed(start)
        assert (notes, model.num_image_tokens, model.inserted.added) == ([], 16, 16 + 3 * 4 - 1)
        ids = torch.tensor([[5, model.config.image_token_id, 6]])
        states, mask = model.states({1, 6}, ids, pixel_values=torch.ones(1, 3, 56, 56))
        assert states[6].shape == (1, 2 + 16 + 12, 64)
        assert mask.all()


@pytest.mark.parametrize(("kind", "template"), [("ola_llama", "llama_3"), ("llava_phi3", "phi_3")])
def test_ift_goes_on_from_it(recipe_from, starts, capfd, kind, template):
    """Tokens stay as they are; predictors, which ift has no use for, are not even loaded, without a word about it."""
    run = train_stage(recipe_from(kind, **{"model.template": template}), "ift", {})
    assert "UNEXPECTED" not in capfd.readouterr().err
    before = OlaVLM.from_pretrained(starts[kind])
    assert len(before.predictors) == (6 if kind == "ola_llama" else 0)
    after, _ = load_checkpoint(run)
    weights = before.state_dict()
    changed = {name.partition(".")[0] for name, w in after.state_dict().items() if not w.equal(weights[name])}
    assert changed == {"llm", "projector"}
    assert after.tasks == before.tasks
    parts = {row["part"]: row["parameters"] for row in json.loads((run / "stage.json").read_text())["parts"]}
    assert parts["predictors"] == 0
    assert parts["task_tokens"] == (4 + 16 + 16) * 64


def test_losses_beyond_pt_go_on_from_a_run(recipe_from):
    with pytest.raises(RecipeError, match=r"losses\.stages has ift, and .* is no run folder of pt, with predictors to"):
        train_stage(recipe_from("ola_llama", **{"losses.stages": "[pt, ift]"}), "ift", {})


def test_flags(visper, llava, tiny, tmp_path, capsys):
    made = visper("llava_llama", mm_vision_tower="/authors/clip")
    out = tmp_path / "out"
    words = [str(made.folder), str(out), "--from", "visper-lm", "--to", "olavlm"]
    assert export.main(words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("say where the vision tower lies: --encoder NAME")
    assert export.main([*words, "--encoder", str(tiny["encoder"]), "--template", "plain"]) == 0
    printed = capsys.readouterr().out
    assert f"vision tower: {tiny['encoder']}, for the checkpoint's /authors/clip" in printed
    assert "template plain, geometry pad" in printed
    assert "4 tokens each of gen, depth, seg, without predictors" in printed
    stock = [str(llava("llama_clip")), str(tmp_path / "other"), "--to", "olavlm", "--encoder", "x"]
    assert export.main(stock) == 2
    assert "--encoder is for --from visper-lm" in capsys.readouterr().err
    assert export.main([str(tiny["llm"]), str(tmp_path / "b"), "--from", "visper-lm", "--to", "olavlm"]) == 1
    assert "config.json has mm_vision_tower None; it must be text" in capsys.readouterr().err


def test_straight_to_stock_llava(visper, starts, sample_images, tmp_path):
    """The answers of the two ways are one: to ours and then to stock LLaVA, or at once."""
    made = visper("ola_llama").folder
    assert export.main([str(made), str(tmp_path / "once"), "--to", "llava-hf"]) == 0
    assert export.main([str(starts["ola_llama"]), str(tmp_path / "twice"), "--to", "llava-hf"]) == 0
    logits = []
    assert f"trained from {made.name}." in (tmp_path / "once" / "README.md").read_text()
    for name in ("once", "twice"):
        processor = AutoProcessor.from_pretrained(tmp_path / name, backend="pil")
        question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        inputs = processor(text=text, images=Image.open(sample_images / "cat.jpg"), return_tensors="pt")
        with torch.no_grad():
            logits.append(LlavaForConditionalGeneration.from_pretrained(tmp_path / name)(**inputs).logits)
    assert logits[0].std() > 0
    torch.testing.assert_close(*logits)
