"""What `olavlm-probe eval` leaves: a table, `scores.json`, the cosines of each image, and the plot over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.student.probing.scores import Cosines, Score, score
from olavlm.student.run_files import write_json

from .layer_plot import Line, layer_plot
from .reporting.probe_scores import SCORES

PLOT, PER_IMAGE = "layers.svg", "cosines.parquet"


@dataclass(frozen=True)
class Scored:
    """A run's scores."""

    name: str
    """Short, for tables and legends."""
    folder: Path
    cosines: Cosines
    layers: dict[str, dict[int, Score]]
    """By task and layer."""
    means: dict[str, Score]
    """By task, of each image's mean over the layers."""

    @classmethod
    def of(cls, name: str, folder: Path, cosines: Cosines, *, resamples: int, seed: int, level: float) -> Scored:
        layers, means = {}, {}
        for task, by_layer in cosines.values.items():
            values = np.stack(list(by_layer.values()))
            rows = np.vstack([values, values.mean(axis=0)])
            *scores, means[task] = score(rows, resamples=resamples, seed=seed, level=level)
            layers[task] = dict(zip(by_layer, scores, strict=True))
        return cls(name, folder, cosines, layers, means)


def text_table(runs: Sequence[Scored]) -> str:
    """For each task a line a layer, a column a run: the mean and its interval."""
    lines = []
    for task in _tasks(runs):
        scored = [run for run in runs if task in run.layers]
        head = [f"{task}", *(run.name for run in scored)]
        layers = sorted({layer for run in scored for layer in run.layers[task]})
        body = [[str(x), *(_cell(run.layers[task].get(x)) for run in scored)] for x in layers]
        body.append(["mean", *(_cell(run.means[task]) for run in scored)])
        counts = [
            f"{len(run.layers[task])} layers, {run.means[task].images:,} images" + _left_out(run, task)
            for run in scored
        ]
        body.append(["of", *counts])
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines += [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *body)
        ]
        lines.append("")
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    return "-" if score is None else f"{score.mean:.4f} [{score.low:.4f}, {score.high:.4f}]"


def _left_out(run: Scored, task: str) -> str:
    reasons = {"unreadable": run.cosines.unreadable, "without target": run.cosines.quarantined[task]}
    return "".join(f", {count:,} {reason}" for reason, count in reasons.items() if count)


def _tasks(runs: Sequence[Scored]) -> list[str]:
    return list(dict.fromkeys(task for run in runs for task in run.layers))


def write_results(runs: Sequence[Scored], output: Path, asked: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """All files, each as a whole."""
    output.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs):
        columns: dict[str, Any] = {"image": run.cosines.images}
        for task, by_layer in run.cosines.values.items():
            columns |= {f"{task}/{x}": pa.array(values, from_pandas=True) for x, values in by_layer.items()}
        pq.write_table(pa.table(columns), output / _per_image(number, runs))
    (output / PLOT).write_text(plot(runs, asked["level"]), encoding="utf-8")
    models = [_described(run, _per_image(number, runs)) for number, run in enumerate(runs)]
    write_json(output / SCORES, {"format": 1, "asked": asked, "versions": versions, "models": models})


def _per_image(number: int, runs: Sequence[Scored]) -> str:
    return PER_IMAGE if len(runs) == 1 else f"{number}-{PER_IMAGE}"


def _described(run: Scored, per_image: str) -> dict[str, Any]:
    probes = run.cosines.run
    return {
        "name": run.name,
        "run": str(run.folder),
        "model": probes.model,
        "layout": probes.layout,
        "images": len(run.cosines.images),
        "trained_on": run.cosines.seen,
        "unreadable": run.cosines.unreadable,
        "per_image": per_image,
        "tasks": {
            task: {
                "key": probes.teachers[task].key,
                "fingerprint": probes.teachers[task].fingerprint,
                "without_target": run.cosines.quarantined[task],
                "mean_over_layers": asdict(run.means[task]),
                "layers": {str(x): asdict(score) for x, score in by_layer.items()},
            }
            for task, by_layer in run.layers.items()
        },
    }


def plot(runs: Sequence[Scored], level: float) -> str:
    """The SVG file: a panel a task, a line a run."""
    panels = {}
    for task in _tasks(runs):
        panels[task] = [
            Line(
                run.name,
                list(by_layer),
                [s.mean for s in by_layer.values()],
                [s.low for s in by_layer.values()],
                [s.high for s in by_layer.values()],
            )
            for run in runs
            if (by_layer := run.layers.get(task))
        ]
    counts = sorted({run.means[task].images for run in runs for task in run.means})
    images = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return layer_plot(
        panels,
        y_title="cosine with the target",
        note=f"Mean over {images} images; bands are {100 * level:.0f} % bootstrap intervals over images.",
    )
