"""olavlm-report: faults are seen, pictures are true, the page asks for nothing, what is gone is said."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.cache import FeatureStore
from olavlm.pipelines.report import main
from olavlm.pipelines.reporting import predictions as predictions_module
from olavlm.pipelines.reporting.chart import Curve, chart, closing_mean, smooth
from olavlm.pipelines.reporting.features import _task_view
from olavlm.pipelines.reporting.page import number
from olavlm.pipelines.reporting.predictions import TaskView, cosine, predict
from olavlm.student.training.trainer import train

TERMS = [f"loss/{task}/{x}/{kind}" for task, x in (("depth", 2), ("seg", 3)) for kind in ("smooth_l1", "contrastive")]
RECIPE = """
model: {llm: some/llm, encoder: "<b>encoder</b>", order: [gen, depth, seg]}
data: {file: pt.json, images: images}
tasks: {depth: {layers: [2], weight: 0.5}, seg: {layers: [3], weight: 0.5}}
losses: {stages: [pt], contrastive: true, contrastive_weight: 0.3}
targets: {store: nowhere, source: cache}
train: {output_dir: runs/pt, batch_size: 4, accumulation: 2, epochs: 1, lr: 0.001, mixed_precision: bf16}
"""


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, steps=..., stage=..., **metrics) -> a run folder; a metric may be a function of the step."""

    def make(name="pt", steps=30, stage="pt", **metrics):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        values = {"loss/text": 2.0, "lr": 1e-3, "epoch": 0.5, "step_ms": 100.0, "data_wait_ms": 2.0}
        if stage == "pt":
            values |= dict.fromkeys(TERMS, 0.5) | {"valid/depth": 8, "valid/seg": 8, "scale/depth": 7.4}
        values |= {"loss/total": 3.0} | metrics
        with (folder / "metrics.jsonl").open("w") as f:
            for step in range(1, steps + 1):
                line = {k: v(step) if callable(v) else v for k, v in values.items()}
                f.write(json.dumps({"step": step, **{k: v for k, v in line.items() if v != "absent"}}) + "\n")
        (folder / "recipe.yaml").write_text(RECIPE)
        parts = [
            {"part": "llm", "parameters": 4000, "trainable": 0},
            {"part": "projector", "parameters": 9, "trainable": 9},
        ]
        (folder / "stage.json").write_text(json.dumps({"stage": stage, "processes": 2, "parts": parts}))
        (folder / "versions.json").write_text(json.dumps({"olavlm": "0.1.0", "torch": "9.9"}))
        (folder / "adapter.json").write_text("{}")
        return folder

    return make


class Page(HTMLParser):
    """A page whose tags close in order and whose attributes ask for nothing; `text`, `tags`, and text by class."""

    VOID = frozenset({"meta", "link", "img", "line", "path", "circle", "br"})

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.text, self.by_class = html, [], [], "", {}
        self.feed(html)
        assert not self.open, self.open
        for tag, attrs in self.tags:
            assert tag not in ("script", "iframe", "object", "video", "audio", "base", "form")
            for name in ("src", "href", "srcset", "data", "xlink:href", "action", "poster"):
                assert name not in attrs or attrs[name].startswith(("data:", "#")), (tag, attrs)
        assert not re.search(r"@import|url\(|https?://|//[a-z]", re.sub(r"base64,[^\"]*", "", html))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append((tag, attrs.get("class", "")))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag, (opened, tag)

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            return
        self.text += data
        for _, names in self.open:
            for name in names.split():
                self.by_class[name] = self.by_class.get(name, "") + data


@pytest.fixture
def report(tmp_path, capsys):
    """report(*words) -> the page that the command writes."""

    def write(*words):
        output = tmp_path / "out" / "report.html"
        assert main([*map(str, words), "--output", str(output)]) == 0
        assert str(output) in capsys.readouterr().out
        return Page(output.read_text())

    return write


def test_a_sound_run_shows_what_ran_and_flags_nothing(make_run, report):
    page = report(make_run(), "--samples", 0)
    assert "fault" not in page.by_class
    assert "mark" not in {attrs.get("class") for _, attrs in page.tags}
    for text in ("Pre-training (PT)", "some/llm", "<b>encoder</b>", "16 = 4 × 2 × 2", "bfloat16 autocast", "torch 9.9"):  # noqa: RUF001
        assert text in page.text
    assert "160" in page.by_class["tiles"]  # 16 samples in 100 ms
    assert "2.0 %" in page.by_class["tiles"]
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    titles = ["Total loss", "Text loss", "Learning rate", "Smooth-L1, depth", "Smooth-L1, seg", "Contrastive, depth"]
    titles += ["Contrastive, seg", "Factor on similarities, exp(s)", "Time a step", "Throughput"]
    assert [c.partition(":")[0] for c in charts] == titles
    assert "Smooth-L1, depth: layer 2 ends at 0.5" in charts
    assert "4,009" in page.text
    assert "llm: some/llm" in page.text  # the recipe itself


def test_a_page_has_no_request_and_a_policy_that_forbids_them(make_run, report):
    page = report(make_run(), "--samples", 0)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    with pytest.raises(AssertionError):
        Page(page.html.replace("</main>", '<img src="picture.png"></main>'))
    with pytest.raises(AssertionError):
        Page(page.html.replace("</main>", "</div></main>"))


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({TERMS[2]: 0.0}, "seg/3/smooth_l1 is exactly zero in 30 of 30 steps, first in step 1. Those batches had"),
        ({TERMS[1]: lambda s: 0.0 if s == 7 else 1.0}, "depth/2/contrastive is exactly zero in 1 of 30 steps, first"),
        ({TERMS[3]: 0.0, "valid/seg": 1}, "one valid target, and so no negatives"),
        ({TERMS[2]: 0.0, "valid/seg": 0}, "had no valid target"),
        ({"loss/text": lambda s: math.nan if s == 5 else 1.0}, "text is not finite in 1 of 30 steps, first in step 5."),
        ({"loss/total": lambda s: None if s > 28 else 1.0}, "total is not finite in 2 of 30 steps, first in step 29."),
        ({TERMS[0]: math.inf}, "loss/depth/2/smooth_l1 is not finite in 30 of 30 steps"),
    ],
)  # fmt: skip
def test_losses_that_are_zero_or_not_finite_are_flagged_and_marked(make_run, report, metrics, sentence):
    page = report(make_run(**metrics), "--samples", 0)
    assert sentence in page.by_class["fault"]
    assert "mark" in {attrs.get("class") for _, attrs in page.tags}


def test_losses_that_were_not_logged_an_unfinished_run_and_a_cut_line_are_flagged(make_run, report, capsys):
    folder = make_run(**dict.fromkeys(TERMS[2:], "absent"), bad_images=lambda s: int(s < 3))
    (folder / "adapter.json").unlink()
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 31, "loss/te')
    faults = report(folder, "--samples", 0).by_class["fault"]
    assert "The recipe distils seg at layer 3, but no such loss was logged." in faults
    assert "distils depth" not in faults
    assert "not finished: its last logged step is 30" in faults
    assert "1 line damaged or cut short" in faults
    assert "2 samples with an image that could not be read" in faults


def test_a_run_without_a_step_or_its_side_files_still_has_a_page(make_run, report):
    folder = make_run(steps=0)
    for name in ("recipe.yaml", "stage.json", "versions.json", "adapter.json"):
        (folder / name).unlink()
    page = report(folder)
    assert "No step was logged." in page.by_class["fault"]
    assert "recipe.yaml is missing" in page.text
    assert "stage.json is missing" in page.text


def test_what_is_no_run_is_one_line_and_status_1(make_run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for words in (["nowhere"], [str(empty)], [str(make_run()), "--output", str(empty)]):
        assert main([*words, "--samples", "0"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("olavlm-report: error: ")
        assert error.count("\n") == 1
    for words in ([], ["a", "--samples", "-1"], ["a", "--samples", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


def test_several_runs_are_compared_by_stage_and_written_where_they_meet(make_run, tmp_path, capsys):
    runs = [make_run("a/pt"), make_run("b/pt", **{"loss/text": 1.5}), make_run("b/ift", stage="ift")]
    assert main([*map(str, runs), "--samples", "0"]) == 0
    page = Page((tmp_path / "runs" / "report.html").read_text())
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    assert "Text loss, pt: a/pt ends at 2; b/pt ends at 1.5" in charts
    assert not any(c.startswith("Text loss, ift") for c in charts)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    anchors = ["#" + attrs["id"] for tag, attrs in page.tags if tag == "section" and "id" in attrs]
    assert links == anchors
    assert len(links) == 3


def test_answers_are_shown_with_their_photographs(make_run, report, tmp_path):
    folder = make_run(stage="ift")
    Image.new("RGB", (30, 20)).save(folder / "own.png")
    (tmp_path / "images").mkdir()  # the recipe's root, beside the runs
    Image.new("RGB", (31, 20)).save(tmp_path / "images" / "rooted.png")
    images = ["own.png", "rooted.png", "gone.png", None]
    answers = [{"image": i, "prompt": f"What is {i}?", "answer": "<script>no</script>"} for i in images]
    (folder / "answers.json").write_text(json.dumps(answers))
    page = report(folder)
    assert page.by_class["answers"].count("<script>no</script>") == 4
    assert [a["alt"] for t, a in page.tags if t == "img"] == ["own.png", "rooted.png"]
    assert "gone.png: not found" in page.by_class["empty"]
    assert "text only" in page.by_class["empty"]
    (folder / "answers.json").write_text('{"image": 1}')
    assert "answers.json is not a list" in report(folder).text


def points(html, name="line"):
    path = re.search(rf'class="{name} c0" d="([^"]*)"', html)[1]
    return [tuple(map(float, p.split())) for p in re.split("[ML]", path)[1:]]


def test_a_short_curve_is_drawn_where_its_values_are():
    html = chart("Loss", [Curve("x", [1, 2, 3, 4, 5], [4.0, 3.0, math.nan, 1.0, 0.0])], mark_zeros=True)
    drawn = points(html)
    assert len(drawn) == 4
    x, y = np.array(drawn).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.75, 1], atol=1e-3)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), [0, 0.25, 0.75, 1], atol=2e-3)
    assert y[0] < y[-1]  # large values are high up
    assert html.count('class="mark"') == 2
    assert html.count("<circle") == 4


def test_a_log_axis_gives_equal_ratios_equal_distances():
    y = np.array(points(chart("Time", [Curve("x", [1, 2, 3], [10, 100, 1000])], log=True)))[:, 1]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.15)


def test_a_long_curve_keeps_its_shape_and_its_spikes_in_a_page_of_bounded_size():
    x = np.arange(1, 100_001)
    values = 5 - x / 50_000
    values[40_000] = 9.0
    html = chart("Loss", [Curve("x", x, values)])
    assert len(html) < 40_000
    assert "1 value beyond the frame" in html
    y = np.array(points(html))[:, 1]
    assert (np.diff(y) > -1).all()
    assert y[-1] - y[0] > 100


def test_smoothing_keeps_constants_leaves_gaps_out_and_averages_noise():
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3)
    values = np.full(50, 3.0)
    values[20] = np.nan
    np.testing.assert_allclose(smooth(values), 3)
    assert np.isnan(smooth(np.full(20, np.nan))).all()
    noise = np.random.default_rng(0).standard_normal(500)
    assert smooth(noise, 10).std() < 0.3 * noise.std()
    assert len(smooth(np.arange(4.0), 100)) == 4


def test_numbers_are_short_and_say_what_is_not_one():
    shown = {1234567: "1,234,567", 0.00012345: "0.0001234", 12345.6: "12,346", 2.0: "2", math.inf: "inf"}
    assert [number(v) for v in shown] == list(shown.values())
    assert closing_mean([9.0] * 38 + [1.0, 2.0]) == (1.5, 2)
    assert closing_mean([4.0]) == (4.0, 1)
    assert math.isnan(closing_mean([1.0, math.nan])[0])


def decoded(html):
    """The inline pictures of a fragment."""
    return [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r"base64,([^\"]*)", html)]


def test_predictions_have_the_colours_of_the_targets_basis():
    target = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    layers = {2: target.copy(), 4: 0.2 * target, 6: -target}  # in bases of their own the first two look the same
    view = TaskView("depth", 12, (3, 4), target, "", layers, {x: (cosine(p, target), 0.1) for x, p in layers.items()})
    html = _task_view(view)
    first, same, pale, other = (np.asarray(p.convert("RGB")).astype(int) for p in decoded(html))
    assert first.shape == (3, 4, 3)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    assert np.ptp(pale[..., 0]) < 0.4 * np.ptp(first[..., 0])
    assert "<b>1.00</b> (0.10)" in html
    assert "<b>-1.00</b>" in html


def test_a_sample_without_target_or_with_a_broken_prediction_says_so():
    html = _task_view(TaskView("seg", 12, (3, 4), None, "quarantined: truncated", {}, {}))
    assert "quarantined: truncated" in html
    assert not decoded(html)
    target = np.ones((1, 5), np.float32)
    view = TaskView("gen", 1, (1, 1), target, "", {3: target * np.nan}, {3: (math.nan, None)})
    html = _task_view(view)
    assert "not finite" in html
    assert len(decoded(html)) == 1
    assert "did not reach" in _task_view(TaskView("gen", 1, (1, 1), target, "", {}, {}))


def test_a_trained_run_shows_its_own_predictions_until_the_store_is_gone(recipe, report, monkeypatch):
    made = recipe(**{"train.max_steps": 1})
    folder = train(made, "pt", {"test": "1"})
    samples = predict(folder, num_samples=3)
    assert len({s.image for s in samples}) == 3
    store = FeatureStore(made.targets.store)
    for sample in samples:
        assert [t.name for t in sample.tasks] == ["gen", "depth", "seg"]
        assert sample.photograph.mode == "RGB"
        for task in sample.tasks:
            np.testing.assert_array_equal(task.target, store[task.name][sample.image])
            assert task.grid == tuple(store[task.name].card["grid"])
            for layer in made.tasks[task.name].layers:
                prediction = task.predictions[layer]
                flat = [torch.from_numpy(a.reshape(-1)).double() for a in (prediction, task.target)]
                expected = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
                others = [cosine(prediction, store[task.name][s.image]) for s in samples if s is not sample]
                assert task.cosines[layer] == pytest.approx((expected, np.mean(others)))
    alone = {s.image: s for s in predict(folder, num_samples=1)}  # the same sample in a batch of its own
    for image, sample in alone.items():
        twin = next(s for s in samples if s.image == image)
        for task, other in zip(sample.tasks, twin.tasks, strict=True):
            assert {others for _, others in task.cosines.values()} == {None}
            for layer, prediction in task.predictions.items():
                np.testing.assert_allclose(prediction, other.predictions[layer], atol=1e-4)

    page = report(folder, "--samples", 2)
    alts = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert len(alts) == 2 * (1 + 3 * 3)
    assert "No pictures" not in page.text
    assert "No pictures" in report(folder, "--store", "nowhere").text
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "adapter.safetensors").write_bytes(b"cut")
    gone = report(folder).text
    assert "No pictures" in gone
    assert "damaged" in gone
    monkeypatch.setattr(predictions_module, "open_targets", lambda *a: pytest.fail("--samples 0 loads nothing"))
    assert "Targets and predictions" not in report(folder, "--samples", 0).text
