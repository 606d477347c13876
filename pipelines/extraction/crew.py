"""Those who extract, as the scheduler knows them: what can be asked of them, and what they tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from .blocks import Block
from .extractor import ShardResult, WorkerStatus


class Worker(Protocol):
    """One of the crew; compared by identity."""

    name: str
    """for messages: number and host"""


@dataclass(frozen=True)
class Ready:
    """It has loaded its teachers."""

    worker: Worker


@dataclass(frozen=True)
class Looked:
    """It answered a look at it."""

    worker: Worker
    status: WorkerStatus


@dataclass(frozen=True)
class Returned:
    """It has done with a block."""

    worker: Worker
    results: Sequence[ShardResult]
    block: Block


@dataclass(frozen=True)
class Gone:
    """It died, or is of no more use: it could not load its teachers, or its device is broken."""

    worker: Worker
    reason: str


Event: TypeAlias = Ready | Looked | Returned | Gone


class Crew(Protocol):
    """The workers. A worker that was dismissed, or is gone, is not heard of again."""

    elastic: bool
    """Whether room for workers may come later."""
    obstacle: str
    """Why no more workers could be started, as far as is known."""

    def room(self) -> int:
        """The number of workers that can be at work at once."""
        ...

    def hire(self, wanted: int) -> int:
        """Start workers until so many are ready or starting, as far as there is room; returns how many are."""
        ...

    def give(self, worker: Worker, block: Block) -> None: ...

    def look(self, seconds: float) -> Sequence[Event]:
        """What has happened; waits up to so long for anything."""
        ...

    def last_look(self) -> Sequence[Looked]:
        """One more look at everyone, for the summary."""
        ...

    def dismiss(self, worker: Worker, blame: str = "") -> None:
        """Kill it. `blame`: what is wrong with it, and may be with its node, which is left alone after a few times."""
        ...

    def stop(self) -> None:
        """Ask all to drop what they have in flight; their blocks return soon."""
        ...
