"""What predictions of a benchmark come to: its figures with intervals, and how many answers could be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from olavlm.pipelines.cli import JobFailed

from .predictions import Prediction
from .statistics import DEFAULT, Resampling, bootstrap
from .tasks.task import Judgement, Task


@dataclass(frozen=True)
class Measured:
    """Predictions as numbers. The judgements stored with them are not read, so that a protocol that was mended holds
    for old answers."""

    judgements: list[Judgement]
    scores: np.ndarray
    """float64 [items]"""

    strata: list[str]
    weights: dict[str, np.ndarray]
    """Of each figure."""


def measure(task: Task, predictions: Iterable[Prediction]) -> Measured:
    """In their order. JobFailed for predictions whose items lack what the task reads of them, or hold other things."""
    those = list(predictions)
    items = [p.item for p in those]
    try:
        judgements = [task.judge(p.item, p.answer) for p in those]
        strata, weights = [task.stratum(item) for item in items], task.metrics(items)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        what = f"lacks {e}" if isinstance(e, KeyError) else f"cannot be judged ({e})"
        raise JobFailed(
            f"{task.title}: an item of the predictions {what}: they were written by another version of this "
            "benchmark; remove them, and ask again"
        ) from None
    return Measured(judgements, np.array([j.score for j in judgements], dtype=np.float64), strata, weights)


def scores(task: Task, predictions: Iterable[Prediction], how: Resampling = DEFAULT) -> dict[str, Any]:
    """As JSON: {task, items, expected, unparsed, figures: {name: {value, low, high, items}}, interval}.

    `expected` is the number of items of the whole benchmark, `unparsed` counts answers in which none could be read.
    Values are parts of 1. A figure's `items` are those it depends on. Figures that need items of which there are none
    are not there.
    """
    found = measure(task, predictions)
    intervals = bootstrap(found.scores, found.strata, found.weights, how)
    return {
        "task": task.name,
        "items": len(found.judgements),
        "expected": task.published.items,
        "unparsed": sum(j.parsed is None for j in found.judgements),
        "figures": {
            name: {**interval._asdict(), "items": int(np.count_nonzero(found.weights[name]))}
            for name, interval in intervals.items()
        },
        "interval": described(how),
    }


def described(how: Resampling) -> dict[str, Any]:
    """How intervals were made, as JSON."""
    return {"method": "stratified bootstrap, percentile", **asdict(how)}
