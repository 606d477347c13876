"""Figures as weights: a mean over a group of items, and a mean of such means whatever the sizes of their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .task import Item


def mean_where(items: Sequence[Item], key: str, value: Any) -> np.ndarray | None:
    """Equal weights (float64 [items], sum 1) of the items whose `key` is `value`; None if there is none."""
    members = np.fromiter((item[key] == value for item in items), bool, len(items))
    return members / members.sum() if members.any() else None


def mean_of_all(items: Sequence[Item]) -> np.ndarray | None:
    """Equal weights of all items; None if there is none."""
    return np.full(len(items), 1 / len(items)) if items else None


def mean_of(*figures: np.ndarray | None) -> np.ndarray | None:
    """The weights of an unweighted mean of figures; None if one of them is missing."""
    return None if any(figure is None for figure in figures) else np.mean(figures, axis=0)


def those_there(figures: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """Without the figures that are missing."""
    return {name: weights for name, weights in figures.items() if weights is not None}


def accuracy(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """The figure of a benchmark without groups."""
    return those_there({"Accuracy": mean_of_all(items)})


def one_stratum(item: Item) -> str:
    """Weights of a benchmark without groups."""
    return "all"
