"""Answers on disk, a line each, from which an interrupted evaluation goes on and scores are computed again.

    FOLDER/cv_bench.jsonl              what one process wrote, or all did once they were merged, in the order of index
    FOLDER/cv_bench.rank-3.jsonl       what the process of rank 3 has written

A line is {"task", "index", "prompt", "item", "answer", "parsed", "score"}: the row of the dataset, the text that
followed the image, what of the row the score depends on, the answer as it came, what was read in it (null: nothing)
and what it is worth.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from olavlm.cache import files
from olavlm.pipelines.cli import JobFailed

from .tasks.task import Item, Task


@dataclass(frozen=True)
class Prediction:
    """An answer to an item of a task, and how it was judged when it came."""

    task: str
    index: int
    """Of the row in the benchmark's split, from 0."""

    prompt: str
    item: Item
    answer: str
    parsed: str | None
    score: float

    @classmethod
    def judged(cls, task: Task, index: int, prompt: str, item: Item, answer: str) -> Prediction:
        judgement = task.judge(item, answer)
        return cls(task.name, index, prompt, item, answer, judgement.parsed, judgement.score)


class Predictions:
    """The predictions in a folder. Each process appends to a file of its own, and reads those of all.

    What `append` returned from is durable. A line that was being written when its process died has no end: it counts
    as never written, and the next to append to its file takes it away.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank

    def done(self, task: str) -> dict[int, Prediction]:
        """All predictions of a task by index, in that order.

        Raises:
            JobFailed: a line that is no prediction of the task, or two that differ for one index.
        """
        found: dict[int, tuple[Prediction, str]] = {}
        for file in self._files(task):
            for number, line in enumerate(_whole_lines(file), 1):
                where = f"{file}:{number}"
                new = _parse(line, task, where)
                known, there = found.setdefault(new.index, (new, where))
                if known != new:
                    raise JobFailed(f"{where} and {there} are two answers to item {new.index} of {task}; remove one")
        return {index: found[index][0] for index in sorted(found)}

    def check(self, stored: Prediction, prompt: str, item: Item) -> None:
        """JobFailed unless a stored prediction answers what would be asked now."""
        for what, then, now in (("prompt", stored.prompt, prompt), ("item", stored.item, item)):
            if then != now:
                was, would_be = _where_they_differ(then, now)
                raise JobFailed(
                    f"{self.folder}: the {what} of {stored.task}, item {stored.index}, was {was} and would be "
                    f"{would_be}: it answers another dataset or protocol; give another folder, or remove the file"
                )

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write predictions, durable when it returns. They are to be new: what is there is not looked at again."""
        lines: dict[str, list[bytes]] = {}
        for prediction in predictions:
            lines.setdefault(prediction.task, []).append(_as_line(prediction))
        for task, those in lines.items():
            file = self._own_file(task)
            if not file.exists():
                files.make_folder(self.folder)
                file.touch()
                files.fsync_folder(self.folder)
            with file.open("r+b") as f:
                f.truncate(_end_of_lines(f))
                f.seek(0, os.SEEK_END)
                f.write(b"".join(those))
                f.flush()
                os.fsync(f.fileno())

    def merge(self, task: str) -> dict[int, Prediction]:
        """Make one file of those of all processes, which have ended, in the order of index; what it holds.

        At any instant every prediction is in one of the files at least.
        """
        found, parts = self.done(task), self._files(task)
        if not found:
            return found
        whole = self.folder / f"{task}.jsonl"
        files.replace(whole, b"".join(map(_as_line, found.values())))
        for part in parts:
            if part != whole:
                part.unlink()
        return found

    def _own_file(self, task: str) -> Path:
        return self.folder / (f"{task}.rank-{self.rank}.jsonl" if self.rank else f"{task}.jsonl")

    def _files(self, task: str) -> list[Path]:
        name = re.compile(rf"{re.escape(task)}(\.rank-\d+)?\.jsonl")
        return sorted(f for f in self.folder.iterdir() if name.fullmatch(f.name)) if self.folder.is_dir() else []


def _as_line(prediction: Prediction) -> bytes:
    """What is no text, half of a surrogate pair in a served model's answer, becomes JSON's escape of it."""
    line = json.dumps(asdict(prediction), ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode(errors="backslashreplace")


def _end_of_lines(f: BinaryIO) -> int:
    """Where the last whole line ends."""
    size = f.seek(0, os.SEEK_END)
    f.seek(max(0, size - 1))
    if f.read(1) in (b"", b"\n"):
        return size
    f.seek(0)
    return f.read().rfind(b"\n") + 1


def _whole_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1]


def _parse(line: bytes, task: str, where: str) -> Prediction:
    try:
        found = Prediction(**json.loads(line))
    except (ValueError, TypeError) as e:
        raise JobFailed(f"{where} is no prediction ({e}); remove the line, and it is asked again") from None
    texts = isinstance(found.prompt, str) and isinstance(found.answer, str) and isinstance(found.item, dict)
    parsed = found.parsed is None or isinstance(found.parsed, str)
    numbers = type(found.index) is int and found.index >= 0 and type(found.score) in (int, float)
    if found.task != task or not (texts and parsed and numbers and 0 <= found.score <= 1):
        raise JobFailed(f"{where} is no prediction of {task}; remove the line, and it is asked again")
    return found


def _where_they_differ(*both: object) -> list[str]:
    """Some of each, from a little before their first difference."""
    texts = [str(one) for one in both]
    first = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    begin = max(0, first - 20)
    return [repr("..." * bool(begin) + text[begin : first + 40] + "..." * bool(text[first + 40 :])) for text in texts]
