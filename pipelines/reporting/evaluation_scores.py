"""A run's scores on the paper's benchmarks beside the paper's rows, as `olavlm-eval RUN` leaves them in the run."""

from __future__ import annotations

import json

from olavlm.pipelines.evaluation.sheet import Sheet
from olavlm.pipelines.evaluation.table import all_figures, beside_paper

from .page import block, note, table
from .runs import Run
from .settings import Settings

FILE = "benchmarks/scores.json"


def show_evaluation(run: Run, settings: Settings) -> str:
    """The paper's tables with the run's row, then all of its figures; '' for a run that was not evaluated."""
    file = run.folder / FILE
    if not file.is_file():
        return ""
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        sheets = [*beside_paper({run.name: tasks}), all_figures(run.name, tasks)]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return block("Benchmarks", note(f"{FILE} is no file of olavlm-eval: {e!r}"))
    return block("Benchmarks", "".join(map(_shown, sheets)), "As olavlm-eval asked and scored the model.")


def _shown(sheet: Sheet) -> str:
    numbers = range(sheet.labels, len(sheet.head))
    return table(sheet.title, sheet.head, sheet.rows, numbers=numbers, shown=True) + "".join(map(note, sheet.notes))
