"""The commands in a row, as a user types them, and what they say when something is wrong."""

import json
import shutil
import subprocess
import sys

import pytest

from olavlm.pipelines import generate, store, tiny, train


@pytest.fixture
def config(recipe, tmp_path):
    """A recipe file over the shared fixtures, as arguments."""

    def write(stage="pt", **overrides):
        file = tmp_path / f"{stage}.yaml"
        file.write_text(json.dumps(recipe(stage, **overrides).to_dict()))
        return ["--config", str(file)]

    return write


def test_pt_then_ift_then_an_answer(config, ift_json, tmp_path, capsys, sample_images):
    assert train.main(["pt", *config(**{"train.max_steps": 2})]) == 0
    out = capsys.readouterr().out
    assert "predictors" in out
    assert "step 2/2 | loss " in out
    ift = config("ift", **{"data.file": ift_json, "init.from": tmp_path / "pt", "train.max_steps": 2})
    assert train.main(["ift", *ift]) == 0
    for checkpoint in ("pt", "ift"):
        capsys.readouterr()
        words = ["--image", str(sample_images / "cat.jpg"), "--prompt", "What is this?", "--max-new-tokens", "4"]
        assert generate.main([str(tmp_path / checkpoint), *words, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "ift" / "stage.json").read_text())["stage"] == "ift"


def test_dry_run_loads_no_model_and_writes_nothing(config, tmp_path, capsys):
    shutil.rmtree(tmp_path / "pt", ignore_errors=True)
    arguments = config(**{"model.llm": "no/such/model"})
    assert train.main(["pt", *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "10 samples, 10 with an image" in out
    assert "depth: layers [2, 6]" in out
    assert not (tmp_path / "pt").exists()


def test_tiny_writes_the_five_folders(tmp_path):
    assert tiny.main([str(tmp_path / "tiny")]) == 0
    names = ["depth", "encoder", "gen", "llm", "seg"]
    assert sorted(f.name for f in (tmp_path / "tiny").iterdir()) == names
    assert all((tmp_path / "tiny" / name / "config.json").is_file() for name in names)


def test_cache_tools(store32, pt_json, tmp_path, capsys):
    assert store.main(["status", str(store32), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["teachers"]["depth"]["valid"] == status["images"] == 10
    assert status["teachers"]["depth"]["complete"] is True
    assert store.main(["info", str(store32), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["teachers"]["depth"]["shape"] == [10, 576, 32]
    assert info["teachers"]["depth"]["card"]["channel_order"] == "RGB"
    assert store.main(["plan", str(tmp_path / "new"), "--data", str(pt_json), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["images"], made["added"]) == (10, 10)
    assert made["plan"] == info["plan"]["sha256"]  # named by its content, wherever it is made
    for command in ("status", "info", "plan"):
        assert store.main([command, str(store32)]) == 0
        assert "10 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["--train.max_step=1"], 2, "unknown recipe key 'train.max_step'; the nearest is 'train.max_steps'"),
        (["--train.seed"], 2, "--train.seed lacks its value"),
        (["train.seed=1"], 2, "argument 'train.seed=1' is not expected"),
        (["--model.llm=no/llm"], 1, "no/llm"),
        (["--model.llm=nobody/on-the-hub"], 1, "nobody/on-the-hub"),
        (["--model.encoder=no/encoder"], 1, "no/encoder"),
        (["--model.template=llama_4"], 2, "llama_4"),
        (["--data.file=none.json"], 1, "dataset file none.json does not exist"),
        (["--data.images=none"], 1, "image root none does not exist"),
        (["--targets.store=none"], 1, "none is not a feature store"),
        (["--init.from=none"], 1, "checkpoint none does not exist"),
        (["--tasks.depth.layers=[7]"], 2, "layer 7 of an LLM of 6 blocks"),
        (["--model.num_task_tokens=7"], 2, "not divisible"),
    ],
)
def test_wrong_recipes_give_one_line(config, overrides, status, message, capsys):
    assert train.main(["pt", *config(**{"train.max_steps": 1}), *overrides]) == status
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("olavlm-train: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in errors


def test_wrong_models_give_one_line(config, tiny, tmp_path, capsys):
    """Folders that are there and are not what is asked for."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for override in (f"--model.llm={empty}", f"--model.encoder={empty}", f"--model.encoder={tiny['llm']}",
                     f"--model.llm={tiny['encoder']}", f"--init.from={empty}"):  # fmt: skip
        assert train.main(["pt", *config(**{"train.max_steps": 1}), override]) == 1, override
        assert capsys.readouterr().err.count("olavlm-train: error: ") == 1


@pytest.mark.parametrize("name", ["llm", "encoder", "gen", "depth"])
def test_a_model_of_another_kind_is_no_checkpoint(tiny, name, capsys):
    assert generate.main([str(tiny[name]), "--prompt", "?"]) == 1
    assert "model, not one of ours" in capsys.readouterr().err


def test_missing_recipe_lists_the_shipped_ones(capsys):
    assert train.main(["pt", "--config", "llama9"]) == 2
    assert "recipe llama9 does not exist; give a file or one of llama3-8b-clip-l" in capsys.readouterr().err


def test_generate_errors(tmp_path, capsys, sample_images):
    picture = ["--image", str(sample_images / "cat.jpg"), "--prompt", "?"]
    assert generate.main([str(tmp_path / "none"), *picture]) == 1
    assert "does not exist; give a run folder" in capsys.readouterr().err
    assert generate.main([str(tmp_path), *picture]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert generate.main([str(tmp_path), "--image", "none.jpg", "--prompt", "?"]) == 1
    assert "none.jpg: No such file or directory" in capsys.readouterr().err
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    assert generate.main([str(tmp_path), "--image", str(tmp_path / "bad.jpg"), "--prompt", "?"]) == 1
    assert "not-an-image" in capsys.readouterr().err


def test_cache_errors(tmp_path, capsys):
    for command in ("status", "info"):
        assert store.main([command, str(tmp_path)]) == 1
        assert "is not a feature store" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["extract", "store", "train", "generate", "tiny", "report"])
def test_help_shows_an_example_and_a_bad_flag_is_status_2(name):
    command = [sys.executable, "-m", f"olavlm.pipelines.{name}"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "example: olavlm-" in shown.stdout
    wrong = subprocess.run([*command, "--no-such-flag"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
