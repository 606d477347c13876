"""How much of a figure, or of the difference of two models on the same items, is chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1 << 22
"""Counts held in memory, int64."""


@dataclass(frozen=True)
class Resampling:
    """How intervals and permutation tests are drawn."""

    resamples: int = 10_000
    level: float = 0.95
    """The part of the resamples whose figure lies within the interval."""
    seed: int = 0


DEFAULT = Resampling()


class Interval(NamedTuple):
    """A figure, and the percentile interval of its bootstrap."""

    value: float
    low: float
    high: float


def bootstrap(
    scores: np.ndarray,
    strata: Sequence[str],
    figures: Mapping[str, np.ndarray],
    how: Resampling = DEFAULT,
) -> dict[str, Interval]:
    """Weighted sums of scores with percentile intervals, by a bootstrap within strata (Efron and Tibshirani, 1993).

    In each resample as many items as a stratum has are drawn from it with replacement, and all figures are computed
    from the same draw. Drawn is how often each distinct score comes up, which is multinomial and comes to the same as
    drawing items. Neither the order of items nor that of strata shows. Differences of paired scores are scores too.

    Scores that are all alike, and strata of one item, have intervals of no width, which is not certainty.

    Args:
        scores: float64 [items].
        strata: of each item.
        figures: weights, float64 [items], equal within a stratum.

    Raises:
        ValueError: weights that differ within a stratum.
    """
    of = np.asarray(strata, dtype=object)
    draws = {name: np.zeros(how.resamples) for name in figures}
    random = np.random.default_rng(how.seed)
    for stratum in sorted(set(strata)):
        members = np.flatnonzero(of == stratum)
        means = _resampled_means(scores[members], how.resamples, random)
        for name, weights in figures.items():
            if np.ptp(weights[members]) > 1e-12:
                raise ValueError(f"the weights of {name} differ within the stratum {stratum!r}; split it")
            draws[name] += weights[members].sum() * means
    tails = [(1 - how.level) / 2, (1 + how.level) / 2]
    return {
        name: Interval(math.fsum(weights * scores), *(float(x) for x in np.quantile(draws[name], tails)))
        for name, weights in figures.items()
    }


def _resampled_means(scores: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """float64 [resamples]."""
    values, counts = np.unique(scores.round(12), return_counts=True)
    rows = max(1, _AT_ONCE // len(values))
    sizes = [min(rows, resamples - begin) for begin in range(0, resamples, rows)]
    drawn = (random.multinomial(len(scores), counts / len(scores), size=size) for size in sizes)
    return np.concatenate([counted @ values for counted in drawn]) / len(scores)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: how likely is it that chance alone splits the items that only one of two models
    has right as unevenly, or more, if either is right as often (McNemar, 1947; binomial with 1/2).

    Args:
        only_first: items that the first model has right and the second wrong.
        only_second: the other way round.

    Returns:
        The p value; 1 if there are no such items.
    """
    total, term, tail = only_first + only_second, 1, 0
    for k in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)  # integers of any size, whose ratio Python rounds once


def sign_flip(differences: np.ndarray, weights: np.ndarray, how: Resampling = DEFAULT) -> float:
    """The paired permutation test for scores that are not only right or wrong: under the hypothesis that the models are
    exchangeable, each item's difference has either sign, at random (Fisher, 1935).

    Args:
        differences: float64 [items].
        weights: float64 [items], whose weighted sum of differences is tested.

    Returns:
        The two-sided p value by Monte Carlo, (1 + as great) / (1 + resamples), thus never 0.
    """
    sizes, counts = np.unique(np.abs(differences * weights), return_counts=True)
    ups = np.random.default_rng(how.seed).binomial(counts, 0.5, size=(how.resamples, len(counts)))
    sums = (2 * ups - counts) @ sizes
    found = abs(float(differences @ weights))
    return (1 + int(np.sum(np.abs(sums) >= found - 1e-12))) / (1 + how.resamples)
