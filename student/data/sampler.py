"""Which samples make the global batch of step k: a function of (seed, epoch, k, global batch size) alone.

Ranks and micro-batches only share it out, so that the same run on another number of processes sees the same samples in
the same order, and a resumed run needs no state but its step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np


class BatchSampler(Protocol):
    """Which samples a rank trains on, or reads, in each step."""

    def __len__(self) -> int:
        """Steps of an epoch."""

    def slices(self, step: int, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
        """The micro-batches of one rank, each of dataset indices, int64."""


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Every epoch is a new permutation, cut into full global batches; the last is filled up from the epoch's start.

    With `group_by_modality` a batch holds image samples or text-only ones alone, except the epoch's last batches: what
    is left over of the two, in dataset order.

    With `block`, samples whose rows fall into the same block of so many rows follow each other, in random order; and so
    do the blocks. Where the two come together, blocks are made of each modality's own samples.
    """

    has_image: np.ndarray
    """bool (samples,)"""
    global_batch_size: int
    seed: int
    group_by_modality: bool = False
    rows: np.ndarray | None = None
    """int64 (samples,): where a sample's image lies in the store; -1 without one. Wanted with `block` alone."""
    block: int | None = None
    lengths: np.ndarray | None = None
    """int64 (samples,): with them, a global batch is cut by length, so that no process waits for another's padding."""
    packed: bool = False
    """Whether the model runs without padding: then it is tokens that processes are to have in equal numbers."""

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.has_image) // self.global_batch_size)

    def __hash__(self) -> int:
        return id(self)

    def batch(self, step: int) -> np.ndarray:
        """Dataset indices of the global batch of a step (from 0), int64 (global_batch_size,)."""
        epoch, k = divmod(step, len(self))
        return self._epoch(epoch)[k]

    def slices(self, step: int, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
        """The micro-batches of one rank. Over ranks and micro-batches they are the global batch, without overlap.

        With lengths the longest samples come first. Padded, a micro-batch takes as long as its longest sample makes it,
        so that it has samples of like lengths; ranks take one each in turn, there and back again, to have equal sums of
        longest ones. Packed, each sample goes where there are the fewest tokens yet: every micro-batch of every rank
        has nearly as many.
        """
        batch = self.batch(step)
        if self.lengths is None:
            return list(batch.reshape(world_size, accumulation, -1)[rank])
        batch = batch[np.argsort(-self.lengths[batch], kind="stable")]
        if self.packed:
            return _dealt(batch, self.lengths[batch], accumulation * world_size)[rank::world_size]
        blocks = batch.reshape(accumulation, world_size, -1)
        return [of[rank if turn % 2 == 0 else world_size - 1 - rank] for turn, of in enumerate(blocks)]

    @lru_cache(maxsize=2)  # noqa: B019 - a sampler lives as long as its run
    def _epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        size = self.global_batch_size
        if not self.group_by_modality:
            order = self._shuffled(generator, np.arange(len(self.has_image)))
            return np.resize(order, (len(self), size))
        batches, left = [], []
        for members in (self._image_samples, self._text_samples):
            order = self._shuffled(generator, members)
            full = len(order) // size * size
            batches.append(order[:full].reshape(-1, size))
            left.append(order[full:])
        full_batches = generator.permutation(np.concatenate(batches))
        rest = np.sort(np.concatenate(left))
        order = np.concatenate([full_batches.reshape(-1), rest])
        return np.resize(order, (len(self), size))

    def _shuffled(self, generator: np.random.Generator, members: np.ndarray) -> np.ndarray:
        """Members in the epoch's order."""
        if self.block is None:
            return generator.permutation(members)
        rows = self.rows[members]
        alone = rows.max(initial=0) // self.block + 1 + np.arange(len(members))  # blocks of one: no row, no neighbour
        _, block_of = np.unique(np.where(rows < 0, alone, rows // self.block), return_inverse=True)
        place = generator.permutation(block_of.max(initial=-1) + 1)
        return members[np.lexsort((generator.random(len(members)), place[block_of]))]

    @cached_property
    def _image_samples(self) -> np.ndarray:
        return np.flatnonzero(self.has_image)

    @cached_property
    def _text_samples(self) -> np.ndarray:
        return np.flatnonzero(~self.has_image)


def _dealt(members: np.ndarray, lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Parts of equally many members and nearly equal sums of lengths; members come longest first.

    Each goes to the part that is shortest so far and has room (LPT, Graham 1969). What all have in common, such as an
    image's tokens, is not counted: parts of one size have it alike, and counted it would send each round to all parts.
    """
    size = len(members) // num_parts
    lengths = lengths - lengths.min()
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    open_parts = [(0, number) for number in range(num_parts)]
    for member, length in zip(members.tolist(), lengths.tolist(), strict=True):
        total, number = heapq.heappop(open_parts)
        parts[number].append(member)
        if len(parts[number]) < size:
            heapq.heappush(open_parts, (total + length, number))
    return [np.array(part, members.dtype) for part in parts]
