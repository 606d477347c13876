"""How long a step's copies from host to device take, without making the device wait for the host or the host for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CopyClock:
    """Sums the time of marked blocks: on CUDA by events in the stream, elsewhere by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_stream = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._milliseconds = 0.0

    @contextmanager
    def copies(self) -> Iterator[None]:
        """A block of copies, and nothing else that the device does."""
        if self._on_stream:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            begun = time.perf_counter()
            yield
            self._milliseconds += 1000 * (time.perf_counter() - begun)

    def take(self) -> float:
        """Milliseconds since the last call. To be called when what was copied has been used and its results read, so
        that the events lie in the past: then nothing is waited for."""
        for start, end in self._events:
            end.synchronize()
            self._milliseconds += start.elapsed_time(end)
        self._events.clear()
        taken, self._milliseconds = self._milliseconds, 0.0
        return taken
