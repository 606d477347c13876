"""Figures as weights: a mean over a group of items, and a mean of such means whatever the sizes of their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .task import Item


def mean_where(items: Sequence[Item], key: str | None = None, value: Any = None) -> np.ndarray | None:
    """Equal weights (float64 [items], sum 1) of the items whose `key` is `value`, or of all; None if there is none."""
    members = np.fromiter((key is None or item[key] == value for item in items), bool, len(items))
    return members / members.sum() if members.any() else None


def mean_of(*figures: np.ndarray | None) -> np.ndarray | None:
    """The weights of an unweighted mean of figures; None if one of them is missing."""
    return None if any(figure is None for figure in figures) else np.mean(figures, axis=0)


def those_there(figures: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """Without the figures that are missing."""
    return {name: weights for name, weights in figures.items() if weights is not None}
