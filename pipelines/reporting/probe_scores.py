"""Scores that `olavlm-probe eval` left (`scores.json`), of several models side by side."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.layer_plot import Line

from .layer_chart import layer_chart
from .page import block, charts, fold, note, table, warning

SCORES = "scores.json"
EVAL = "eval"
"""Where `olavlm-probe eval RUN` leaves the scores of one run."""


@dataclass(frozen=True)
class Interval:
    """A mean over images."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class TaskScores:
    layers: dict[int, Interval]
    overall: Interval
    """of each image's mean over the layers"""
    images: int


@dataclass(frozen=True)
class ModelScores:
    """One model of a file."""

    name: str
    run: str
    tasks: dict[str, TaskScores]
    faults: list[str]
    """what makes the scores doubtful, a sentence each"""
    left_out: list[str]
    """images that do not count, a sentence each"""


@dataclass(frozen=True)
class Evaluation:
    """Models that were scored on the same images."""

    asked: tuple[str, ...]
    """data, targets and level, in words"""
    level: float
    models: list[ModelScores]


def read_scores(file: Path) -> Evaluation:
    """JobFailed if the file is not one of `olavlm-probe eval`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != 1:
            raise ValueError(f"its format is {content['format']}")
        asked, level = content["asked"], float(content["asked"]["level"])
        models = [_read_model(model) for model in content["models"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise JobFailed(f"{file} holds no scores ({e!r}); give a folder that olavlm-probe eval wrote") from None
    return Evaluation((", ".join(asked["data"]), str(asked["store"]), str(level)), level, models)


def _read_model(model: dict[str, Any]) -> ModelScores:
    tasks, faults, left_out, name = {}, [], [], str(model["name"])
    images = f"{model['images']:,} images"
    if model["trained_on"]:
        faults.append(
            f"{name}: {model['trained_on']:,} of {images} were in its training; these are not held-out scores."
        )
    if model["unreadable"]:
        left_out.append(f"{model['unreadable']:,} could not be read")
    for task, found in model["tasks"].items():
        layers = {int(layer): _interval(score) for layer, score in found["layers"].items()}
        mean = found["mean_over_layers"]
        tasks[task] = TaskScores(dict(sorted(layers.items())), _interval(mean), int(mean["images"]))
        if found["without_target"]:
            left_out.append(f"{found['without_target']:,} have no target of {task}")
    if left_out:
        left_out = [f"{name}: of {images} {' and '.join(left_out)}, and are left out."]
    return ModelScores(name, str(model["run"]), tasks, faults, left_out)


def _interval(score: dict[str, Any]) -> Interval:
    values = [float(score[name]) for name in ("mean", "low", "high")]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"a score is {values}")
    return Interval(*values)


def joined(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Evaluations of the same images as one, each run once, under names that differ."""
    groups: dict[tuple[str, ...], dict[str, ModelScores]] = {}
    levels = {}
    for evaluation in evaluations:
        models = groups.setdefault(evaluation.asked, {})
        levels[evaluation.asked] = evaluation.level
        for model in evaluation.models:
            models.setdefault(model.run, model)
    return [Evaluation(asked, levels[asked], _told_apart(models.values())) for asked, models in groups.items()]


def _told_apart(models: Iterable[ModelScores]) -> list[ModelScores]:
    models = list(models)
    counts = Counter(model.name for model in models)
    return [
        model if counts[model.name] == 1 else replace(model, name="/".join(Path(model.run).parts[-2:]))
        for model in models
    ]


def show_scores(evaluations: Sequence[Evaluation]) -> str:
    """A block an evaluation: for each task a chart over layers, the means over layers, and every value, folded."""
    return "".join(_show(evaluation) for evaluation in evaluations)


def _show(evaluation: Evaluation) -> str:
    models = evaluation.models
    names = [model.name for model in models]
    tasks = list(dict.fromkeys(task for model in models for task in model.tasks))
    drawn = [layer_chart(task, [_line(m, task) for m in models if task in m.tasks], "cosine", names) for task in tasks]
    rows = [
        [model.name, *(str(model.tasks[t].overall) if t in model.tasks else "-" for t in tasks)] for model in models
    ]
    content = charts(drawn) + table("Mean over layers", ("model", *tasks), rows, shown=True)
    content += "".join(fold(f"{task}, every layer", _layer_table(models, task)) for task in tasks)
    content += "".join(note(sentence) for model in models for sentence in model.left_out)
    content = warning([fault for model in models for fault in model.faults]) + content
    data, store, _ = evaluation.asked
    counts = sorted({task.images for model in models for task in model.tasks.values()})
    images = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    about = (
        f"Cosine of the whole prediction with the target, mean over {images} images of {data}, targets of {store}; "
        f"bands and brackets are {100 * evaluation.level:g} % bootstrap intervals over images."
    )
    return block(f"Probe scores on {', '.join(Path(part).name for part in data.split(', '))}", content, about)


def _line(model: ModelScores, task: str) -> Line:
    layers = model.tasks[task].layers
    scores = layers.values()
    return Line(model.name, list(layers), [s.mean for s in scores], [s.low for s in scores], [s.high for s in scores])


def _layer_table(models: Sequence[ModelScores], task: str) -> str:
    scored = [model for model in models if task in model.tasks]
    layers = sorted({layer for model in scored for layer in model.tasks[task].layers})
    rows = [[layer, *(model.tasks[task].layers.get(layer, "-") for model in scored)] for layer in layers]
    return table(f"{task} by layer", ("layer", *(model.name for model in scored)), rows, numbers=(0,))
