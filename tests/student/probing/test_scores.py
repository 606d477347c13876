"""Cosines of whole predictions, and their means over images with intervals, against values by hand."""

import numpy as np
import pytest
import torch

from olavlm.student.losses.scaled_features import ScaledFeatures
from olavlm.student.probing.scores import cosines, score


def test_a_cosine_is_of_the_whole_flattened_sample():
    predictions = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])
    targets = torch.tensor([[[4.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, -2.0]]])
    assert cosines(predictions, targets).tolist() == pytest.approx([24 / 25, 0.0])  # the mean over tokens would be 1
    assert cosines(predictions, -2 * predictions).tolist() == pytest.approx([-1.0, -1.0])
    scaled = ScaledFeatures(torch.tensor([[[4, 0], [0, 1]]], dtype=torch.int8), torch.tensor([[1.0, 3.0]]))
    assert cosines(predictions[:1], scaled).tolist() == pytest.approx([24 / 25])
    assert cosines(predictions[:1].bfloat16(), targets[:1].half()).tolist() == pytest.approx([24 / 25])


def test_scores_of_few_images_by_hand():
    spread, constant = score(np.array([[0.0, 1.0, np.nan, 0.5], [0.25, 0.25, 0.25, 0.25]]))
    assert (spread.mean, spread.images, spread.std) == (0.5, 3, pytest.approx(np.sqrt(1 / 6)))
    assert spread.quantiles == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert 0 <= spread.low < 0.5 < spread.high <= 1
    assert (constant.low, constant.mean, constant.high, constant.images) == (0.25, 0.25, 0.25, 3)
    (nothing,) = score(np.array([[np.nan, np.nan]]))
    assert nothing.images == 0
    assert np.isnan(nothing.mean)


def test_intervals_are_as_wide_as_the_normal_approximation_and_repeat_by_seed():
    values = np.random.default_rng(8).normal(0.4, 0.1, (2, 500))
    values[1] = values[0] - 0.05
    first, second = score(values, resamples=4000)
    assert first.mean == pytest.approx(values[0].mean())
    half = 1.96 * values[0].std() / np.sqrt(500)
    assert (first.high - first.low) / 2 == pytest.approx(half, rel=0.06)
    assert second.low == pytest.approx(first.low - 0.05), "all rows are drawn together"
    assert score(values, resamples=4000) == [first, second]
    (apart,) = score(values[:1], resamples=4000)
    assert (apart.low, apart.high) == pytest.approx((first.low, first.high)), "and rows scored apart are drawn alike"
    assert score(values, resamples=4000, seed=1)[0].low != first.low
    narrow, _ = score(values, resamples=4000, level=0.5)
    assert first.low < narrow.low < narrow.mean < narrow.high < first.high
