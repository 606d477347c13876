"""Cached targets: what the store holds, in whatever storage dtype, reaches the losses."""

import numpy as np
import pytest
import torch

from olavlm.cache import FeatureStore, convert
from olavlm.student.metrics import read_metrics
from olavlm.student.targets import CachedTargets
from olavlm.student.trainer import train


@pytest.fixture(scope="module", params=["float16", "int8", "int4"])
def small_store(request, store32, tmp_path_factory):
    """The shared store in another storage dtype."""
    target = tmp_path_factory.mktemp(request.param) / "features"
    convert(str(store32), str(target), dtype=request.param)
    return target


def test_a_batch_with_and_without_images(recipe, small_store):
    source = CachedTargets(recipe(**{"targets.store": small_store}))
    store = FeatureStore(small_store)
    images = [store.rows.image_of(7), None, store.rows.image_of(2)]
    loaded = source.load(images)
    targets, valid = source.finish(loaded, torch.device("cpu"))
    for name in ("gen", "depth", "seg"):
        assert valid[name].tolist() == [True, False, True]
        for at, row in ((0, 7), (2, 2)):
            np.testing.assert_allclose(targets[name][at].float().numpy(), store[name][row], rtol=1e-6)
        assert not targets[name][1].any()
        if store[name].layout.dtype == "int8":  # it crosses to the device as it is stored
            assert loaded[name][0]["features"].dtype == np.int8


def test_losses_stay_near_those_of_exact_targets(recipe, small_store, tmp_path):
    def losses(name: str, **options) -> list[dict]:
        folder = train(recipe(**{"train.max_steps": 2, "train.output_dir": tmp_path / name, **options}), "pt", {})
        return [
            {k: v for k, v in step.items() if k.startswith("loss/")} for step in read_metrics(folder / "metrics.jsonl")
        ]

    exact, close = losses("exact"), losses("close", **{"targets.store": small_store})
    within = {"float16": 1e-3, "int8": 1e-2, "int4": 0.1}[FeatureStore(small_store)["depth"].layout.dtype]
    for ours, theirs in zip(close, exact, strict=True):
        assert ours.keys() == theirs.keys()
        assert len([k for k in ours if "smooth_l1" in k]) >= 3
        assert ours == pytest.approx(theirs, rel=within)
    assert close != exact  # the control: they are other targets
