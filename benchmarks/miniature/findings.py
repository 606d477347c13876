"""What the figures say, in sentences made of them: a difference is one where its interval leaves out zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..figures import Figures, Seeds
from ..intervals import Interval
from .arms import ARMS, DISTILLED, SINGLE, distilled_layers
from .results import SAME
from .shortcuts import CHANCE

_TITLE = {name: arm.title for name, arm in ARMS.items()}


def distilled_columns(task: str, blocks: int) -> list[str]:
    """Columns of figure 3 at whose layers the task is distilled."""
    return [f"layer {layer}" for layer in distilled_layers(task, blocks)]


def findings(
    figures: Mapping[str, Sequence[Figures]], blocks: int, blind: Mapping[str, float] | None = None
) -> list[str]:
    """Of figure 3 and the tables of a language model of so many blocks; empty where nothing is compared.

    Args:
        blind: percent, by task, that can be answered without seeing any depth.
    """
    found = [sentence for chart in figures.get("figure 3", ()) for sentence in _of_probes(chart, blocks)]
    for table in figures.get("table 1", ()):
        found += [*_of_baselines(table, blind or {}), *_of_answers(table)]
    for name in ("table 4", "table 5"):
        found += [sentence for table in figures.get(name, ()) for sentence in _of_a_table(name, table)]
    return found


def _of_probes(chart: Any, blocks: int) -> Iterator[str]:
    if not isinstance(chart, Seeds) or _TITLE[DISTILLED] not in chart.over:
        return
    task, stage = chart.title.split()[2], chart.title.split()[4].rstrip(",")
    differences = {column: chart.difference(_TITLE[DISTILLED], column) for column in chart.columns}
    seeds = next(iter(differences.values())).values
    if seeds < 2:
        yield f"{task} after {stage}: of one seed alone nothing is said."
        return
    at = [column for column in distilled_columns(task, blocks) if column in differences]
    told = ", ".join(f"{column} {signed(differences[column], chart.digits)}" for column in at)
    above = [column for column, d in differences.items() if d.low > 0]
    below = [column for column, d in differences.items() if d.high < 0]
    clear = sum(differences[column].low > 0 for column in at)
    yield (
        f"Probes of {task} after {stage}, distilled minus single encoder over {seeds} seeds: {told}. The interval lies "
        f"above 0 at {clear} of the {len(at)} distilled layers, and at {len(above)} of all {len(differences)}"
        + (f"; below 0 at {', '.join(below)}" if below else "")
        + "."
    )
    if SAME in chart.values:
        parts = []
        for arm in (arm for arm in chart.values if arm != SAME):
            gains = [chart.interval(arm, c).mean - chart.interval(SAME, c).mean for c in chart.columns]
            parts.append(f"{arm} by {min(gains):.4f} to {max(gains):.4f}")
        yield f"Above what is {SAME} ({chart.interval(SAME, chart.columns[0]).mean:.4f}) stand {', '.join(parts)}."


def _of_baselines(table: Seeds, blind: Mapping[str, float]) -> Iterator[str]:
    for name in ("feature_concat", "token_concat"):
        if _TITLE[name] in table.values:
            told = [
                f"{task} {table.written(table.interval(_TITLE[name], task))} % (chance {100 * CHANCE[task]:g}"
                + (f", without any depth at least {blind[task]:.1f})" if task in blind else ")")
                for task in ("Depth", "Distance")
                if task in table.columns
            ]
            yield f"Fed the teachers' features ({_TITLE[name]}): {', '.join(told)}."


def _of_answers(table: Seeds) -> Iterator[str]:
    if _TITLE[DISTILLED] not in table.over or _TITLE[SINGLE] not in table.values:
        return
    differences = {column: table.difference(_TITLE[DISTILLED], column) for column in table.columns}
    if differences[table.columns[0]].values < 2:
        yield "Of one seed alone nothing is said about answers."
        return
    told = ", ".join(f"{column} {signed(d, table.digits)}" for column, d in differences.items())
    overall = differences["Overall"]
    verdict = "more right answers" if overall.low > 0 else "fewer right answers" if overall.high < 0 else ""
    verdict = f"{verdict} overall" if verdict else "no difference overall that these seeds can tell from none"
    yield (
        f"Answers, distilled minus single encoder, in points: {told}. That is {verdict}. "
        f"{_apart(differences, table.digits)}"
    )


def _of_a_table(name: str, table: Seeds) -> Iterator[str]:
    """Each arm against the one that all are compared with, which the table says: over all tasks, and where it shows."""
    for arm, base in table.over.items():
        differences = {column: table.difference(arm, column) for column in table.columns}
        seeds = differences["Overall"].values
        told = f"{name.capitalize()}, {arm} minus {base}: {signed(differences['Overall'], table.digits)} points overall"
        if seeds < 2:
            yield f"{told} in one seed, of which alone nothing is said."
            continue
        yield f"{told} over {seeds} seeds. {_apart(differences, table.digits)}"


def _apart(differences: Mapping[str, Interval], digits: int) -> str:
    """Which columns' intervals leave out 0, some of which do by chance alone: nothing is corrected for their number."""
    found = [f"{column} {signed(d, digits)}" for column, d in differences.items() if d.without_zero]
    return (
        f"Of {len(differences)} intervals, each by itself and uncorrected, {len(found)} "
        f"{'leaves' if len(found) == 1 else 'leave'} out 0{': ' if found else ''}{', '.join(found)}."
    )


def signed(interval: Interval, digits: int) -> str:
    """+0.012 [+0.003, +0.021], and the mean alone of one value."""
    mean, low, high = (f"{x:+.{digits}f}" for x in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]" if interval.values > 1 else mean
