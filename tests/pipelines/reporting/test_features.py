"""Pictures of features are true: a prediction in its target's colours, and what a trained run predicts."""

import base64
import io
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.cache import FeatureStore
from olavlm.pipelines.reporting import predictions as predictions_module
from olavlm.pipelines.reporting.features import _task_view
from olavlm.pipelines.reporting.predictions import TaskView, predict
from olavlm.student.training.pictures import cosine
from olavlm.student.training.trainer import train


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


def test_a_trained_run_shows_its_own_predictions_until_the_store_is_gone(recipe, store32, report, tiny, monkeypatch):
    made = recipe(**{"train.max_steps": 1, "targets.store": store32})
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
    decoded = report(folder, "--samples", 1, "--decode", f"depth={tiny['depth']}")
    alts = [attrs["alt"] for tag, attrs in decoded.tags if tag == "img"]
    layers = made.tasks["depth"].layers
    expected = [f"depth, {name}, decoded" for name in ("target", *(f"layer {layer}" for layer in layers))]
    assert [alt for alt in alts if alt.endswith("decoded")] == expected
    assert "the teacher's own decoder" in decoded.text
    undecoded = report(folder, "--samples", 1, "--decode", f"depth={tiny['seg']}")
    assert "Not decoded: " in undecoded.text
    assert "depth, target: tokens as colours" in {attrs.get("alt") for _, attrs in undecoded.tags}
    assert "No pictures" in report(folder, "--store", "nowhere").text
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "adapter.safetensors").write_bytes(b"cut")
    gone = report(folder).text
    assert "No pictures" in gone
    assert "damaged" in gone
    monkeypatch.setattr(predictions_module, "open_targets", lambda *a: pytest.fail("--samples 0 loads nothing"))
    assert "Targets and predictions" not in report(folder, "--samples", 0).text
