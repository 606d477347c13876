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

import numpy as np

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
    carried_over: int = 0
    """Rows that were valid before, whose images cannot be had now: their stored bytes stay."""


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
            standing = self._shard.standing
            if standing is not None and standing.revision != task.supersedes:
                self.give_up("done")

    def append(
        self,
        encoded: Encoded | None,
        seconds: float,
        images_sha256: Sequence[str | None],
        rejections: Sequence[tuple[str, str] | None],
    ) -> None:
        """Write the next rows, or with None for `encoded` that the images of all of them are rejected.

        `rejections` has (reason, detail) for a row whose image was, `seconds` is what the device took. A row whose
        image was rejected, and which the shard to be replaced has sound features of, keeps those.
        """
        self._forward_seconds += seconds
        with self._noting():
            self._step("stage")
            images_sha256, rejections = list(images_sha256), list(rejections)
            carried = self._carry_over(images_sha256, rejections)
            if encoded is None:
                for i, (sha256, rejection) in enumerate(zip(images_sha256, rejections, strict=True)):
                    reason, detail = rejection or (None, "")
                    self._shard.append_stored(carried.get(i), image_sha256=sha256, reason=reason, detail=detail)
                return
            parts, reasons, fidelity = encoded.rows(len(rejections))
            for i, reason in enumerate(reasons):
                if i in carried:
                    for name, part in carried[i].items():
                        parts[name][i] = part
                elif reason and not rejections[i]:
                    rejections[i] = reason, ""
            fidelity = [
                None if r or i in carried else f for i, (r, f) in enumerate(zip(rejections, fidelity, strict=True))
            ]
            self._shard.append_batch(parts, images_sha256=images_sha256, rejections=rejections, fidelity=fidelity)

    def _carry_over(
        self, images_sha256: list[str | None], rejections: list[tuple[str, str] | None]
    ) -> dict[int, dict[str, np.ndarray]]:
        """The stored parts of those of the next rows that stay as they are, which are then rejected no more."""
        carried, first = {}, self._shard.next_row
        for i, rejection in enumerate(rejections):
            if rejection and (found := self._shard.carry_over(first + i)) is not None:
                carried[i], images_sha256[i] = found
                rejections[i] = None
        return carried

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
        quarantined, carried_over = self.task.num_rows - record.num_valid, self._shard.carried_over
        return ShardResult(self.task, "committed", "", quarantined, record.bytes, carried_over)
