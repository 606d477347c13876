"""Intervals and tests: against values by hand, exact distributions, and draws of single items."""

from math import comb

import numpy as np
import pytest

from olavlm.pipelines.evaluation import statistics
from olavlm.pipelines.evaluation.statistics import Resampling, bootstrap, mcnemar, sign_flip


def binomial_quantile(n, p, part):
    below = 0.0
    for k in range(n + 1):
        below += comb(n, k) * p**k * (1 - p) ** (n - k)
        if below >= part:
            return k
    return n


def test_the_interval_of_an_accuracy_is_that_of_a_binomial():
    right = np.repeat([1.0, 0.0], [60, 40])
    found = bootstrap(right, ["all"] * 100, {"accuracy": np.full(100, 0.01)}, Resampling(100_000))["accuracy"]
    assert found.value == pytest.approx(0.6)
    assert (binomial_quantile(100, 0.6, 0.025), binomial_quantile(100, 0.6, 0.975)) == (50, 69)
    assert (found.low, found.high) == pytest.approx((0.50, 0.69), abs=0.0101)  # the next value of 100 items


def test_scores_of_any_value_are_drawn_as_items_are():
    random = np.random.default_rng(5)
    scores, strata = random.choice([0, 0.3, 0.6, 0.9, 1], 300), random.choice(["a", "b"], 300)
    groups = [np.flatnonzero(strata == s) for s in ("a", "b")]
    weights = np.zeros(300)
    for group in groups:
        weights[group] = 0.5 / len(group)
    found = bootstrap(scores, strata.tolist(), {"mean of means": weights})["mean of means"]
    means = [scores[random.choice(group, (10_000, len(group)))].mean(axis=1) for group in groups]
    low, high = np.quantile((means[0] + means[1]) / 2, [0.025, 0.975])
    assert found.value == pytest.approx((scores[groups[0]].mean() + scores[groups[1]].mean()) / 2)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)  # widths are about 0.08


def test_strata_keep_their_sizes():
    scores, weights = np.repeat([1.0, 0.0], 50), {"accuracy": np.full(100, 0.01)}
    within = bootstrap(scores, ["right"] * 50 + ["wrong"] * 50, weights)["accuracy"]
    across = bootstrap(scores, ["all"] * 100, weights)["accuracy"]
    assert tuple(within) == (0.5, 0.5, 0.5)
    assert (across.low, across.high) == pytest.approx((0.40, 0.60), abs=0.0101)


def test_order_and_memory_do_not_show_and_the_seed_does(monkeypatch):
    random = np.random.default_rng(0)
    scores, strata = random.random(40), np.repeat(["b", "a"], [10, 30])
    weights = {"mean": np.full(40, 1 / 40)}
    first = bootstrap(scores, strata.tolist(), weights, Resampling(500))["mean"]
    order = random.permutation(40)
    assert bootstrap(scores[order], strata[order].tolist(), weights, Resampling(500))["mean"] == pytest.approx(first)
    monkeypatch.setattr(statistics, "_AT_ONCE", 64)  # two resamples of 30 values
    assert bootstrap(scores, strata.tolist(), weights, Resampling(500))["mean"] == first
    assert bootstrap(scores, strata.tolist(), weights, Resampling(500, seed=1))["mean"].low != first.low


def test_a_wider_level_is_wider():
    scores, weights = np.repeat([1.0, 0.0], [30, 20]), {"mean": np.full(50, 0.02)}
    narrow, wide = (bootstrap(scores, ["all"] * 50, weights, Resampling(level=x))["mean"] for x in (0.5, 0.99))
    assert wide.low < narrow.low < 0.6 < narrow.high < wide.high


def test_weights_that_differ_within_a_stratum_are_refused():
    with pytest.raises(ValueError, match="the weights of mean differ within the stratum 'all'"):
        bootstrap(np.ones(2), ["all"] * 2, {"mean": np.array([0.4, 0.6])})


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1),
        (3, 3, 1),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (9, 1, 2 * (1 + 10) / 1024),
        (7, 12, 2 * sum(comb(19, k) for k in range(8)) / 2**19),
    ],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_items_is_near_the_normal_approximation():
    from statistics import NormalDist

    z = (1400 - 1238 - 1) / (1400 + 1238) ** 0.5  # with the correction for continuity
    assert mcnemar(1400, 1238) == pytest.approx(2 * NormalDist().cdf(-z), rel=0.01)


def test_sign_flips_by_hand():
    thirds = np.full(3, 1 / 3)
    # of the 8 ways to give 0.3, 0.3 and 0.6 a sign, 2 reach 1.2
    assert sign_flip(np.array([0.3, 0.3, 0.6]), thirds) == pytest.approx(2 / 8, abs=0.02)
    # of the 4 ways to give 0.09 and 0.09 a sign, 2 reach 0.18
    assert sign_flip(np.array([0.1, 0.9]), np.array([0.9, 0.1])) == pytest.approx(2 / 4, abs=0.02)
    assert sign_flip(np.array([0.3, -0.3, 0.0]), thirds) == 1
    assert sign_flip(np.zeros(3), thirds) == 1
    assert sign_flip(np.full(40, 0.3), np.full(40, 1 / 40)) == pytest.approx(1 / 10_001)
