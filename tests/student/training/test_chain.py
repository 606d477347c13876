"""Stages in a row: PT, VPT and IFT from one recipe, skipped when finished, resumed when stopped."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from olavlm.pipelines import train as command
from olavlm.student import load_checkpoint
from olavlm.student.errors import RecipeError, TrainingError
from olavlm.student.recipes import load_chain
from olavlm.student.training import chain as chain_module
from olavlm.student.training.chain import check_chain, is_finished, train_chain
from olavlm.student.training.metrics import read_metrics

STAGES = ("pt", "vpt", "ift")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def recipe_file(folder, tiny, pt_json, ift_json, small_targets, sample_images):
    """One recipe for all three stages, of two steps each."""
    content = {
        "base": "tiny",
        "model": {"llm": str(tiny["llm"]), "encoder": str(tiny["encoder"])},
        "data": {"images": str(sample_images), "workers": 0},
        "targets": {"store": str(small_targets)},
        "train": {"output_dir": str(folder / "run"), "stages": list(STAGES), "max_steps": 2},
        "stages": {
            "pt": {"data": {"file": str(pt_json)}},
            "vpt": {"data": {"file": str(pt_json)}},
            "ift": {"data": {"file": str(ift_json)}},
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "r.yaml")


@pytest.fixture(scope="module")
def finished(recipe_file, folder):
    """The run folders of the whole chain."""
    assert command.main(["all", "--config", recipe_file]) == 0
    return {stage: folder / "run" / stage for stage in STAGES}


def test_each_stage_starts_from_the_one_before_and_trains_its_parts(finished):
    weights = {
        stage: load_file(run / ("adapter.safetensors" if stage == "pt" else "model.safetensors"))
        for stage, run in finished.items()
    }
    for stage, run in finished.items():
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
        record = json.loads((run / "stage.json").read_text())
        assert (record["stage"], record["finished"]) == (stage, 2)
        trained = {row["part"] for row in record["parts"] if row["trainable"]}
        expected = {"projector", "task_tokens", "predictors", "logit_scales"} if stage == "pt" else {"projector", "llm"}
        assert trained == expected
        resolved = yaml.safe_load((run / "recipe.yaml").read_text())
        before = {"vpt": "pt", "ift": "vpt"}.get(stage)
        assert resolved["init"]["from"] == (before and str(finished[before]))
    assert any(name.startswith("predictors.") for name in weights["pt"])
    assert not any(name.startswith(("predictors.", "logit_scales.")) for name in weights["vpt"])
    for name, value in weights["vpt"].items():
        later = weights["ift"][name]
        if name.startswith(("vision.", "task_tokens.")):
            assert (value == later).all(), name
        elif name.startswith("projector."):
            assert (value != later).any(), name
            assert (value != weights["pt"][name]).any(), name
    for name in weights["pt"]:
        if name.startswith("task_tokens."):
            assert (weights["pt"][name] == weights["ift"][name]).all()


def test_vpt_and_ift_see_the_padded_picture(finished):
    assert [load_checkpoint(run)[0].config.geometry for run in finished.values()] == ["square", "pad", "pad"]


def test_a_finished_stage_is_skipped_and_an_unfinished_one_goes_on(finished, recipe_file, monkeypatch, capsys):
    before = {stage: (run / "metrics.jsonl").stat().st_mtime_ns for stage, run in finished.items()}
    ran = []
    monkeypatch.setattr(chain_module, "train", lambda recipe, stage, *_, more: ran.append(stage))
    recipes = load_chain(recipe_file, [])
    assert train_chain(recipes, {}) == finished["ift"]
    assert ran == []
    out = capsys.readouterr().out
    assert [f"stage {n}/3: {stage} is finished: {run}" for n, (stage, run) in enumerate(finished.items(), 1)] == (
        out.splitlines()
    )
    assert {stage: (run / "metrics.jsonl").stat().st_mtime_ns for stage, run in finished.items()} == before
    train_chain(load_chain(recipe_file, ["--stages.ift.train.max_steps=3"]), {})
    assert ran == ["ift"]
    train_chain(load_chain(recipe_file, ["--stages.ift.train.max_steps=1"]), {})
    assert ran == ["ift"] * 2, "which is told there that the folder holds more"
    record = finished["vpt"] / "stage.json"
    whole = record.read_text()
    record.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "finished"}))
    assert not is_finished(recipes["vpt"], "vpt"), "as when it was stopped while it wrote its result"
    for damaged in (whole[:10], "5", '{"finished": [2]}', ""):
        record.write_text(damaged)
        assert not is_finished(recipes["vpt"], "vpt")
    record.write_text(whole)
    assert is_finished(recipes["vpt"], "vpt")


def test_a_signal_in_a_stages_last_step_finishes_it_and_leaves_the_next(finished, recipe_file, tmp_path):
    recipes = load_chain(recipe_file, [f"--train.output_dir={tmp_path}/{{stage}}"])

    def signal_at_the_end(step: int, total: int, values: dict[str, float]) -> None:
        if step == total:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingError, match="stopped by SIGTERM after pt; run the same command again"):
        train_chain(recipes, {}, signal_at_the_end)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pt"]
    assert is_finished(recipes["pt"], "pt")
    assert (tmp_path / "pt" / "adapter.safetensors").read_bytes() == (
        finished["pt"] / "adapter.safetensors"
    ).read_bytes()


def test_another_recipe_is_refused(finished, recipe_file):
    with pytest.raises(TrainingError, match="another recipe"):
        train_chain(load_chain(recipe_file, ["--train.lr=0.5"]), {})


def test_stages_that_cannot_share_are_refused(recipe_file):
    with pytest.raises(RecipeError, match=r"train\.mixed_precision is .*: stages of one command share it"):
        check_chain(load_chain(recipe_file, ["--stages.ift.train.mixed_precision=bf16"]))
    with pytest.raises(RecipeError, match=r"for several stages; put \{stage\} into it"):
        check_chain(load_chain(recipe_file, [f"--stages.{stage}.train.output_dir=same" for stage in ("pt", "ift")]))


def test_two_processes_run_the_whole_chain(recipe_file, finished, folder):
    """Under torchrun, with the global batch of one process: the same losses."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "olavlm.pipelines.train"]
    words = ["all", "--config", recipe_file, "--train.batch_size", "2", "--train.output_dir", str(folder / "two")]
    done = subprocess.run(
        [*launch, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stage 3/3: ift") == 1
    for stage, run in finished.items():
        one, two = (read_metrics(f / "metrics.jsonl") for f in (run, folder / "two" / stage))
        for a, b in zip(one, two, strict=True):
            assert b["loss/total"] == pytest.approx(a["loss/total"], rel=1e-4)
