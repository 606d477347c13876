"""What both losses add, forward and backward, to predictions and targets; and how exact every arm is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median

from ..cache import fresh
from ..figures import Measurement, number
from .arms import PLAIN, arms
from .sizes import Case, Size

MOST = 1.5
"""Bytes added over those of predictions and targets."""
DEVIATION = 1e-5
"""Of values and gradients, relative to the largest of their kind."""
TASKS = f"{__package__}.tasks"


def measure(size: Size, device: str, folder: Path) -> list[Measurement]:
    return [_added(case, device, size.fresh_rounds) for case in size.cases]


def _added(case: Case, device: str, rounds: int) -> Measurement:
    values: dict[str, dict[str, list[float]]] = {}
    for name in arms(device):
        found = [fresh.run("memory", TASKS, case=asdict(case), arm=name, device=device) for _ in range(rounds)]
        values[name] = {column: [one[column] for one in found] for column in found[0]}
    tensors = {name: median(columns["tensors MB"]) for name, columns in values.items()}
    ratios = [f"{name} {number(tensors[name] / tensors[PLAIN])}" for name in values if name.startswith("fused")]
    return Measurement(
        title=f"{case}, {number(case.bytes / 1e6)} MB of predictions and targets",
        values=values,
        limits={"tensors over predictions and targets": MOST},
        notes=[f"Tensors over those of {PLAIN}, to stay below 0.5: {', '.join(ratios)}."],
    )


def agree(size: Size, device: str, folder: Path) -> list[Measurement]:
    found = fresh.run("deviations", TASKS, cases=[asdict(case) for case in size.cases], device=device)
    values = {line: {column: [value] for column, value in columns.items()} for line, columns in found.items()}
    columns = next(iter(found.values()))
    return [Measurement("deviation from the formulas in float64", values, limits=dict.fromkeys(columns, DEVIATION))]
