"""benchmarks/train: every arm takes true steps, its counts are right, and docs/break-even.md is the results'."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from olavlm.student.data.targets import OnlineTargets, task_spec
from olavlm.student.recipes import load_recipe
from olavlm.student.stages import apply_stage
from olavlm.student.training.start import start_model

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "benchmarks" / "train"


@pytest.fixture(scope="module")
def tiny_steps(tmp_path_factory):
    """All benchmarks of training at tiny size; the folder that they wrote results and tables to."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(TRAIN / "README.md", folder)
    (folder / "work").mkdir()
    options = ["--size", "tiny", "--dir", folder / "work", "--name", "tiny", "--results", folder]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.train", *map(str, options)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return folder


@pytest.fixture
def steps_figures(tiny_steps, module):
    run = json.loads((tiny_steps / "results" / "tiny.json").read_text())
    return {name: module("figures").from_json(found) for name, found in run["figures"].items()}


def test_every_arm_takes_its_steps(steps_figures, module):
    sizes = module("train.sizes")
    plain, tokens, cached, online, one = sizes.ARMS
    assert list(steps_figures) == ["memory", "step", "data", "arithmetic"]
    steps, parts = steps_figures["step"]
    assert list(steps.seconds) == list(parts.values) == list(sizes.ARMS)
    assert all(len(s) == 1 and s[0] > 0 for s in steps.seconds.values())
    gflop = steps.gflop
    assert gflop[plain] < gflop[tokens] < gflop[cached] < gflop[online]
    assert gflop[one] == pytest.approx(gflop[online])  # the same teachers, the same images
    of_part = {arm: {part: value for part, (value,) in columns.items()} for arm, columns in parts.values.items()}
    for columns in of_part.values():
        assert sum(columns.values()) - columns["step"] == pytest.approx(columns["step"], abs=0.01)
        assert min(columns[part] for part in ("LLM forward", "encoder", "backward", "optimizer")) > 0
    assert of_part[plain]["targets"] == of_part[tokens]["embedding losses"] == 0
    assert min(of_part[cached][part] for part in ("targets", "predictors", "embedding losses")) > 0
    assert of_part[online]["targets"] > 10 * of_part[cached]["targets"]


def test_memory_and_flops_of_the_steps(steps_figures, module):
    cached = module("train.sizes").CACHED
    whole, losses = steps_figures["memory"]
    assert min(min(values) for values in whole.values[cached].values()) > 0
    ((both,), (added,), (over,)) = losses.values[cached].values()
    # Two images: gen 1 x 48, depth 576 x 32 and seg 576 x 64, two layers each in float32, targets in float16.
    assert both * 1e6 == 2 * (48 + 576 * 32 + 576 * 64) * (2 * 4 + 2)
    assert over == pytest.approx(added / both, abs=1e-3)
    (counted,) = steps_figures["arithmetic"]
    without, with_losses = (columns["TFLOP an image"][0] for columns in counted.values.values())
    assert 0 < without < with_losses


def test_the_meter_of_waits_moves(steps_figures, module):
    data = module("train.data")
    (figures,) = steps_figures["data"]
    waits = {name: columns[data.WAIT] for name, columns in figures.values.items()}
    assert list(waits) == [module("train.sizes").TOKENS, module("train.sizes").CACHED, data.SLOW]
    # The median: the first of the few steps kept may still find what was loaded ahead of it.
    assert median(waits[data.SLOW]) > max(waits[module("train.sizes").CACHED])
    assert median(figures.values[data.SLOW][data.SHARE]) > data.MOST


def test_training_renders_its_tables_and_leaves_nothing_else(tiny_steps, module):
    assert (tiny_steps / "README.md").read_text() == module("readme").rendered(tiny_steps)
    assert "## Results: tiny" in (tiny_steps / "README.md").read_text()
    assert list((tiny_steps / "work").iterdir()) == []


def test_teachers_one_image_at_a_time_give_the_same_targets(module, recipe, store32, tmp_path):
    images = module("extract.photographs").photographs(tmp_path / "images", 3)
    cpu = torch.device("cpu")
    settings = {"targets.source": "online", "targets.store": store32, "data.images": tmp_path / "images"}
    online = OnlineTargets(recipe(**settings), cpu)
    one = module("train.arms").one_at_a_time(online)
    batched, alone = (source.finish(source.load(images)[0], cpu) for source in (online, one))
    assert list(batched[0]) == list(alone[0])
    for name, targets in batched[0].items():
        torch.testing.assert_close(alone[0][name], targets, atol=1e-4, rtol=1e-4)
        assert alone[1][name].tolist() == [True] * 3


def test_the_shapes_are_the_papers(module, tmp_path):
    """The trainable parameters of Llama-3 with CLIP-L, as the published model has them; nothing is allocated."""
    base, size = module("train.base_models"), module("train.sizes").SIZES["paper"]
    shapes = module("extract.arithmetic").TEACHERS
    said = {
        "model.llm": base.write_llm(tmp_path / "llm", size.llm),
        "model.encoder": base.write_encoder(tmp_path / "encoder", size.encoder),
        "data.file": "none",
        "data.images": "none",
    }
    made = load_recipe(size.recipe, [f"--{key}={value}" for key, value in said.items()], "pt")
    specs = [task_spec(n, made.tasks[n], shapes[n].tokens, shapes[n].dim) for n in made.task_order]
    with base.random_weights("meta"), torch.device("meta"):
        model, _ = start_model(made, "pt", specs, [], True)
    rows = {row.part: (row.parameters, row.trainable) for row in apply_stage(model, "pt", distil=True)}
    assert rows["llm"] == (8_030_261_248, 0)
    assert rows["projector"] == (20_979_712,) * 2
    assert rows["task_tokens"] == (4_751_360,) * 2
    assert rows["predictors"] == (2 * (7_874_560 + 14_171_136 + 56_654_848),) * 2


def test_the_page_of_the_break_even_is_that_of_the_results(module):
    page = module("train.page")
    assert page.DOCUMENT.read_text() == page.render(module("train.facts").load())


def test_a_run_that_was_measured_stands_beside_the_gpu_that_is_computed(module):
    page, facts, sizes = module("train.page"), module("train.facts"), module("train.sizes")
    seconds = dict(zip(sizes.ARMS[1:], (0.100, 0.105, 0.115, 0.165), strict=True))
    run = facts.Run("my-gpu", "A GPU", True, "Llama", seconds, extraction=0.025, memory={sizes.CACHED: 9e3})
    text = page.render(dataclasses.replace(facts.load(), runs=[run]))
    assert "| A GPU, Llama (`my-gpu`) | 100 | 105 | 10 | 60 | 25 |" in text
    assert "| `my-gpu` | run 3 | run 1 |" in text  # 25 ms once, 10 or 60 ms a run
    assert "No run on a GPU is committed yet" not in text
