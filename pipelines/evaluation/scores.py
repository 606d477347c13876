"""What predictions of a benchmark come to: its figures with intervals, and how many answers could be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from .predictions import Prediction
from .statistics import DEFAULT, Resampling, bootstrap
from .tasks.task import Judgement, Task


def judge_all(task: Task, predictions: Iterable[Prediction]) -> tuple[list[Judgement], np.ndarray]:
    """Judgements and scores (float64 [items]) of answers as they are stored; the judgements stored with them are not
    read, so that a protocol that was mended holds for old answers."""
    judgements = [task.judge(p.item, p.answer) for p in predictions]
    return judgements, np.array([j.score for j in judgements], dtype=np.float64)


def scores(task: Task, predictions: Iterable[Prediction], how: Resampling = DEFAULT) -> dict[str, Any]:
    """As JSON: {task, items, expected, unparsed, figures: {name: {value, low, high, items}}, interval}.

    `expected` is the number of items of the whole benchmark, `unparsed` counts answers in which none could be read.
    Values are parts of 1. A figure's `items` are those it depends on. Figures that need items of which there are none
    are not there.
    """
    those = sorted(predictions, key=lambda p: p.index)
    judgements, values = judge_all(task, those)
    items = [p.item for p in those]
    weights = task.metrics(items)
    intervals = bootstrap(values, [task.stratum(item) for item in items], weights, how)
    return {
        "task": task.name,
        "items": len(items),
        "expected": task.published.items,
        "unparsed": sum(j.parsed is None for j in judgements),
        "figures": {
            name: {**interval._asdict(), "items": int(np.count_nonzero(weights[name]))}
            for name, interval in intervals.items()
        },
        "interval": described(how),
    }


def described(how: Resampling) -> dict[str, Any]:
    """How intervals were made, as JSON."""
    return {"method": "stratified bootstrap, percentile", **asdict(how)}
