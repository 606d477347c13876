"""How much of a mean over seeds is chance: Student's t, for as few values as seeds are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds the true one with a probability of `LEVEL`, were values normal."""

    mean: float
    low: float
    high: float
    """Infinite bounds of a single value, of which nothing is known."""
    values: int

    @property
    def without_zero(self) -> bool:
        """Whether all of it lies on one side of 0: of differences, that there is one."""
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values. ValueError without one."""
    if not values:
        raise ValueError("no values: a mean needs one, an interval two")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of the mean difference, first minus second, of values that belong together, such as those of one seed."""
    return t_interval([a - b for a, b in zip(first, second, strict=True)])


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t below which |T| lies with a probability of `level`, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| < t), by its finite series (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd, square = degrees % 2, math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= square * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
