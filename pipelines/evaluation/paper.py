"""Rows of tables 1, 2 and 7 of arXiv 2412.09585 (version 1), in per cent, and what can be checked of them.

Table 1's averages are means of its seven columns, which reproduce to rounding or truncation but for one row; the
average of table 2 is CV-Bench's overall score and no mean of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal


@dataclass(frozen=True)
class Column:
    """What a column shows: a figure of a task."""

    header: str
    task: str
    figure: str


@dataclass(frozen=True)
class PaperRow:
    """A model as the paper scores it."""

    labels: tuple[str, ...]
    values: tuple[Decimal, ...]
    average: Decimal
    """As printed."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    labels: tuple[str, ...]
    """Headers of the rows' labels; the first is the method's."""

    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]
    average: Column | None = None
    """What `Avg` is where it is no mean of the columns."""


def mean(row: PaperRow) -> Decimal:
    """Mean of a row's columns, not rounded."""
    return sum(row.values, Decimal(0)) / len(row.values)


def is_mean(row: PaperRow) -> bool:
    """Whether the printed average is the mean of the columns, rounded or truncated to its one place."""
    return row.average in {mean(row).quantize(Decimal("0.1"), way) for way in (ROUND_HALF_UP, ROUND_DOWN)}


def slips(table: PaperTable) -> list[PaperRow]:
    """Rows whose average is to be the mean of the columns and is not."""
    return [] if table.average else [row for row in table.rows if not is_mean(row)]


def _rows(*rows: str) -> tuple[PaperRow, ...]:
    """Rows of a table, from lines `label | label | value value ... average`."""
    parsed = []
    for row in rows:
        *labels, numbers = (part.strip() for part in row.split("|"))
        *values, average = map(Decimal, numbers.split())
        parsed.append(PaperRow(tuple(labels), tuple(values), average))
    return tuple(parsed)


_VIT, _CONVNEXT = "CLIP ViT-L", "CLIP ConvNeXT-XXL"
COUNT, RELATION = Column("Count2D", "cv_bench", "Count"), Column("Relation2D", "cv_bench", "Relation")
DEPTH, DISTANCE = Column("Depth3D", "cv_bench", "Depth"), Column("Distance3D", "cv_bench", "Distance")
MMSTAR = Column("MMStar", "mmstar", "Final")
OK_VQA = Column("OK-VQA", "ok_vqa", "Accuracy")

TABLE_1 = PaperTable(
    title="Table 1: the four benchmarks",
    labels=("method", "LLM", "encoder"),
    columns=(COUNT, DEPTH, RELATION, DISTANCE, MMSTAR, Column("RWQA", "realworldqa", "Accuracy"), OK_VQA),
    rows=_rows(
        f"LLaVA-1.5 | Phi3-4k-mini | {_VIT} | 52.4 67.2 75.2 56.3 36.5 57.1 56.7 57.3",
        f"OLA-VLM | Phi3-4k-mini | {_VIT} | 52.4 68.7 76.0 56.7 36.0 58.0 56.4 57.7",
        f"LLaVA-1.5 | Phi3-4k-mini | {_CONVNEXT} | 51.8 70.8 74.0 55.3 36.4 58.0 55.9 57.4",
        f"OLA-VLM | Phi3-4k-mini | {_CONVNEXT} | 49.4 72.5 77.2 60.3 38.4 58.4 56.5 58.9",
        f"LLaVA-1.5 | Llama3-8b | {_VIT} | 50.4 73.3 64.9 48.7 38.8 57.8 56.9 55.1",
        f"LLaVA-1.5 (feat concat.) | Llama3-8b | {_VIT} + depth + seg + gen | 45.3 75.5 70.9 54.3 36.1 57.5 58.3 56.8",
        f"LLaVA-1.5 (token concat.) | Llama3-8b | {_VIT} + depth + seg + gen | 45.9 75.7 68.9 52.7 37.8 56.5 59.3 56.7",
        f"OLA-VLM | Llama3-8b | {_VIT} | 51.3 74.2 69.4 54.3 39.5 57.9 56.6 57.6",
        f"LLaVA-1.5 | Llama3-8b | {_CONVNEXT} | 54.1 62.8 69.5 49.8 37.4 57.5 56.3 55.3",
        f"OLA-VLM | Llama3-8b | {_CONVNEXT} | 57.4 71.5 66.8 52.8 38.5 55.0 59.0 57.3",
    ),
)

TABLE_2 = PaperTable(
    title=f"Table 2: CV-Bench, models of PT, VPT and IFT, {_CONVNEXT}",
    labels=("method", "LLM"),
    columns=(COUNT, DEPTH, RELATION, DISTANCE),
    average=Column("Avg", "cv_bench", "Overall"),
    rows=_rows(
        "LLaVA-1.5 | Phi3-4k-mini | 49.7 70.0 72.6 58.7 61.8",
        "OLA-VLM | Phi3-4k-mini | 53.7 72.0 73.1 58.5 63.4",
        "LLaVA-1.5 | Llama3-8b | 56.3 76.8 73.1 50.3 63.3",
        "OLA-VLM | Llama3-8b | 60.0 75.0 70.8 55.2 64.6",
    ),
)

TABLE_7 = PaperTable(
    title=f"Table 7: data of PT, {_CONVNEXT}, Llama3-8b",
    labels=("method", "data of PT"),
    columns=(Column("CV-Bench2D", "cv_bench", "2D"), Column("CV-Bench3D", "cv_bench", "3D"), MMSTAR, OK_VQA),
    rows=_rows(
        "LLaVA-1.5 | LLaVA-558K | 60.0 56.3 37.4 56.0 52.4",
        "LLaVA-1.5 | LLaVA-558K + ALLaVA-Caption-663K | 56.8 60.8 37.1 57.5 53.1",
        "OLA-VLM | LLaVA-558K | 60.8 62.2 38.5 59.0 55.1",
    ),
)

TABLES: Sequence[PaperTable] = (TABLE_1, TABLE_2, TABLE_7)
