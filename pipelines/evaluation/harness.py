"""Asks a model what it has not been asked yet: lmms-eval's evaluator over our tasks, a recorder ahead of the model.

In several processes (`accelerate launch`) each asks every n-th row and keeps its answers in a file of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from olavlm.pipelines.cli import Progress, ending_at_once
from olavlm.student.processes import Process

from .backends import Backend, load
from .datasets import BenchmarkRows
from .predictions import Predictions
from .quiet import output_to


def ask(
    backend: Backend,
    rows: Mapping[str, BenchmarkRows],
    predictions: Predictions,
    process: Process,
    *,
    limit: int | None,
    seed: int,
    log: Path,
) -> None:
    """Have every row answered, the first `limit` of each task; all processes return when all are done.

    Raises:
        JobFailed: answers kept before are of other questions; the model cannot be loaded, or fails on a question.
    """
    left = sum(len(unanswered(of, predictions, process, limit)) for of in rows.values())
    if not left and process.count == 1:
        return
    title = "ask" if process.count == 1 else f"ask, process 1 of {process.count}"
    progress = Progress(left, "answers", title, silent=not process.is_main)
    if process.is_main:
        progress.say(f"loading {backend.checkpoint} as lmms-eval's {backend.name}; its log is {log}")
    with output_to(log, backend.secrets):
        import torch
        from lmms_eval.evaluator import evaluate

        from .asked_task import AskedTask
        from .recorder import Recorder

        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        process.join()
        model = load(backend, process.count)
        tasks = {name: AskedTask(of.task, of, chat=not model.is_simple) for name, of in rows.items()}
        progress.begin()
        with ending_at_once("olavlm-eval"):  # a served model is asked in threads
            evaluate(
                lm=Recorder(model, tasks, predictions, progress, backend.chunk),
                task_dict=tasks,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                process_docs_parallel=1,
            )
        if process.count > 1:
            process.leave()
    progress.close()


def unanswered(rows: BenchmarkRows, predictions: Predictions, process: Process, limit: int | None) -> list[int]:
    """Rows of this process that no answer is kept for. JobFailed for kept answers to other questions."""
    task = rows.task
    done = predictions.done(task.name)
    for index, prediction in done.items():
        if index < len(rows):
            row = rows.text(index)
            predictions.check(prediction, task.prompt(row), task.item(row))
    last = len(rows) if limit is None else min(limit, len(rows))
    return [index for index in range(process.rank, last, process.count) if index not in done]
