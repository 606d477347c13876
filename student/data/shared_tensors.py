"""The tensors of a micro-batch in one buffer, which a loader process shares with the trainer.

What a loader writes there is where the trainer finds it: one file descriptor crosses, for however many tensors, and no
byte goes through a pipe. One copy then pins them all.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from olavlm.student.errors import TrainingError

Shape = tuple[tuple[int, ...], torch.dtype]
"""Of a tensor that is to be."""
SHARED_MEMORY = "/dev/shm"
_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every item


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).view(self.shape)


def allocate(shapes: dict[str, Any]) -> dict[str, Any]:
    """Tensors, uninitialised, of these `Shape`s, in dicts nested as they are; of a tensor in place of a shape, a copy.

    In a loader process they are shared.

    Raises:
        TrainingError: there is no shared memory left.
    """
    end = 0
    given: list[tuple[_Place, torch.Tensor]] = []

    def place(wanted: Shape | torch.Tensor) -> _Place:
        nonlocal end
        shape = (tuple(wanted.shape), wanted.dtype) if isinstance(wanted, torch.Tensor) else wanted
        placed = _Place(-(-end // _ALIGNMENT) * _ALIGNMENT, *shape)
        end = placed.offset + math.prod(placed.shape) * placed.dtype.itemsize
        if isinstance(wanted, torch.Tensor):
            given.append((placed, wanted))
        return placed

    places = _mapped(shapes, place)
    buffer = _buffer(end)
    for placed, tensor in given:
        placed.of(buffer).copy_(tensor)
    return _mapped(places, lambda placed: placed.of(buffer))


def pack(content: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """A buffer, uint8, with all tensors of nested dicts, and the dicts with their places in it; `unpack` undoes it.

    Tensors of one `allocate` are in one already, and are not copied.
    """
    tensors: list[torch.Tensor] = []
    _mapped(content, lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    if len(storages) != 1 or not all(tensor.is_contiguous() for tensor in tensors):
        copies = allocate({str(id(tensor)): tensor for tensor in tensors})
        content = _mapped(content, lambda value: copies[str(id(value))] if isinstance(value, torch.Tensor) else value)
        storages = {0: next(iter(copies.values())).untyped_storage()} if copies else {0: torch.UntypedStorage(0)}
    (storage,) = storages.values()

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return _Place(value.storage_offset() * value.element_size(), tuple(value.shape), value.dtype)

    return torch.empty(0, dtype=torch.uint8).set_(storage), _mapped(content, place)


def unpack(buffer: torch.Tensor, content: dict[str, Any]) -> dict[str, Any]:
    """The dicts that were packed, with their tensors as views of the buffer."""
    return _mapped(content, lambda value: value.of(buffer) if isinstance(value, _Place) else value)


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {name: _mapped(branch, function) for name, branch in tree.items()}
    return function(tree)


def _buffer(num_bytes: int) -> torch.Tensor:
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(
            num_bytes, device="cpu"
        )  # as the library's own collate function does
    except RuntimeError as e:
        if os.strerror(errno.EMFILE) in str(e):
            raise TrainingError(
                f"a loader process has too many files open ({e}); raise the limit (ulimit -n), or lower data.workers"
            ) from None
        raise TrainingError(
            f"no shared memory for a micro-batch of {num_bytes / 1e6:.0f} MB ({e}); {shared_memory_remedy()}"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def shared_memory_remedy() -> str:
    """What is left of the memory that loaders and trainer share, and what to do."""
    try:
        left = f"{SHARED_MEMORY} has {shutil.disk_usage(SHARED_MEMORY).free / 1e6:.0f} MB left: "
    except OSError:  # no Linux
        left = ""
    return f"{left}give the container more (docker run --shm-size 8g, or --ipc host), or lower data.workers"
