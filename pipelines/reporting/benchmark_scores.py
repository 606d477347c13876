"""Scores on public benchmarks, as `olavlm-probe score --output RUN/scores/NAME.json` leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .page import block, note, number, table
from .runs import Run
from .settings import Settings

FOLDER = "scores"
_TITLES = {"da2k": "DA-2K, pairs in order", "miou": "COCO, mean IoU", "fid": "FID, less is better"}
_LESS_IS_BETTER = ("fid",)


def show_benchmark_scores(run: Run, settings: Settings) -> str:
    """A line a file: the mean over layers, which is a model's score, and the best layer."""
    rows, notes = [], ""
    for file in sorted((run.folder / FOLDER).glob("*.json")):
        try:
            rows.append(_row(file, json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            notes += note(f"{FOLDER}/{file.name} is no file of olavlm-probe score: {e!r}")
    head = ("scores", "benchmark", "mean over layers", "layers", "best layer", "there", "images left out")
    content = table("Scores on benchmarks", head, rows, numbers=(2, 3, 5, 6)) if rows else ""
    return block("Scores on benchmarks", content + notes, "Of features decoded by their teachers' own decoders.")


def _row(file: Path, found: dict[str, Any]) -> list[str]:
    task, metric = found["task"], found["metric"]
    values = {name: layer[metric] for name, layer in found["layers"].items() if layer[metric] is not None}
    best = (min if task in _LESS_IS_BETTER else max)(values, key=values.__getitem__, default="none")
    return [
        file.stem,
        _TITLES.get(task, str(task)),
        number(found["mean"], 4),
        str(len(values)),
        best,
        number(values.get(best), 4),
        str(len(found["left_out"])),
    ]
