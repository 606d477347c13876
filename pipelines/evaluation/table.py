"""Scores of runs beside the paper's rows, all figures of a run, and two models compared: tables to print and to keep.

`runs` are scores by the name that is shown and by task, as `scores.scores` makes them and `scores.json` holds them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from decimal import ROUND_HALF_UP, Decimal
from statistics import NormalDist
from typing import Any

from . import paper
from .paper import Column, PaperRow, PaperTable
from .sheet import Sheet
from .tasks import TASKS

Scores = Mapping[str, Any]
"""Of one task, JSON."""

SLIP = "*"


def beside_paper(runs: Mapping[str, Mapping[str, Scores]]) -> list[Sheet]:
    """The paper's tables, in per cent, with the rows of runs below: those tables of which a run has some column.

    A figure that a run lacks is blank; its average is there if all of its columns are.
    """
    shown = [
        table
        for table in paper.TABLES
        if any(_figure(scores, column) for scores in runs.values() for column in table.columns)
    ]
    return [_sheet(table, runs) for table in shown]


def all_figures(name: str, scores: Mapping[str, Scores]) -> Sheet:
    """Each figure of each task of a run, with its interval."""
    rows = [
        [TASKS[task].title, figure, _percent(x["value"]), _bounds(x["low"], x["high"]), f"{x['items']:,}"]
        for task, those in scores.items()
        for figure, x in those["figures"].items()
    ]
    head = ["benchmark", "figure", "score", f"{_level(scores)} interval", "items"]
    return Sheet(f"Scores of {name}, in per cent", head, rows, labels=2, notes=_shortcomings(name, scores))


def compared(first: str, second: str, comparisons: Mapping[str, Scores]) -> Sheet:
    """What `comparison.compare` found of two models, by task."""
    rows = [
        [
            TASKS[task].title,
            figure,
            *(_percent(x[which]) for which in ("first", "second")),
            f"{100 * x['difference']:+.1f}",
            _bounds(x["low"], x["high"], "+"),
            *(f"{x[count]:,}" for count in ("first_better", "second_better", "items")),
            f"{x['p']:.2g}",
        ]
        for task, those in comparisons.items()
        for figure, x in those["figures"].items()
    ]
    interval = f"{_level(comparisons)} interval"
    head = ["benchmark", "figure", "A", "B", "A - B", interval, "A better", "B better", "items", "p"]
    tests = {x["test"]: TASKS[task].title for task, those in comparisons.items() for x in those["figures"].values()}
    notes = [f"p is two-sided, of the test for pairs: {'; '.join(f'{test} ({of})' for test, of in tests.items())}"]
    return Sheet(f"A: {first}. B: {second}. The same items, in per cent", head, rows, labels=2, notes=notes)


def _sheet(table: PaperTable, runs: Mapping[str, Mapping[str, Scores]]) -> Sheet:
    slips, blank = paper.slips(table), [""] * (len(table.labels) - 1)
    rows: list[list[str]] = [
        [*row.labels, *map(str, row.values), f"{row.average}{SLIP if row in slips else ''}"] for row in table.rows
    ]
    notes = [note for row in slips for note in _slip(table, row)] + _other_average(table)
    for name, scores in runs.items():
        found = [_figure(scores, column) for column in table.columns]
        if any(found):
            average = _figure(scores, table.average) if table.average else _average(found)
            rows.append([name, *blank, *map(_cell, [*found, average])])
            rows.append(["  items", *blank, *(f"{x['items']:,}" if x else "" for x in [*found, average])])
            notes += _shortcomings(name, scores, {column.task for column in table.columns})
    level = _level(next(iter(runs.values())))
    notes.append(f"± is half of the {level} bootstrap interval over items{_of_average(table)}")
    head = [*table.labels, *(column.header for column in table.columns), "Avg"]
    return Sheet(f"arXiv 2412.09585, {table.title}", head, rows, len(table.labels), [*notes, _noise()])


def _figure(scores: Mapping[str, Scores], column: Column) -> Mapping[str, Any] | None:
    return scores.get(column.task, {}).get("figures", {}).get(column.figure)


def _average(found: list[Mapping[str, Any] | None]) -> dict[str, float] | None:
    """The unweighted mean of columns; half widths of independent ones add in squares."""
    there = [x for x in found if x]
    if len(there) < len(found):
        return None
    value = sum(x["value"] for x in there) / len(there)
    half = math.hypot(*((x["high"] - x["low"]) / 2 for x in there)) / len(there)
    return {"value": value, "low": value - half, "high": value + half, "items": sum(x["items"] for x in there)}


def _cell(figure: Mapping[str, Any] | None) -> str:
    return f"{_percent(figure['value'])} ±{50 * (figure['high'] - figure['low']):.1f}" if figure else ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _bounds(low: float, high: float, sign: str = "") -> str:
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _level(scores: Mapping[str, Scores]) -> str:
    return " or ".join(f"{100 * level:g} %" for level in sorted({x["interval"]["level"] for x in scores.values()}))


def _shortcomings(name: str, scores: Mapping[str, Scores], tasks: Collection[str] | None = None) -> list[str]:
    """What of the benchmarks is missing, and what of the answers could not be read."""
    notes = []
    for task, those in scores.items():
        if tasks is None or task in tasks:
            title, items, expected = TASKS[task].title, those["items"], those["expected"]
            if items != expected:
                notes.append(f"{name}: {items:,} of the {expected:,} items of {title}, and so not its score")
            if those["unparsed"]:
                notes.append(f"{name}: {those['unparsed']:,} of {items:,} answers to {title} are unparsed, thus wrong")
    return notes


def _slip(table: PaperTable, row: PaperRow) -> list[str]:
    """A printed average that its columns do not give, and what it does to the gain that is claimed over it."""
    true = _rounded(paper.mean(row))
    notes = [f"{SLIP} printed {row.average}, but its columns give {true}"]
    for other in table.rows:
        if other.labels[1:] == row.labels[1:] and other is not row:
            claimed, gain = other.average - row.average, _rounded(paper.mean(other) - paper.mean(row))
            notes[0] += f": the gain of {other.labels[0]} over it is {gain}, not {claimed}"
    return notes


def _other_average(table: PaperTable) -> list[str]:
    if table.average is None:
        return []
    row = table.rows[-1]
    return [
        f"Avg is {TASKS[table.average.task].title}'s {table.average.figure}, not the mean of the columns "
        f"({', '.join(row.labels)}: {row.average}; the mean is {_rounded(paper.mean(row))})"
    ]


def _of_average(table: PaperTable) -> str:
    return "" if table.average else "; of Avg, those of its columns as independent ones combine"


def _noise() -> str:
    """What chance does to an accuracy of 60 % on the items of CV-Bench, by the normal approximation."""
    items = TASKS["cv_bench"].published.items
    half = NormalDist().inv_cdf(0.975) * 100 * math.sqrt(0.6 * 0.4 / items)
    return (
        f"60 % on {items:,} items is known to ±{half:.1f} points (95 %), and the difference of two such models to "
        f"±{half * math.sqrt(2):.1f}: differences of 1 to 2 points are within noise; compare models on the same items"
    )


def _rounded(value: Decimal) -> Decimal:
    return value.quantize(Decimal("0.1"), ROUND_HALF_UP)
