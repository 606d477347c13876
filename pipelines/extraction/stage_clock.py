"""Where a worker's time goes, so that a summary can name the slowest of its stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Stages:
    """Seconds, summed over the life of a worker; addable over workers.

    The largest is the bottleneck. What is none of them is time without work, or Python's own.
    """

    device: float = 0.0  # it computed
    images: float = 0.0  # it waited for images to be read, decoded and prepared
    disk: float = 0.0  # it waited for shards to be leased, and features to be written and committed

    def __add__(self, other: Stages) -> Stages:
        return Stages(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class StageClock:
    """Adds up `Stages` from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = {f.name: 0.0 for f in fields(Stages)}
        self._turns = self._commits = 0
        self._since = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block has the device."""
        self._change(turns=1)
        try:
            yield
        finally:
            self._change(turns=-1)

    @contextmanager
    def last_commits(self) -> Iterator[None]:
        """A block waits for its last commits: to the disk while no other block has the device, else to nobody."""
        self._change(commits=1)
        try:
            yield
        finally:
            self._change(commits=-1)

    def _change(self, turns: int = 0, commits: int = 0) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._commits and not self._turns:
                self._seconds["disk"] += now - self._since
            self._since = now
            self._turns += turns
            self._commits += commits

    def read(self) -> Stages:
        self._change()
        with self._lock:
            return Stages(**self._seconds)
