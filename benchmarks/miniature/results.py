"""What the runs in a folder came to, as figures: raw values a seed, from which means and intervals are made.

Of each arm the seeds up to the first that is not there are taken, so that a run that is not finished gives the figures
of what is, and those of two arms belong together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..figures import Figures, ItemPairs, Seeds
from ..machine import describe
from .arms import ARMS, DISTILLED, SINGLE, arms_of
from .forms import Form
from .models import NAMES, scored
from .run import PACKAGES, Journal
from .steps import BENCHMARK, STAGES, covered, run_folder

TABLES = {"table 1": SINGLE, "table 4": "tokens_only", "table 5": "n0"}
"""By table, the arm that its others are compared with."""
_AT_ONCE = 480
"""Rows of features in memory."""
COLUMNS = ("Count", "Relation", "Depth", "Distance", "2D", "3D", "Overall")


def collect(root: Path, form: Form, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """A run of a benchmark as results/*.json keeps it."""
    runs = Journal(root).runs()
    figures: dict[str, list[Figures]] = {
        "models": scored(root / "models", [name for name in NAMES if name != "llm" or not form.llm]),
        "figure 3": figure_3(root, form, arms, seeds),
        **{name: table(root, name, arms, seeds) for name in TABLES},
        "item by item": item_pairs(root, arms, seeds),
    }
    notes = [took(root)]
    if figures["figure 3"]:
        figures["figure 3"][-1].notes += notes
    return {
        "size": form.name,
        "form": json.loads(json.dumps(form.settings())),  # as it is read again
        "seeds": _measured(figures, seeds),
        "machine": measured_on(root, runs),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "figures": {name: found for name, found in figures.items() if found},
    }


def measured_on(root: Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The machine of the runs that did something, as the last of them found it, with the commits of all, and the date
    and load of the first."""
    at_work = [run["machine"] for run in runs if run["steps"]] or [describe(root, PACKAGES)]
    commits = dict.fromkeys(str(machine["commit"]) for machine in at_work)
    return {**at_work[-1], "commit": ", ".join(commits), "date": at_work[0]["date"], "load": at_work[0]["load"]}


def _measured(figures: Mapping[str, Sequence[Figures]], seeds: Sequence[int]) -> list[int]:
    """Those of `seeds` of which there is a figure: the first so many."""
    counts = [len(column) for found in figures.values() for figure in found if isinstance(figure, Seeds)
              for columns in figure.values.values() for column in columns.values()]  # fmt: skip
    return list(seeds)[: max(counts, default=0)]


def figure_3(root: Path, form: Form, arms: Sequence[str], seeds: Sequence[int]) -> list[Seeds]:
    """Probes, layer by layer, of each task after each stage."""
    found = []
    for task in form.probe_tasks:
        notes = []
        if (same := blind_cosine(root, task, form)) is not None:
            told = "A prediction that is the same for every picture, the mean of those to train on"
            notes.append(f"{told}, has a cosine of {same:.4f} with {task}'s features.")
        for stage in STAGES:
            values = {}
            for arm in arms:
                if scored := _there(_probed(root, arm, seed, stage, task) for seed in seeds):
                    values[ARMS[arm].title] = _by_column(scored)
            title = f"Probes of {task} after {stage.upper()}, cosine with the teacher's features of held-out pictures"
            if values:
                found.append(Seeds(title, values, _over(values, SINGLE), digits=4, notes=list(notes)))
    return found


def blind_cosine(root: Path, task: str, form: Form) -> float | None:
    """What probes are to be measured against: the mean cosine, over held-out pictures, of what needs no picture.

    None until all features are there.
    """
    from olavlm.cache import FeatureStore
    from olavlm.student.probing.settings import default_key

    if not covered(root, form.scenes + form.held_out, [key := default_key(task)]):
        return None
    features = FeatureStore(root / "features")[key]
    mean, rows = 0.0, range(form.scenes)  # in the plan, the pictures to train on come first
    for start in rows[::_AT_ONCE]:
        values, _ = features.read(list(rows[start : start + _AT_ONCE]))
        mean = mean + values.sum(axis=0, dtype=np.float64) / form.scenes
    told, _ = features.read(list(range(form.scenes, form.scenes + form.held_out)))
    told = told.reshape(len(told), -1).astype(np.float64)
    return float(np.mean(told @ mean.ravel() / np.linalg.norm(told, axis=1)) / np.linalg.norm(mean))


def probe_scores(run: Path) -> Path:
    """What olavlm-probe eval leaves of a run folder of olavlm-train."""
    return run / "probes" / "eval" / "scores.json"


def _probed(root: Path, arm: str, seed: int, stage: str, task: str) -> dict[str, float] | None:
    file = probe_scores(root / run_folder(arm, seed, stage))
    if not file.is_file():
        return None
    layers = _read(file)["models"][0]["tasks"][task]["layers"]
    return {f"layer {layer}": score["mean"] for layer, score in layers.items()}


def table(root: Path, name: str, arms: Sequence[str], seeds: Sequence[int]) -> list[Seeds]:
    """Accuracies in percent of a table's arms; nothing with fewer than two of them."""
    values = {}
    for arm in arms_of(name):
        if arm.name in arms and (scored := _there(_answered(root, arm.name, seed) for seed in seeds)):
            values[arm.title] = _by_column(scored)
    title = f"Paper's {name} in miniature, accuracy in %"
    return [Seeds(title, values, _over(values, TABLES[name]), digits=1)] if len(values) > 1 else []


def benchmark_folder(root: Path, arm: str, seed: int) -> Path:
    """Output of olavlm-eval."""
    return root / run_folder(arm, seed, "ift") / "benchmarks"


def _answered(root: Path, arm: str, seed: int) -> dict[str, float] | None:
    file = benchmark_folder(root, arm, seed) / "scores.json"
    if not file.is_file():
        return None
    figures = _read(file)["tasks"][BENCHMARK]["figures"]
    return {name: 100 * figures[name]["value"] for name in COLUMNS if name in figures}


def item_pairs(root: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[ItemPairs]:
    """Every arm of a table against the one that the table's are compared with, on the same questions."""
    asked = [(arm.name, base) for table, base in TABLES.items() for arm in arms_of(table) if arm.name != base]
    pairs = (_item_pairs(root, *two, seeds) for two in asked if set(two) <= set(arms))
    return [pair for pair in pairs if pair is not None]


def _item_pairs(root: Path, arm: str, base: str, seeds: Sequence[int]) -> ItemPairs | None:
    both = list(takewhile(lambda seed: all(_answered(root, name, seed) for name in (arm, base)), seeds))
    if not both:
        return None
    found = [_compared(root, arm, base, seed) for seed in both]
    counts = {
        name: [[f[name]["items"], f[name]["first_better"], f[name]["second_better"]] for f in found]
        for name in found[0]
    }
    p = {name: [f[name]["p"] for f in found] for name in found[0]}
    first, second = ARMS[arm].title, ARMS[base].title
    return ItemPairs(f"{first} against {second} on the same questions", first, second, both, counts, p)


def _compared(root: Path, arm: str, base: str, seed: int) -> dict[str, dict[str, Any]]:
    from olavlm.pipelines.evaluation.comparison import compare
    from olavlm.pipelines.evaluation.predictions import Predictions
    from olavlm.pipelines.evaluation.tasks import TASKS

    first, second = (
        Predictions(benchmark_folder(root, name, seed) / "predictions").done(BENCHMARK).values() for name in (arm, base)
    )
    return compare(TASKS[BENCHMARK], first, second)["figures"]


def took(root: Path) -> str:
    """A sentence about what the steps took."""
    kinds: dict[str, list[float]] = {}
    for line in Journal(root).steps():
        kinds.setdefault(line["kind"], []).append(line["seconds"])
    parts = [f"{kind} {median(s):.0f} s" + (f" x {len(s)}" if len(s) > 1 else "") for kind, s in kinds.items()]
    workers = max((run["workers"] for run in Journal(root).runs()), default=0)
    return f"Seconds a step took, medians, with {workers} at a time: {', '.join(parts)}."


def _over(values: Mapping[str, Any], other: str) -> dict[str, str]:
    """Each arm, the distilled one first, over the one that they are compared with, by their titles."""
    base = ARMS[other].title
    first = [title for title in (ARMS[DISTILLED].title,) if title in values]
    return {title: base for title in dict.fromkeys([*first, *values]) if title != base} if base in values else {}


def _there(scored: Iterable[dict[str, float] | None]) -> list[dict[str, float]]:
    return list(takewhile(lambda figures: figures is not None, scored))


def _by_column(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
