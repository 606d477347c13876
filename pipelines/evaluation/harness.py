"""Asks a model what it has not been asked yet: lmms-eval's evaluator over our tasks, a recorder ahead of the model.

In several processes (`accelerate launch`) each asks every n-th row and keeps its answers in a file of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olavlm.pipelines.cli import Progress

from .backends import Backend, load
from .datasets import BenchmarkRows
from .predictions import Predictions
from .quiet import output_to


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is."""

    rank: int
    count: int

    @classmethod
    def launched(cls) -> Process:
        """As accelerate or torchrun has launched it; alone without either."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_main(self) -> bool:
        """Whether it writes and prints what all have done."""
        return self.rank == 0

    def join(self) -> None:
        """Join the others, ahead of any model of lmms-eval: without `cpu` accelerate would take several processes on a
        machine without an accelerator for one each."""
        import torch
        from accelerate import Accelerator

        joined = Accelerator(cpu=not torch.accelerator.is_available()).num_processes
        assert joined == self.count, f"{joined} of {self.count} processes see each other"

    def leave(self) -> None:
        """Leave them, when all is done."""
        from accelerate import PartialState

        PartialState().destroy_process_group()


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
    with output_to(log, backend.secret):
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
