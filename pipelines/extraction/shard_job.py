"""One shard on its way through a worker: leased, filled batch by batch, committed; or given up, once, for one reason.

Its steps are made by several threads, one after the other; any of them, and any other thread, may give it up. What
follows is then left out, and `close` drops what there is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from olavlm.cache import LeaseHeld, LeaseLost, OpenShard, ShardTask, ShardWriter, TeacherFeatures
from olavlm.cache.records import Record
from olavlm.teachers import Teacher

from .encoding import Encoded

_DROPPED_BEFORE = ("lease", "recover", "stage", "compare", "fsync")  # steps of a commit; a later one ends it


@dataclass
class ShardResult:
    """What became of a task.

    `outcome` is "committed", "done" (another writer was first), "held" (one is at work on it), "lost" (one took it
    over), "dropped" (the worker was stopped) or "failed" (`detail` says why, on one line).
    """

    task: ShardTask
    outcome: str
    detail: str = ""
    quarantined: int = 0
    bytes: int = 0


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _GivenUp(Exception):
    pass


class ShardJob:
    """Extracts one task: `open`, `append` in row order, `close`. None of them raises; `result` tells."""

    def __init__(self, task: ShardTask, teacher: Teacher, group: TeacherFeatures, device: str) -> None:
        self.task, self.teacher, self.group, self._device = task, teacher, group, device
        self.opening: Future | None = None
        """Of `open`, once it was asked for."""
        self.ending = False
        """Whether `close` was asked for."""
        self.done = threading.Event()
        """Set by whoever called `close`, when all is told."""
        self.result: ShardResult | None = None
        self._given_up: tuple[str, str] | None = None
        self._lock, self._renewing = threading.Lock(), threading.Lock()
        self._closing = False
        self._shard: OpenShard | None = None
        self._began, self._forward_seconds = time.perf_counter(), 0.0

    @property
    def live(self) -> bool:
        return self._given_up is None

    def give_up(self, outcome: str, detail: str = "") -> None:
        """The first reason counts, and none after the commit."""
        with self._lock:
            self._given_up = self._given_up or (outcome, detail)

    def fail(self, error: Exception) -> None:
        self.give_up("failed", one_line(error))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except LeaseHeld:
            self.give_up("held")
        except LeaseLost:
            self.give_up("lost")
        except _GivenUp:
            pass
        except Exception as e:
            self.fail(e)

    def _step(self, step: str) -> None:
        if not self.live and step in _DROPPED_BEFORE:
            raise _GivenUp

    def open(self) -> None:
        """Take the shard's lease."""
        task, self._began = self.task, time.perf_counter()
        with self._noting():
            writer = ShardWriter(self.group.folder, self.group.layout, self.group.fingerprint, self._step)
            self._shard = writer.begin(task.shard, (task.start, task.stop), task.segment)
            standing = writer.valid_record(task.shard)
            if standing is not None and standing.revision != task.supersedes:
                self.give_up("done")

    def append(
        self,
        encoded: Encoded | None,
        seconds: float,
        images_sha256: Sequence[str | None],
        rejections: Sequence[tuple[str, str] | None],
    ) -> None:
        """Write the next rows, or with None for `encoded` that all of them are rejected.

        `rejections` has (reason, detail) for a row whose image was, `seconds` is what the device took.
        """
        self._forward_seconds += seconds
        with self._noting():
            self._step("stage")
            if encoded is None:
                for sha256, (reason, detail) in zip(images_sha256, rejections, strict=True):
                    self._shard.append_stored(None, image_sha256=sha256, reason=reason, detail=detail)
                return
            parts, reasons, fidelity = encoded.rows(len(rejections))
            rejections = [r or (reason and (reason, "")) for r, reason in zip(rejections, reasons, strict=True)]
            fidelity = [None if r else f for r, f in zip(rejections, fidelity, strict=True)]
            self._shard.append_batch(parts, images_sha256=images_sha256, rejections=rejections, fidelity=fidelity)

    def renew(self) -> None:
        """Give a sign of life while the shard is leased."""
        with self._noting(), self._renewing:
            if self._shard is not None and self.live and not self._closing:
                self._shard.lease.renew()

    def close(self) -> None:
        """Commit the shard, or drop it if it was given up; `result` is set."""
        if self.opening is not None:
            self.opening.result()
        with self._renewing:
            self._closing = True  # a lease that is released must not be renewed
        record = None
        with self._noting():
            if self._shard is not None:
                with self._shard:
                    self._step("stage")
                    record = self._commit()
        self.result = self._result(record)

    def _commit(self) -> Record:
        timings = {"extract_s": time.perf_counter() - self._began, "forward_s": self._forward_seconds}
        return self._shard.commit(timings=timings, host={"device": self._device})

    def _result(self, record: Record | None) -> ShardResult:
        if record is None:
            return ShardResult(self.task, *self._given_up)
        return ShardResult(self.task, "committed", "", self.task.num_rows - record.num_valid, record.bytes)
