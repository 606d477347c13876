"""olavlm-export of our runs: a stock LLaVA or an adapter, each with a model card that runs."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from olavlm.pipelines import export
from olavlm.student.adapter import load_checkpoint
from olavlm.student.training.trainer import train as train_stage

SCORES = {
    "tasks": {
        "cv_bench": {"items": 2638, "figures": {"2D": {"value": 0.6123, "low": 0.58, "high": 0.64}}},
        "mmstar": {"items": 1500, "figures": {"average": {"value": 0.385}}},
    }
}


@pytest.fixture(scope="module")
def runs(recipe_in, ift_json, tmp_path_factory):
    """Run folders of pt and of ift after it, with LoRA, and scores in the second."""
    folder = tmp_path_factory.mktemp("runs")
    pt = train_stage(recipe_in(folder, **{"train.max_steps": 2}), "pt", {})
    settings = {"data.file": ift_json, "init.from": pt, "train.max_steps": 2, "lora.rank": 2}
    ift = train_stage(recipe_in(folder, "ift", **settings), "ift", {})
    (ift / "benchmarks").mkdir()
    (ift / "benchmarks" / "scores.json").write_text(json.dumps(SCORES))
    return pt, ift


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Folders that the command made of both runs, by what it was told."""
    root = tmp_path_factory.mktemp("exports")
    told = {"pt": (runs[0], "llava-hf"), "ift": (runs[1], "llava-hf"), "adapter": (runs[0], "adapter")}
    for name, (run, kind) in told.items():
        assert export.main([str(run), str(root / name), "--to", kind]) == 0
    return root


def card(folder):
    """The front matter and the rest of a card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("name", ["pt", "ift"])
def test_a_run_of_either_kind_becomes_stock(exported, runs, name):
    run = runs[("pt", "ift").index(name)]
    assert AutoConfig.from_pretrained(exported / name).model_type == "llava"
    stock = load_file(exported / name / "model.safetensors")
    model, tokenizer = load_checkpoint(run)
    for theirs, ours in (
        ("multi_modal_projector.linear_1.weight", model.projector[0].weight),
        ("layers.5.mlp.up_proj.weight", model.llm.model.layers[5].mlp.up_proj.weight),
    ):
        assert torch.equal(next(w for key, w in stock.items() if key.endswith(theirs)), ours)
    rows = next(w for key, w in stock.items() if key.endswith("embed_tokens.weight"))
    assert torch.equal(rows[len(tokenizer) :], model.task_tokens())


def test_the_card_of_a_stock_model(exported):
    front, text = card(exported / "ift")
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert "license" not in front
    assert "base_model" not in front, "the base models of this run are folders"
    assert "A vision-language model, as a stock LLaVA, trained from llm and encoder. Features of teachers" in text
    assert re.search(r"^\| pt \| pt\.json \| 10 \| all \| 8 \| 2 \| 4 \|$", text, re.MULTILINE)
    assert re.search(r"^\| ift \| ift\.json \| 8 \| all \| 8 \| 2 \| 4 \|$", text, re.MULTILINE)
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert [block["train"]["lr"] for block in blocks] == [1e-3, 3e-3]
    assert blocks[0]["tasks"]["depth"]["layers"]
    assert blocks[0]["losses"]["contrastive_weight"] == 0.3
    assert ("losses" in blocks[1], blocks[1]["lora"]["rank"]) == (False, 2)
    assert re.search(r"Features: .*depth of depth \(mean4, fingerprint [0-9a-f]{16}\)", text)
    assert "has to begin with it" in text
    assert "behind an `<image>` that does not end it" in text, "Markdown shows no tag"
    assert "| cv_bench | 2D | 0.6123 | 0.58 | 0.64 | 2,638 |" in text
    assert "| mmstar | average | 0.385 |  |  | 1,500 |" in text


def test_no_folders_of_the_machine_are_named(exported, tmp_path_factory):
    written = [file for name in ("pt", "ift") for file in (exported / name).iterdir() if file.suffix != ".safetensors"]
    assert len(written) == 2 * 7, "card, template, configs of model, generation and processor, two of the tokenizer"
    for file in [*written, exported / "adapter" / "README.md"]:
        assert str(tmp_path_factory.getbasetemp()) not in file.read_text(), file.name


def test_hub_ids_and_published_data_are_named(exported, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"llm": "meta-llama/Meta-Llama-3-8B-Instruct", "encoder": "openai/clip-vit-large-patch14-336"}
    recipe["data"] |= {"file": "/data/llava_v1_5_mix665k.json", "fraction": 0.5}
    recipe["init"]["from"] = None
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "benchmarks" / "scores.json").write_text('{"tasks": []}')
    assert export.main([str(run), str(tmp_path / "out"), "--to", "llava-hf", "--dtype", "bfloat16"]) == 0
    front, text = card(tmp_path / "out")
    assert front["base_model"] == ["meta-llama/Meta-Llama-3-8B-Instruct", "openai/clip-vit-large-patch14-336"]
    assert front["datasets"] == ["liuhaotian/LLaVA-Instruct-150K"]
    assert "| ift | llava_v1_5_mix665k.json | unknown | 50 % | 8 | 2 | 4 |" in text
    assert "benchmarks/scores.json of the run is no file of olavlm-eval: AttributeError." in text
    assert "| weights | bfloat16 |" in text
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert {part.dtype for part in (config, config.text_config, config.vision_config)} == {torch.bfloat16}


def snippet(folder, language="python"):
    return re.search(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("name", ["ift", "adapter"])
def test_the_snippet_runs(exported, sample_images, monkeypatch, capsys, name):
    shutil.copy(sample_images / "cat.jpg", exported / "cat.jpg")
    monkeypatch.chdir(exported)
    code = snippet(exported / name)
    assert ("olavlm" in code) == (name == "adapter")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_adapter_is_small_and_is_started_from(exported, runs, recipe, ift_json):
    folder = exported / "adapter"
    weights = load_file(folder / "adapter.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"projector", "task_tokens", "predictors", "logit_scales"}
    assert not any("checkpoint" in file.name or "metrics" in file.name for file in folder.iterdir())
    model, _ = load_checkpoint(folder)
    other, _ = load_checkpoint(runs[0])
    assert all(torch.equal(w, other.state_dict()[name]) for name, w in model.state_dict().items())
    run = train_stage(recipe("ift", **{"data.file": ift_json, "init.from": folder, "train.max_steps": 1}), "ift", {})
    assert torch.equal(load_checkpoint(run)[0].task_tokens(), model.task_tokens())
    front, text = card(folder)
    assert front["library_name"] == "olavlm"
    assert json.loads((folder / "adapter.json").read_text())["recipe_sha256"] in text
    assert "llm in adapter.json is a folder of the machine that trained it; write a hub id there" in text


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--to", "adapter"], 1, "ift holds a whole model, of which the language model was trained too"),
        (["--to", "olavlm"], 2, "ift is olavlm; --to takes llava-hf, adapter for it, not olavlm"),
        (["--from", "llava-hf", "--to", "olavlm"], 1, "holds a 'olavlm' model, not 'llava'"),
        (["--to", "llava-hf", "--template", "chat"], 2, "--template is for models of others"),
        (["--to", "adapter", "--dtype", "float32"], 2, "--dtype is for --to llava-hf"),
    ],
)
def test_what_cannot_be(runs, tmp_path, capsys, words, status, reason):
    assert export.main([str(runs[1]), str(tmp_path / "out"), *words]) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("olavlm-export: error")]
    assert reason in line
    assert not (tmp_path / "out").exists()


def test_where_it_is_put(runs, tmp_path, monkeypatch, capsys):
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    monkeypatch.chdir(empty)
    assert export.main([str(runs[0]), ".", "--to", "adapter"]) == 1
    assert ". cannot be replaced, as the working folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert export.main([str(runs[0]), str(link), "--to", "adapter"]) == 0
    assert link.is_symlink()
    assert (empty / "adapter.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "link"]


def test_a_folder_without_a_model(tmp_path, capsys):
    assert export.main([str(tmp_path), str(tmp_path / "out"), "--to", "llava-hf"]) == 1
    assert "has no config.json that names a kind of model" in capsys.readouterr().err


def test_an_unfinished_run_and_a_damaged_adapter(runs, tmp_path, capsys):
    unfinished, damaged = tmp_path / "unfinished", tmp_path / "damaged"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "stage.json").write_text("{}")
    shutil.copytree(runs[0], damaged)
    (damaged / "adapter.safetensors").write_bytes(b"nothing")
    for run, kind, reason in (
        (unfinished, "llava-hf", "is a run that has not finished"),
        (unfinished, "adapter", "is a run that has not finished"),
        (damaged, "adapter", "adapter.safetensors is damaged"),
    ):
        assert export.main([str(run), str(tmp_path / "out"), "--to", kind]) == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
