"""The device that computes: batches of prepared images in, encoded features out, one batch after the other.

On a GPU nothing here waits for it. Images go up from pinned memory on a stream of their own while the batch before
computes, encoded features come down on a third, and events tell when both are done and how long the network took.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from olavlm.cache.codec import Codec
from olavlm.teachers import Teacher

from .encoding import Encoded, encode


@dataclass(frozen=True)
class Computed:
    """A batch that was computed."""

    encoded: Encoded
    """On the host, until `release`."""
    seconds: float
    spare: list[dict[str, torch.Tensor]]

    @property
    def computing(self) -> bool:
        """Whether the network is not yet done with the batch."""
        return False

    def wait_for_device(self) -> None:
        """Return when it is."""

    def wait(self) -> float:
        """Return when `encoded` can be read: the seconds that the device computed."""
        return self.seconds

    def release(self) -> None:
        """`encoded` was written, and its memory may hold another batch."""
        self.spare.append(self.encoded.parts)


@dataclass(frozen=True)
class Computing:
    """As `Computed`, of a batch that a GPU is at work on."""

    encoded: Encoded
    began: torch.cuda.Event
    ended: torch.cuda.Event
    arrived: torch.cuda.Event

    @property
    def computing(self) -> bool:
        return not self.ended.query()

    def wait_for_device(self) -> None:
        self.ended.synchronize()

    def wait(self) -> float:
        self.arrived.synchronize()
        return self.began.elapsed_time(self.ended) / 1000

    def release(self) -> None:
        """Pinned memory is kept by torch."""


class Cpu:
    """Forwards in the calling thread, one batch at a time."""

    def __init__(self) -> None:
        # One compute thread a worker: parallel sums would depend on the number of cores.
        torch.set_num_threads(1)
        _keep_freed_memory()
        # Large blocks of the C library are taken anew each time, zeroed page by page: as long as encoding takes.
        self._spare: dict[tuple, list[dict[str, torch.Tensor]]] = {}

    def room(self, rows: int, like: np.ndarray) -> torch.Tensor:
        """Uninitialised memory for a batch of prepared images, on the host."""
        return torch.from_numpy(np.empty((rows, *like.shape), like.dtype))

    def compute(self, forward: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, codec: Codec) -> Computed:
        """Features of a batch, encoded. Called by one thread at a time."""
        began = time.perf_counter()
        with torch.no_grad():
            features = forward(batch)
            spare = self._spare.setdefault((codec.name, features.shape), [])
            encoded = encode(codec, features, spare.pop() if spare else None)
        return Computed(encoded, time.perf_counter() - began, spare)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def _keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, for this whole process: it is the next layer's.

    By default large blocks go back to the system, which clears them page by page when they are asked for again: a
    quarter of the time of a Swin at 800 pixels in batches of 4. Other C libraries lack the call.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Gpu:
    """As `Cpu`, for CUDA."""

    def __init__(self, name: str) -> None:
        torch.backends.cudnn.allow_tf32 = False  # float32 on a card is float32 here too
        self._device = torch.device(name)
        self._up, self._down = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)

    def room(self, rows: int, like: np.ndarray) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
        return torch.empty((rows, *like.shape), dtype=dtype, pin_memory=True)

    def compute(self, forward: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, codec: Codec) -> Computing:
        began, ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        arrived = torch.cuda.Event(blocking=True)
        with torch.cuda.device(self._device), torch.no_grad():
            network = torch.cuda.current_stream()
            with torch.cuda.stream(self._up):
                batch = batch.to(self._device, non_blocking=True)
            network.wait_stream(self._up)
            batch.record_stream(network)
            began.record(network)
            encoded = encode(codec, forward(batch))
            ended.record(network)
            self._down.wait_event(ended)
            with torch.cuda.stream(self._down):
                encoded = encoded.to_host()
                arrived.record(self._down)
        return Computing(encoded, began, ended, arrived)


def tune(teacher: Teacher, *, compile: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The teacher's forward, made as fast as it goes without other answers than rounding's.

    A convolutional network computes with channels last: 3 to 6 % faster on a CPU, and what a GPU's tensor cores want.
    Transformers, whose patches do not overlap, lose by it.
    """
    network = getattr(teacher, "network", None)
    modules = network.modules() if isinstance(network, torch.nn.Module) else ()
    if any(isinstance(m, torch.nn.Conv2d) and m.kernel_size > m.stride for m in modules):
        network.to(memory_format=torch.channels_last)
    return torch.compile(teacher.forward) if compile else teacher.forward


def open_device(name: str) -> Cpu | Gpu:
    """`name` is torch's, resolved: cpu, cuda or cuda:N."""
    return Gpu(name) if torch.device(name).type == "cuda" else Cpu()
