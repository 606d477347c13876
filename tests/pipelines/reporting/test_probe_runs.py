"""Runs of probes and their scores: layers that can be told apart, intervals, models side by side."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from olavlm.pipelines.probe_results import Scored, write_results
from olavlm.pipelines.report import main
from olavlm.pipelines.reporting.probe_scores import joined, read_scores

ASKED = {"data": ["val.json"], "images": ["images"], "store": "val-store", "resamples": 50, "seed": 0, "level": 0.9}


@pytest.fixture
def probe_run(tmp_path):
    """probe_run(name, layers, steps) -> a finished run of probes of depth, best in the middle layer, and gen."""

    def make(name="probes", layers=32, steps=40, asked=None):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                loss = {("depth", x): (1 + abs(x - layers // 2)) / step for x in range(1, layers + 1)}
                loss |= {("gen", x): 5.0 for x in range(1, layers + 1)}
                line = {"step": step, "loss/total": sum(loss.values()), "lr": 1e-3, "epoch": 1, "step_ms": 500.0}
                line |= {f"loss/{t}/{x}/smooth_l1": value for (t, x), value in loss.items()}
                line |= {f"cosine/{t}/{x}": 1 - value / layers for (t, x), value in loss.items()}
                file.write(json.dumps(line) + "\n")
        probe = {"model": "runs/<ift>", "output": name,
                 "data": {"files": ["a.json"], "images": ["images"], "store": "targets"},
                 "tasks": {"gen": "gen", "depth": "depth-last"}, "layers": list(range(1, (asked or layers) + 1)),
                 "batch_size": 64, "epochs": 2.0, "lr": 1e-3, "mixed_precision": "bf16", "seed": 3}  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"probe": probe}))
        (folder / "probes.json").write_text("{}")
        return folder

    return make


def labels(page):
    return [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]


def test_many_layers_are_drawn_over_layers_and_each_over_steps(probe_run, report):
    folder = probe_run()
    page = report(folder)
    assert "fault" not in page.by_class
    for text in ("runs/<ift>", "1-32", "targets depth-last", "bfloat16 autocast", "Probes in training"):
        assert text in page.text
    assert "128" in page.by_class["tiles"]  # 64 images in half a second
    assert "Text loss" not in page.text
    (depth,) = (label for label in labels(page) if label.startswith("Smooth-L1, depth: at the end"))
    highest, lowest = (f"{(loss / 39 + loss / 40) / 2:.4g}" for loss in (17, 1))  # the last twentieth of 40 steps
    assert f"at the end is highest at layer 32 with {highest}, lowest at layer 16 with {lowest};" in depth
    small = [label for label in labels(page) if label.startswith("Cosine with the target, gen, layer ")]
    assert len(small) == 32
    assert len(page.html) < 200_000
    (folder / "probes.json").unlink()
    assert "not finished: its last logged step is 40" in report(folder).by_class["fault"]


def test_few_layers_are_drawn_over_steps_and_missing_ones_flagged(probe_run, report):
    page = report(probe_run(layers=4, asked=6))
    assert "Smooth-L1, depth: layer 1 ends at 0.05064; layer 2" in "".join(labels(page))
    assert "multiples" not in page.by_class
    assert "Probes of gen at layer 5-6 were asked for, but no such loss was logged." in page.by_class["fault"]


def scored(name, folder, layers, seen=0, tasks=("depth", "gen")):
    """Of 20 images; depth is 0.5 + 0.01 layer on average, gen 0.2 everywhere."""
    spread = np.linspace(-0.1, 0.1, 20)
    values = {t: {x: (0.5 + 0.01 * x if t == "depth" else 0.2) + spread for x in layers} for t in tasks}
    teachers = {t: SimpleNamespace(key=t, fingerprint="f") for t in tasks}
    cosines = SimpleNamespace(
        run=SimpleNamespace(model="m", layout={}, teachers=teachers), images=[f"{i}.jpg" for i in range(20)],
        values=values, unreadable=0, quarantined=dict.fromkeys(tasks, 0) | {"gen": 2}, seen=seen,
    )  # fmt: skip
    return Scored.of(name, folder, cosines, resamples=50, seed=0, level=0.9)


def test_scores_of_several_models_stand_side_by_side(probe_run, report, tmp_path):
    runs = probe_run("a", layers=2), probe_run("b", layers=2)
    models = [scored("a", runs[0], [1, 2, 4], seen=3, tasks=("gen",)), scored("b", runs[1], [1, 2])]
    write_results(models, tmp_path / "eval", ASKED, {})
    page = report(*runs, tmp_path / "eval")
    depth, gen = (next(label for label in labels(page) if label.startswith(f"{task}: ")) for task in ("depth", "gen"))
    assert depth == "depth: b is highest at layer 2 with 0.52, lowest at layer 1 with 0.51"
    assert [part.split()[0] for part in gen.removeprefix("gen: ").split("; ")] == ["a", "b"]
    figures = page.html.split('<figure class="chart">')
    (drawn,) = (figure for figure in figures if f'aria-label="{depth}' in figure)
    assert 'class="band s1"' in drawn
    assert 'class="band s0"' not in drawn  # b has its colour where a is not
    score = models[1].means["depth"]
    assert f"{score.mean:.4f} [{score.low:.4f}, {score.high:.4f}]" in page.text
    assert "90 % bootstrap intervals" in page.text
    assert "a: 3 of 20 images were in its training" in page.by_class["fault"]
    assert "b: of 20 images 2 have no target of gen, and are left out." in page.text
    assert labels(report(tmp_path / "eval")) == [gen, depth]


def test_scores_in_run_folders_are_found_and_joined(probe_run, report, tmp_path):
    runs = [probe_run(f"{name}/probes", layers=2) for name in ("one", "two")]
    for run in runs:
        write_results([scored("probes", run, [1, 2])], run / "eval", ASKED, {})
    other = ASKED | {"data": ["other.json"]}
    write_results([scored("probes", runs[0], [1])], tmp_path / "other", other, {})
    first, second = joined(
        read_scores(f / "scores.json") for f in (runs[0] / "eval", runs[0] / "eval", tmp_path / "other")
    )
    assert [len(first.models), len(second.models)] == [1, 1]
    page = report(*runs)
    (depth,) = (label for label in labels(page) if label.startswith("depth: "))
    assert depth.startswith("depth: one/probes is highest at layer 2 with 0.52,")
    assert "; two/probes is" in depth
    assert "Probe scores on other.json" in report(*runs, tmp_path / "other").text


@pytest.mark.parametrize("damage", ["cut", "format", "nan"])
def test_damaged_scores_are_one_line_and_status_1(tmp_path, capsys, damage):
    write_results([scored("a", tmp_path, [1])], tmp_path, ASKED, {})
    file = tmp_path / "scores.json"
    assert main([str(tmp_path)]) == 0
    content = json.loads(file.read_text())
    if damage == "nan":
        content["models"][0]["tasks"]["gen"]["layers"]["1"]["low"] = math.nan
    content["format"] = 2 if damage == "format" else 1
    file.write_text(json.dumps(content)[: 100 if damage == "cut" else None])
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("olavlm-report: error: ")
    assert "holds no scores" in error
    assert error.count("\n") == 1


def test_what_is_damaged_in_a_run_leaves_the_rest_of_its_report(probe_run, report, tmp_path):
    run = probe_run("run", layers=2)
    (run / "eval").mkdir()
    (run / "eval" / "scores.json").write_text("{")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for odd in ({**recipe["probe"], "data": 3}, {k: v for k, v in recipe["probe"].items() if k != "output"}):
        (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "probe": odd}))
        page = report(run, "--samples", 1)
        assert "eval/scores.json holds no scores" in page.text
        assert "No pictures: recipe.yaml does not say what the probes were trained on" in page.text


def test_the_pace_shows_what_was_clocked(make_run, report):
    plain = labels(report(make_run("plain"), "--samples", 0))
    assert any(label.startswith("Time a step: step ends at 100; of which waiting") for label in plain)
    assert not any("copying" in label or "loaders" in label for label in plain)
    clocked = make_run("clocked", h2d_ms=3.0, load_images_ms=70.0, load_encoder_features_ms=5.0)
    page = labels(report(clocked, "--samples", 0))
    assert any("copying to the device ends at 3" in label for label in page)
    assert "Work of the loaders for a step: images ends at 70; encoder features ends at 5" in page
