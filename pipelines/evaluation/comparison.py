"""Two models on the same items of a benchmark: who is better, by how much, and whether that is more than chance.

On 2,638 items one or two points between two models are within noise; that both were asked the same items tells more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from olavlm.cache.wording import counted
from olavlm.pipelines.cli import JobFailed

from .predictions import Prediction
from .scores import described, measure
from .statistics import DEFAULT, Resampling, bootstrap, mcnemar, sign_flip
from .tasks.task import Task


def compare(
    task: Task, first: Iterable[Prediction], second: Iterable[Prediction], how: Resampling = DEFAULT
) -> dict[str, Any]:
    """The first model against the second, as JSON: {task, items, figures: {name: {first, second, items, difference,
    low, high, first_better, second_better, test, p}}, interval}.

    `difference` is the first's value minus the second's, with its paired interval. `first_better` and `second_better`
    count the items of the figure where one scores more. `p` is of the test named: McNemar's exact test where all scores
    are 0 or 1; it counts items alike, also where the figure weights groups. Otherwise a paired sign-flip permutation
    test of the difference itself.

    Raises:
        JobFailed: the two are not of the same items. How they were asked is not compared.
    """
    those, others = ({p.index: p for p in predictions} for predictions in (first, second))
    _check_same_items(task, those, others)
    found, other = (measure(task, [predictions[i] for i in sorted(those)]) for predictions in (those, others))
    a, b = found.scores, other.scores
    intervals = bootstrap(a - b, found.strata, found.weights, how)
    binary = bool(np.isin(np.concatenate([a, b]), (0, 1)).all())
    figures = {}
    for name, interval in intervals.items():
        w = found.weights[name]
        differences = (a - b)[w > 0]
        better, worse = int(np.sum(differences > 1e-12)), int(np.sum(differences < -1e-12))
        if binary:
            test, p = "McNemar, exact", mcnemar(better, worse)
        else:
            test, p = "paired sign-flip permutation", sign_flip(a - b, w, how)
        figures[name] = {
            "first": float(w @ a),
            "second": float(w @ b),
            "items": len(differences),
            "difference": interval.value,
            "low": interval.low,
            "high": interval.high,
            "first_better": better,
            "second_better": worse,
            "test": test,
            "p": p,
        }
    return {"task": task.name, "items": len(a), "figures": figures, "interval": described(how)}


def _check_same_items(task: Task, those: dict[int, Prediction], others: dict[int, Prediction]) -> None:
    if those.keys() != others.keys():
        odd = min(those.keys() ^ others.keys())
        raise JobFailed(
            f"{task.title}: {counted(len(those), 'prediction')} and {len(others)} to compare them with are not of the "
            f"same items; item {odd}, for one, is only in the {'first' if odd in those else 'second'}"
        )
    for index, prediction in those.items():
        if prediction.item != others[index].item:
            raise JobFailed(
                f"{task.title}: item {index} is {dict(prediction.item)} here and {dict(others[index].item)} there: the "
                "predictions are of different datasets and cannot be compared"
            )
