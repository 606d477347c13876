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

from olavlm.student.probing.settings import default_key

from ..figures import Figures, ItemPairs, Seeds
from ..machine import describe
from .arms import ARMS, DISTILLED, SINGLE, arms_of
from .forms import Form
from .models import NAMES, scored
from .run import FOLDER, PACKAGES, Journal
from .steps import BENCHMARK, STAGES, covered, run_folder

SHORTCUTS = FOLDER / "results" / "shortcuts.json"
TABLES = {"table 1": SINGLE, "table 4": "tokens_only", "table 5": "n0"}
"""By table, the arm that its others are compared with."""
SAME = "the same for every picture"
"""A prediction that needs no picture: the mean of the features of those to train on."""
COUNTED = ("objects", "a shape or a colour")
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
        "what is counted": counted(root, arms, seeds),
        "item by item": item_pairs(root, arms, seeds),
    }
    for figure in [figure for found in figures.values() for figure in found if isinstance(figure, Seeds)][:1]:
        figure.notes.append(took(root))
    return {
        "size": form.name,
        "form": json.loads(json.dumps(form.settings())),  # as it is read again
        "blind": blind_answers(),
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
        same = blind_cosine(root, task, form)
        for stage in STAGES:
            values = {}
            for arm in arms:
                if scored := _there(_probed(root, arm, seed, stage, task) for seed in seeds):
                    values[ARMS[arm].title] = _by_column(scored)
            title = f"Probes of {task} after {stage.upper()}, cosine with the teacher's features of held-out pictures"
            if values:
                over = _over(values, "figure 3", SINGLE)
                if same is not None:
                    first = next(iter(values.values()))
                    values[SAME] = {layer: [same] * len(scores) for layer, scores in first.items()}
                found.append(Seeds(title, values, over, digits=4))
    return found


def blind_cosine(root: Path, task: str, form: Form) -> float | None:
    """What probes are to be measured against: the mean cosine, over held-out pictures, of what needs no picture.

    None until all features are there.
    """
    from olavlm.cache import FeatureStore

    mean = mean_features(root, task, form)
    if mean is None:
        return None
    told, valid = FeatureStore(root / "features")[default_key(task)].read(
        list(range(form.scenes, form.scenes + form.held_out))
    )
    assert valid.all(), f"{task}: features of the world's own pictures were quarantined"
    told = told.reshape(len(told), -1).astype(np.float64)
    return float(np.mean(told @ mean.ravel() / np.linalg.norm(told, axis=1)) / np.linalg.norm(mean))


def mean_features(root: Path, task: str, form: Form) -> np.ndarray | None:
    """Of what probes of a task predict, over the pictures to train on, float64 (tokens, dim).

    None until all features are there.
    """
    from olavlm.cache import FeatureStore

    if not covered(root, form.scenes + form.held_out, [key := default_key(task)]):
        return None
    features = FeatureStore(root / "features")[key]
    mean, rows = 0.0, range(form.scenes)  # in the plan, the pictures to train on come first
    for start in rows[::_AT_ONCE]:
        values, valid = features.read(list(rows[start : start + _AT_ONCE]))
        assert valid.all(), f"{key}: features of the world's own pictures were quarantined"
        mean = mean + values.sum(axis=0, dtype=np.float64) / form.scenes
    return mean


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
            values[arm.title_in(name)] = _by_column(scored)
    title = f"Paper's {name} in miniature, accuracy in %"
    return [Seeds(title, values, _over(values, name, TABLES[name]), digits=1)] if len(values) > 1 else []


def counted(root: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[Seeds]:
    """Accuracies in percent of questions of Count, by what is to be counted."""
    values = {}
    for arm in arms:
        if scored := _there(_counted(root, arm, seed) for seed in seeds):
            values[ARMS[arm].title] = _by_column(scored)
    return [Seeds("Count, by what is counted, accuracy in %", values, digits=1)] if values else []


def _counted(root: Path, arm: str, seed: int) -> dict[str, float] | None:
    from olavlm.pipelines.evaluation.predictions import Predictions

    if not _answered(root, arm, seed):
        return None
    scores: dict[str, list[float]] = {what: [] for what in COUNTED}
    for said in Predictions(benchmark_folder(root, arm, seed) / "predictions").done(BENCHMARK).values():
        if said.item["kind"] == "Count":
            scores[COUNTED[not said.prompt.startswith("How many objects ")]].append(said.score)
    return {what: 100 * float(np.mean(found)) for what, found in scores.items()} if all(scores.values()) else None


def blind_answers() -> dict[str, float]:
    """Accuracies in percent, by task, of the best that is known to answer without seeing any depth (`shortcuts`)."""
    *_, places = _read(SHORTCUTS)["figures"]["shortcuts"]
    found: dict[str, float] = {}
    for what, columns in places["values"].items():
        task = what.partition(",")[0]
        found[task] = max(found.get(task, 0.0), 100 * columns["accuracy"])
    return found


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
    asked = [(name, arm.name, base) for name, base in TABLES.items() for arm in arms_of(name) if arm.name != base]
    pairs = (_item_pairs(root, *one, seeds) for one in asked if set(one[1:]) <= set(arms))
    return [pair for pair in pairs if pair is not None]


def _item_pairs(root: Path, name: str, arm: str, base: str, seeds: Sequence[int]) -> ItemPairs | None:
    both = list(takewhile(lambda seed: all(_answered(root, name, seed) for name in (arm, base)), seeds))
    if not both:
        return None
    found = [_compared(root, arm, base, seed) for seed in both]
    counts = {
        name: [[f[name]["items"], f[name]["first_better"], f[name]["second_better"]] for f in found]
        for name in found[0]
    }
    p = {name: [f[name]["p"] for f in found] for name in found[0]}
    first, second = ARMS[arm].title_in(name), ARMS[base].title_in(name)
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


def _over(values: Mapping[str, Any], name: str, other: str) -> dict[str, str]:
    """Each arm of a table, the distilled one first, over the one that they are compared with, by their titles."""
    base = ARMS[other].title_in(name)
    first = [title for title in (ARMS[DISTILLED].title_in(name),) if title in values]
    return {title: base for title in dict.fromkeys([*first, *values]) if title != base} if base in values else {}


def _there(scored: Iterable[dict[str, float] | None]) -> list[dict[str, float]]:
    return list(takewhile(lambda figures: figures is not None, scored))


def _by_column(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
