"""Benchmarks with the protocols of the paper's tables, by the names that `olavlm-eval --tasks` takes."""

from olavlm.pipelines.cli import UsageError

from .cv_bench import CV_BENCH
from .mmstar import MMSTAR
from .ok_vqa import OK_VQA
from .realworldqa import REALWORLDQA
from .task import Item, Judgement, Published, Row, Task

TASKS = {task.name: task for task in (CV_BENCH, MMSTAR, REALWORLDQA, OK_VQA)}
ALIASES = {"ok_vqa_val2014": "ok_vqa"}
"""lmms-eval's names of the same benchmarks."""


def task_named(name: str) -> Task:
    """Raises UsageError with the valid names if there is none."""
    try:
        return TASKS[ALIASES.get(name, name)]
    except KeyError:
        raise UsageError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}") from None


__all__ = ["ALIASES", "TASKS", "Item", "Judgement", "Published", "Row", "Task", "task_named"]
