"""Model cards of what no run of ours left, or of little that it left."""

import json
import shutil

import pytest
import yaml

from olavlm.pipelines.model_card import read_history, write_card


def card(folder, history, kind="llava-hf", **settings):
    settings = {"rows": [("weights", "float32")], "notes": []} | settings
    write_card(folder, "my-model", history, kind, **settings)
    return (folder / "README.md").read_text()


def run_folder(folder, recipe, stage="ift", steps=3):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "stage.json").write_text(json.dumps({"stage": stage, "processes": 2}))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i + 1}}}\n' for i in range(steps)))
    return folder


def test_a_model_that_no_run_left(tmp_path):
    text = card(tmp_path, read_history(tmp_path))
    assert "A vision-language model, as a stock LLaVA.\n" in text
    assert "holds no record of a training" in text
    assert "None were measured" in text
    assert "OLA-VLM" not in text


def test_what_a_chain_started_from(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "export.json").write_text('{"source": "llava-hf/llava-1.5-7b-hf"}')
    recipe = {
        "model": {"llm": "not/read", "encoder": "not/read"},
        "init": {"from": str(start)},
        "train": {"batch_size": 4, "accumulation": 2, "lr": 1e-3},
        "data": {"file": ["/data/a|b.json", "blip_laion_cc_sbu_558k.json"]},
        "tasks": {"gen": {"layers": [4], "teacher": "timm:/models/vit", "model": "/models/gen"}},
        "losses": {"stages": ["pt"]},
    }
    pt = run_folder(tmp_path / "pt", recipe, "pt")
    ift = run_folder(tmp_path / "ift", recipe | {"init": {"from": str(pt)}})
    history = read_history(ift)
    assert [run.stage for run in history.runs] == ["pt", "ift"]
    text = card(tmp_path, history)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == ["llava-hf/llava-1.5-7b-hf"]
    assert front["datasets"] == ["liuhaotian/LLaVA-Pretrain"]
    assert "trained from llava-hf/llava-1.5-7b-hf. Features of teachers were distilled" in text
    assert r"| pt | a\|b.json, blip_laion_cc_sbu_558k.json | unknown | all | 48 | 3 | 16 |" in text
    assert "teacher: timm:vit" in text
    assert "/models" not in text
    assert "/data" not in text


def test_a_chain_is_followed_from_where_it_was_trained(tmp_path, monkeypatch):
    """Recipes keep relative folders as they were typed."""
    recipe = {"model": {"llm": "some/llm", "encoder": "an/encoder"}, "losses": {"stages": ["pt"]}}
    recipe["tasks"] = {"depth": {"layers": [4], "teacher": None, "model": None}}
    (tmp_path / "runs").mkdir()
    pt = run_folder(tmp_path / "runs/pt", recipe | {"train": {"output_dir": "runs/pt"}}, "pt")
    card_of = {"name": "depth", "model": "/models/big-depth", "recipe": {"name": "mean4"}, "fingerprint": "f" * 64}
    stage = json.loads((pt / "stage.json").read_text())
    (pt / "stage.json").write_text(json.dumps(stage | {"teachers": {"depth": card_of}}))
    ift = run_folder(tmp_path / "runs/ift", recipe | {"train": {"output_dir": "runs/ift"}, "init": {"from": "runs/pt"}})
    monkeypatch.chdir("/")
    text = card(tmp_path, read_history(ift))
    assert "trained from some/llm and an/encoder. Features of teachers were distilled" in text
    assert f"Features: depth of big-depth (mean4, fingerprint {'f' * 16}). Their teachers' weights have lic" in text
    assert "/models" not in text
    shutil.rmtree(pt)
    text = card(tmp_path, read_history(ift))
    assert "It started from runs/pt, which was not there at the export." in text
    assert "base_model" not in text
    assert "trained from" not in text


def test_a_dataset_that_is_damaged_by_now_is_not_counted(tmp_path):
    (tmp_path / "data.json").write_text("[{")
    run = run_folder(tmp_path / "run", {"data": {"file": str(tmp_path / "data.json"), "images": "x" * 300}})
    assert "| ift | data.json | unknown |" in card(tmp_path, read_history(run))


def test_runs_that_start_from_each_other_end(tmp_path):
    recipe = {"init": {"from": str(tmp_path / "a")}}
    run_folder(tmp_path / "a", recipe)
    assert len(read_history(run_folder(tmp_path / "b", recipe)).runs) == 2


@pytest.mark.parametrize(
    "scores", ["{", "[]", '{"tasks": {"a": {}}}', '{"tasks": {"a": {"items": 1, "figures": {"b": {"value": "x"}}}}}']
)
def test_scores_of_another_format(tmp_path, scores):
    run = run_folder(tmp_path / "run", {})
    (run / "benchmarks").mkdir()
    (run / "benchmarks" / "scores.json").write_text(scores)
    assert "is no file of olavlm-eval" in card(tmp_path, read_history(run))
