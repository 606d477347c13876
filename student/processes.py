"""The processes that a launcher started: which one this is, how they join and leave, and a wish to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # libraries that take seconds to import, and are not needed to know who one is
    from accelerate import Accelerator

PATIENCE = timedelta(hours=1)
"""That processes wait for one: an 8B model and its optimizer take longer to write than the ten minutes of NCCL."""


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

    def say(self, text: str) -> None:
        """A line on standard output, from the main process alone."""
        if self.is_main:
            print(text, flush=True)

    def join(self, mixed_precision: str | None = None) -> Accelerator:
        """Join the others, or stay joined, from now on in this precision (by default the launcher's)."""
        import torch
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        AcceleratorState._reset_state()  # what ran before in these processes may have had another precision
        # Without `cpu`, accelerate would take several processes on a machine without an accelerator for one each.
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        joined = accelerator.num_processes
        assert joined == self.count, f"{joined} of {self.count} processes see each other"
        return accelerator

    @staticmethod
    def leave() -> None:
        """Leave the others, when all is done: they cannot be joined twice."""
        from accelerate import PartialState

        PartialState().destroy_process_group()


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Inside, SIGINT and SIGTERM are a wish to stop: noted in the list, to be looked at between two steps of work."""
    noted: list[str] = []
    previous = {
        number: signal.signal(number, lambda n, frame: noted.append(signal.Signals(n).name))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
