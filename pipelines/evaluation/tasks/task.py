"""What a benchmark is: where its rows lie, what a model is asked, how an answer is judged, what is reported.

A task is plain functions of a row, or of what of it is kept (`Item`), so that predictions are scored again without the
dataset: a line of predictions holds all that `judge` and the metrics read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""A row of the published table; `image` is a picture (PIL)."""

Item = Mapping[str, Any]
"""What of a row the score depends on, as JSON."""


@dataclass(frozen=True)
class Published:
    """Where a benchmark is published, on the hub or as the same files in a local folder."""

    repository: str
    """Dataset on the hub."""

    split: str

    files: tuple[str, ...]
    """Patterns of its parquet files in the folder, such as `data/test-*.parquet`; a local copy may keep them elsewhere
    below it."""

    columns: tuple[str, ...]
    """What the task reads of a row."""

    items: int
    """Rows of the whole split; a figure of fewer is not the benchmark's."""


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth."""

    score: float
    """0 to 1."""

    parsed: str | None
    """What was read as the answer; None if nothing could be, which scores 0."""


@dataclass(frozen=True)
class Task:
    """A benchmark. Callables are pure."""

    name: str
    """As `--tasks` takes it."""

    title: str
    published: Published
    max_new_tokens: int

    prompt: Callable[[Row], str]
    """The text that follows the image."""

    item: Callable[[Row], Item]
    """Equal to itself after a round trip through JSON. JobFailed for a row that is none of the benchmark's."""

    judge: Callable[[Item, str], Judgement]

    metrics: Callable[[Sequence[Item]], dict[str, np.ndarray]]
    """A weight per item (float64 [items], sum 1) for each figure that is reported, in order; of the whole benchmark the
    last is its score. A figure is the sum of weight times score: means of groups, and means of such means, are. One
    that needs a group of which there is no item is left out."""

    stratum: Callable[[Item], str]
    """Items of one stratum are resampled among themselves; within one a metric's weights are equal."""
