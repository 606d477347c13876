"""olavlm-export, and what starts from its result: training in every stage, and questions."""

import json
import re

import pytest
import torch

from olavlm.pipelines import export, generate, train
from olavlm.student.adapter import load_checkpoint, read_adapter
from olavlm.student.errors import RecipeError
from olavlm.student.extension import extend
from olavlm.student.model import OlaVLM
from olavlm.student.tokens import TaskSpec
from olavlm.student.training.trainer import train as train_stage

NO_TASKS = {f"tasks.{name}": "null" for name in ("gen", "depth", "seg")}


@pytest.fixture(scope="module")
def stock(llava):
    return llava("llama_clip")


@pytest.fixture(scope="module")
def start(stock, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "start"
    assert export.main([str(stock), str(out), "--from", "llava-hf", "--to", "olavlm"]) == 0
    return out


@pytest.fixture
def recipe_from(recipe, start):
    """recipe_from(stage, **overrides) -> a recipe that starts from the exported folder and reads no base models."""

    def make(stage, **overrides):
        base = {"init.from": start, "model.template": "chat", "model.llm": "not/read", "model.encoder": "not/read"}
        base |= {f"tasks.{name}.layers": "[1, 3]" for name in ("gen", "depth", "seg")}
        return recipe(stage, **base | {"train.max_steps": 2} | overrides)

    return make


def test_an_answer_and_a_record(start, stock, sample_images, capsys):
    record = json.loads((start / export.RECORD).read_text())
    assert (record["source"], record["from"], record["to"]) == (str(stock), "llava-hf", "olavlm")
    assert (record["template"], record["notes"]) == ("chat", [])
    assert "transformers" in record["versions"]
    capsys.readouterr()
    words = ["--image", str(sample_images / "cat.jpg"), "--prompt", "What is this?", "--max-new-tokens", "4"]
    assert generate.main([str(start), *words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()


def test_ift_from_it_without_tasks(recipe_from, start, ift_json, tmp_path):
    recipe = recipe_from("ift", **NO_TASKS, **{"data.file": ift_json})
    assert not recipe.tasks
    run = train_stage(recipe, "ift", {})
    before, after = OlaVLM.from_pretrained(start), OlaVLM.from_pretrained(run)
    changed = {
        name.partition(".")[0] for name, w in after.state_dict().items() if not w.equal(before.state_dict()[name])
    }
    assert changed == {"llm", "projector"}
    assert after.config.geometry == "pad"
    assert not after.tasks


def test_pt_distils_into_it_and_ift_goes_on(recipe_from, start, ift_json, tmp_path):
    run = train_stage(recipe_from("pt"), "pt", {})
    adapter = read_adapter(run)
    assert adapter.whole == str(start)
    base, (model, _) = OlaVLM.from_pretrained(start), load_checkpoint(run)
    weights = base.state_dict()
    assert all(w.equal(weights[n]) for n, w in model.state_dict().items() if n.startswith(("llm.", "vision.")))
    drift = (model.projector[0].weight - base.projector[0].weight).abs().max()
    assert 0 < drift < 0.01, "PT went on from the checkpoint's projector"
    assert [task.name for task in model.tasks] == ["gen", "depth", "seg"]
    ift = recipe_from("ift", **{"init.from": run, "data.file": ift_json})
    assert [task.name for task in OlaVLM.from_pretrained(train_stage(ift, "ift", {})).tasks] == ["gen", "depth", "seg"]


def test_dry_run_estimates_what_it_starts_from(recipe_from, start, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_from("pt").to_dict()))
    assert train.main(["pt", "--config", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "no estimate" not in out
    assert re.search(r"^ *total +\d", out, re.MULTILINE)


def test_what_it_was_trained_with_cannot_be_changed(recipe_from):
    with pytest.raises(RecipeError, match=r"model\.template is llama_3, and .*start was trained with chat"):
        train_stage(recipe_from("pt", **{"model.template": "llama_3"}), "pt", {})
    with pytest.raises(RecipeError, match=r"tasks, in model\.order is \['gen', 'depth', 'seg'\], and .* with \[\]"):
        train_stage(recipe_from("ift"), "ift", {})


def test_extend_needs_a_model_without_tasks(start):
    model = OlaVLM.from_pretrained(start)
    task = TaskSpec("gen", tokens=1, dim=8, layers=(1,))
    extended = extend(model, [task], num_task_tokens=2)
    assert set(extended.predictors) == {"gen_1"}
    assert extended.llm is model.llm
    assert torch.equal(extended.projector[2].weight, model.projector[2].weight)
    with pytest.raises(RecipeError, match=r"has tasks already \(gen\)"):
        extend(extended, [task])


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--to", "llava-hf"], 2, "is llava-hf; --to takes olavlm for it, not llava-hf"),
        (["--to", "gguf"], 2, "invalid choice: 'gguf'"),
        (["--from", "llava", "--to", "olavlm"], 2, "invalid choice: 'llava'"),
        ([], 2, "required: --to"),
        (["--to", "olavlm", "--template", "llama_4"], 2, "template 'llama_4' is unknown"),
    ],
)
def test_wrong_usage(stock, tmp_path, capsys, words, status, reason):
    try:
        code = export.main([str(stock), str(tmp_path / "out"), *words])
    except SystemExit as error:
        code = error.code
    assert code == status
    assert reason in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_taken(start, tiny, stock, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    for source, out, status, reason in [
        (start, tmp_path / "a", 2, "is olavlm; --to takes llava-hf, adapter for it, not olavlm"),
        (tiny["llm"], tmp_path / "b", 1, "holds a 'llama' model; --from takes llava-hf, olavlm"),
        (tmp_path / "nothing", tmp_path / "c", 1, "cannot load a model from"),
        (stock, full, 1, "full exists; name another folder"),
    ]:
        assert export.main([str(source), str(out), "--to", "olavlm"]) == status
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert reason in line
    assert sorted(f.name for f in tmp_path.iterdir()) == ["full"]
