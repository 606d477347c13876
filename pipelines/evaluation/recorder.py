"""A model of lmms-eval whose answers are kept as they come, and whose failures are failures.

Models of lmms-eval hide errors: `llava_hf` logs what generation raised and answers nothing, `openai` answers
"[LMMS_EVAL_REQUEST_FAILED ...". A score over such answers would be of another model.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from accelerate import Accelerator
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger

from olavlm.pipelines.cli import JobFailed, Progress
from olavlm.student.errors import StudentError

from .asked_task import AskedTask
from .predictions import Prediction, Predictions

FAILURE = "[LMMS_EVAL_"
"""How an answer of lmms-eval begins that is none."""


class Recorder(lmms):
    """Stands ahead of a model: asks it only what no answer is kept for, a few questions at a time.

    Args:
        inner: any model of lmms-eval.
        tasks: by name, whose rows it is asked about.
        predictions: where answers are kept; each is on the disk before the next questions are asked.
        progress: of the questions that are left.
        chunk: questions that are given to the model together, and so the most that a kill loses.
    """

    def __init__(
        self, inner: lmms, tasks: Mapping[str, AskedTask], predictions: Predictions, progress: Progress, chunk: int
    ) -> None:
        super().__init__()
        self.inner, self.tasks, self.predictions = inner, tasks, predictions
        self.progress, self.chunk = progress, chunk
        self.is_simple, self.task_dict = inner.is_simple, inner.task_dict
        self.task_dict.update({name: task.dataset for name, task in tasks.items()})
        self._rank, self._world_size = inner.rank, inner.world_size
        self.accelerator = getattr(inner, "accelerator", None) or Accelerator()
        self.device = getattr(inner, "device", self.accelerator.device)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to all, in order, those that were kept among them.

        Raises:
            JobFailed: the model failed on a question; the answers before are kept.
        """
        known = {name: self.predictions.done(name) for name in self.tasks}
        left = [request for request in requests if request.doc_id not in known[request.task_name]]
        for chunk in chunks(left, self.chunk):
            for prediction in self._ask(chunk):
                known[prediction.task][prediction.index] = prediction
        return [known[request.task_name][request.doc_id].answer for request in requests]

    def _ask(self, requests: Sequence[Instance]) -> list[Prediction]:
        """Predictions for requests of one task, kept."""
        with errors_logged() as errors:
            try:
                outputs = self.inner.generate_until(list(requests))
            except (JobFailed, StudentError, OSError):
                raise
            except Exception as error:  # of a library that may raise anything
                logger.error(traceback.format_exc())
                self._fail(requests, f"{type(error).__name__}: {error}")
        if len(outputs) != len(requests):
            self._fail(requests, f"{len(outputs)} answers to {len(requests)} questions")
        given, failed = [], []
        for request, output in zip(requests, outputs, strict=True):
            answer = unwrap_generation_output(output)[0] or ""
            if answer.startswith(FAILURE) or (errors and not answer.strip()):
                failed.append((request, answer.strip() or errors[-1]))
            else:
                given.append(self._judged(request, answer))
        self.predictions.append(given)
        self.progress.update(len(given))
        if failed:
            self._fail([request for request, _ in failed], failed[0][1])
        return given

    def _judged(self, request: Instance, answer: str) -> Prediction:
        asked = self.tasks[request.task_name]
        item = asked.task.item(asked.rows.text(request.doc_id))
        return Prediction.judged(asked.task, request.doc_id, request.args[0], item, answer)

    def _fail(self, requests: Sequence[Instance], reason: str) -> NoReturn:
        rows = ", ".join(str(request.doc_id) for request in requests[:4]) + (" ..." if len(requests) > 4 else "")
        raise JobFailed(
            f"{requests[0].task_name} row {rows}: the model gave no answer ({' '.join(reason.split())[:300]}); "
            "answers so far are kept, and the same command goes on from them"
        ) from None

    def clean(self) -> None:
        """Frees the model."""
        self.inner.clean()

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """No task of ours needs it."""
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """No task of ours needs it."""
        raise NotImplementedError


def chunks(requests: Sequence[Instance], size: int) -> Iterator[list[Instance]]:
    """Up to `size` in a row, of one task."""
    chunk: list[Instance] = []
    for request in requests:
        if chunk and (len(chunk) == size or chunk[0].task_name != request.task_name):
            yield chunk
            chunk = []
        chunk.append(request)
    if chunk:
        yield chunk


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Errors that lmms-eval logs meanwhile, as they come."""
    found: list[str] = []
    sink = logger.add(lambda message: found.append(message.record["message"]), level="ERROR", format="{message}")
    try:
        yield found
    finally:
        logger.remove(sink)
