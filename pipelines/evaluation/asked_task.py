"""A benchmark of ours as a task of lmms-eval: its evaluator asks any of its models with our prompt, on our rows.

lmms-eval has tasks of these names too. They are not used: in 0.7.3 those of CV-Bench, MMStar and RealWorldQA ask and
parse otherwise than the paper did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task as LmmsTask
from lmms_eval.api.task import TaskConfig
from lmms_eval.filters import build_filter_ensemble

from .datasets import IMAGE, BenchmarkRows
from .tasks.task import Task

Message = dict[str, Any]


class AskedTask(LmmsTask):
    """What lmms-eval's evaluator reads of a task.

    Args:
        task: the benchmark.
        rows: of its dataset.
        chat: how the model takes a question: as messages with pictures in them, or as text and pictures apart.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, task: Task, rows: BenchmarkRows, *, chat: bool) -> None:
        self.task, self.rows, self.chat = task, rows, chat
        self.task_name, self.dataset = task.name, {task.published.split: rows}
        options = {"max_new_tokens": task.max_new_tokens, "temperature": 0, "do_sample": False, "until": []}
        self._config = TaskConfig(
            task=task.name, test_split=task.published.split, num_fewshot=0, generation_kwargs=options
        )
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]
        self._instances: list[Instance] = []

    def build_all_requests(
        self, *, limit: int | None = None, rank: int = 0, world_size: int = 1, **options: Any
    ) -> None:
        """The questions of one process; further options are of few-shot prompts and of a cache."""
        self._instances = [self.construct_requests(index, "") for index in self._indices(limit, rank, world_size)]

    def construct_requests(self, doc_id: int, ctx: str, **kwargs: Any) -> Instance:
        """One question. Models change the options that they are given, so that each has its own."""
        options = copy.deepcopy(self.config.generation_kwargs)
        split, text = self.config.test_split, self.task.prompt(self.rows.text(doc_id))
        if self.chat:
            arguments = (text, self.doc_to_messages, options, doc_id, self.task_name, split)
        else:
            arguments = (text, options, self.doc_to_visual, doc_id, self.task_name, split)
        metadata = {"task": self.task_name, "doc_id": doc_id, "repeats": 1, "split": split}
        return Instance(request_type=self.OUTPUT_TYPE, arguments=arguments, idx=0, metadata=metadata)

    def doc_to_messages(self, doc: dict[str, Any]) -> list[Message]:
        """The picture, then the question."""
        content = [{"type": "image", "url": doc[IMAGE]}, {"type": "text", "text": self.doc_to_text(doc)}]
        return [{"role": "user", "content": content}]

    def doc_to_visual(self, doc: dict[str, Any]) -> list[Any]:
        """The picture."""
        return [doc[IMAGE]]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        """The question."""
        return self.task.prompt(doc)

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        """Not read: `process_results` judges by the row."""
        return ""

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        """The score of an answer. lmms-eval's mean of them is not reported; the weighted figures of the task are."""
        return {"score": self.task.judge(self.task.item(doc), results[0]).score}

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        """How lmms-eval is to aggregate scores over rows."""
        return {"score": lambda scores: sum(scores) / len(scores)}

    def higher_is_better(self) -> dict[str, bool]:
        """Whether a higher value of each score is better."""
        return {"score": True}

    def doc_iterator(
        self, *, rank: int = 0, limit: int | None = None, world_size: int = 1, offset: int = 0
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows that were asked about, without pictures."""
        return ((index, self.rows.text(index)) for index in self._indices(limit, rank, world_size))

    def _indices(self, limit: int | None, rank: int, world_size: int) -> range:
        return range(rank, len(self.rows) if limit is None else min(limit, len(self.rows)), world_size)

    def has_training_docs(self) -> bool:
        """No."""
        return False

    def has_validation_docs(self) -> bool:
        """No."""
        return False

    def has_test_docs(self) -> bool:
        """What there is."""
        return True

    def test_docs(self) -> BenchmarkRows:
        """The rows."""
        return self.rows
