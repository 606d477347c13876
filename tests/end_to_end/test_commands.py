"""The commands in a row, as a user types them, and what they say when something is wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from transformers.utils import is_flash_attn_2_available

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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.images": "gone"}, "image root gone does not exist"),
        ({"data.images": "empty"}, "none of 10 images tried can be read"),
        ({"targets.store": "gone"}, "not a feature store"),
    ],
)
def test_dry_run_refuses_what_the_run_would(config, tmp_path, capsys, monkeypatch, overrides, said):
    (tmp_path / "empty").mkdir()
    arguments = config(**overrides)
    monkeypatch.chdir(tmp_path)
    refusals = []
    for words in (["--dry-run"], []):
        assert train.main(["pt", *arguments, *words]) == 1
        refusals.append(capsys.readouterr().err)
    assert refusals[0] == refusals[1]
    assert said in refusals[0]


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


def one_line(capsys, command="olavlm-train"):
    """What a command has said on standard error, which must be one line and an error."""
    errors = capsys.readouterr().err
    assert errors.startswith(f"{command}: error: "), errors
    assert errors.count("\n") == 1, errors
    assert errors.endswith("\n"), errors
    return errors


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["--train.max_step=1"], 2, "unknown recipe key 'train.max_step'; the nearest is 'train.max_steps'"),
        (["--train.seed"], 2, "--train.seed lacks its value"),
        (["train.seed=1"], 2, "argument 'train.seed=1' is not expected"),
        (["--train.seed=4294967296"], 2, "train.seed is 4294967296: from 0 to 2**32 - 1"),
        ([f"--train.seed={2**64}"], 2, f"train.seed is {2**64}: from 0 to 2**32 - 1"),
        (["--model.llm=nope"], 1, "no tokenizer in 'nope': it is neither a local folder nor reachable as a hub id"),
        (["--model.llm=no/such/llm"], 1, "no tokenizer in 'no/such/llm': it is neither a local folder nor reachable"),
        (["--model.llm=nobody/on-the-hub"], 1, "'nobody/on-the-hub': it is neither a local folder nor reachable"),
        (["--model.encoder=no/encoder"], 1, "'no/encoder': it is neither a local folder nor reachable as a hub id"),
        (["--model.attention=fast"], 2, "model.attention is fast: use sdpa, flash_attention_2 or eager"),
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
    assert message in one_line(capsys)


def test_wrong_models_give_one_line(config, tiny, tmp_path, capsys):
    """Folders that are there and are not what is asked for."""
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tiny["encoder"] / "config.json"
    for override, message in (
        (f"--model.llm={empty}", f"no tokenizer in '{empty}': the folder has no tokenizer.json; save the model's"),
        (f"--model.encoder={empty}", f"cannot load a model from '{empty}'"),
        (f"--model.encoder={tiny['llm']}", "'llama' is no known encoder"),
        (f"--model.encoder={file}", f"cannot load a model from '{file}': it is a file; give the folder"),
        (f"--model.llm={tiny['encoder']}", "the folder has no tokenizer.json"),
        (f"--model.llm={file}", f"no tokenizer in '{file}': it is a file; give the folder"),
        (f"--init.from={empty}", f"{empty} holds no checkpoint"),
        (f"--init.from={file}", f"checkpoint {file} is a file; give the run folder"),
    ):
        assert train.main(["pt", *config(**{"train.max_steps": 1}), override]) == 1, override
        assert message in one_line(capsys)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash_attention_2 can be used here")
def test_attention_without_its_package_is_a_wrong_value(config, tmp_path, capsys):
    recipe = config(**{"train.max_steps": 1})
    assert train.main(["pt", *recipe, "--model.attention=flash_attention_2"]) == 2
    errors = one_line(capsys)
    assert "attention 'flash_attention_2' cannot be used: " in errors
    assert "install it, or use sdpa or eager" in errors
    assert not (tmp_path / "pt").exists()


@pytest.mark.parametrize("name", ["llm", "encoder", "gen", "depth"])
def test_a_model_of_another_kind_is_no_checkpoint(tiny, name, capsys):
    assert generate.main([str(tiny[name]), "--prompt", "?"]) == 1
    assert "model, not one of ours" in one_line(capsys, "olavlm-generate")


def test_missing_recipe_lists_the_shipped_ones(capsys):
    assert train.main(["pt", "--config", "llama9"]) == 2
    assert "recipe llama9 does not exist; give a file or one of llama3-8b-clip-l" in one_line(capsys)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_of_bases_gives_one_line(tmp_path, capsys, names):
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    assert train.main(["pt", "--config", str(tmp_path / "a.yaml")]) == 2
    chain = " -> ".join(f"{name}.yaml" for name in [*names, "a"])
    assert f"is a base of itself ({chain}); a chain of bases has to end" in one_line(capsys)


def test_a_base_that_is_no_name_gives_one_line(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("base: [tiny]\n")
    assert train.main(["pt", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "base is ['tiny']; name a file beside it, or a shipped recipe" in one_line(capsys)


def test_generate_errors(tmp_path, capsys, sample_images):
    picture = ["--image", str(sample_images / "cat.jpg"), "--prompt", "?"]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    for arguments, message in (
        ([str(tmp_path / "none"), *picture], "does not exist; give a run folder"),
        ([str(tmp_path), *picture], "holds no checkpoint"),
        ([str(tmp_path / "bad.jpg"), *picture], "bad.jpg is a file; give the run folder that it lies in"),
        ([str(tmp_path), "--image", "none.jpg", "--prompt", "?"], "none.jpg: No such file or directory"),
        ([str(tmp_path), "--image", str(tmp_path / "bad.jpg"), "--prompt", "?"], "not-an-image"),
    ):
        assert generate.main(arguments) == 1
        assert message in one_line(capsys, "olavlm-generate")


def test_cache_errors(tmp_path, capsys):
    for command in ("status", "info"):
        assert store.main([command, str(tmp_path)]) == 1
        assert "is not a feature store" in one_line(capsys, "olavlm-cache")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", [False, True], ids=["module", "script"])
def test_a_signal_during_the_imports_gives_one_line(tmp_path, number, script):
    """A library that every command imports says so, and waits for the signal."""
    (tmp_path / "tqdm.py").write_text("import signal\nprint('importing', flush=True)\nsignal.pause()\n")
    (tmp_path / "olavlm-train").write_text("from olavlm.pipelines.train import main\nmain()\n")
    command = [tmp_path / "olavlm-train"] if script else ["-m", "olavlm.pipelines.train"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, *command, "--help"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == f"olavlm: error: stopped by {number.name}\n"


def test_a_signal_during_a_command_gives_one_line_and_leaves_the_handlers(monkeypatch, capsys):
    """Also where a library would swallow any Exception."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):

        def stopped(*_, number=number):
            with contextlib.suppress(Exception):
                signal.raise_signal(number)

        monkeypatch.setattr(train, "load_recipe", stopped)
        assert train.main(["pt", "--config", "tiny"]) == 1
        assert one_line(capsys) == f"olavlm-train: error: stopped by {number.name}\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "name", ["extract", "store", "train", "generate", "evaluate", "export", "probe", "tiny", "report"]
)
def test_help_shows_an_example_and_a_bad_flag_is_status_2(name):
    command = [sys.executable, "-m", f"olavlm.pipelines.{name}"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "example: olavlm-" in shown.stdout
    wrong = subprocess.run(
        [*command[:1], "-X", "importtime", *command[1:], "--no-such-flag"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    imported = {line.rpartition("|")[2].strip() for line in wrong.stderr.splitlines() if line.startswith("import time")}
    assert "argparse" in imported
    slow = {"torch", "transformers", "ray", "lmms_eval"} if name != "extract" else {"transformers", "ray"}
    assert not imported & slow  # a slip is answered at once
