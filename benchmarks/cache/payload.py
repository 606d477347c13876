"""Rows to store whose values are known, without keeping them all.

One shard of random values, exact in float16, serves every shard: the first two values of a row say which row it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from .sizes import Shape

_BASE = 4096


def stamp(rows: np.ndarray) -> np.ndarray:
    """Row numbers below 4096 ** 2 as two values each, exact in float16: `(rows, 2)` from -2048 to 2047."""
    assert np.max(rows) < _BASE**2
    return np.stack(np.divmod(rows, _BASE), axis=-1) - _BASE // 2


class Payload:
    """`shards` shards of `shape`."""

    def __init__(self, shape: Shape, shards: int) -> None:
        self.shape, self.shards, self.rows = shape, shards, shards * shape.shard_rows
        rng = np.random.default_rng(0)
        self._pool = np.empty((shape.shard_rows, shape.tokens, shape.dim), np.float32)
        for row in self._pool:
            row[:] = rng.standard_normal(row.shape, np.float32).astype(np.float16)

    @property
    def bytes(self) -> int:
        """Of all rows, in storage."""
        return self.rows * self.shape.row_bytes

    def shard(self, shard: int) -> np.ndarray:
        """The rows of a shard, `(shard_rows, tokens, dim)` float32; good until the next one is asked for."""
        rows = shard * self.shape.shard_rows + np.arange(self.shape.shard_rows)
        self._pool[:, 0, :2] = stamp(rows)
        return self._pool

    def in_shards(self) -> Iterator[np.ndarray]:
        return map(self.shard, range(self.shards))

    def check(self, rows: Sequence[int], values: np.ndarray, where: str) -> None:
        """Raise if `values` (float16 or float32) are not those of `rows`."""
        assert len(rows) == len(values)
        for row, value in zip(rows, values, strict=True):
            expected = self._pool[row % self.shape.shard_rows]
            expected[0, :2] = stamp(np.asarray(row))
            if not np.array_equal(value, expected):
                raise RuntimeError(f"{where}: row {row} is read as other values than were written")


def image_path(row: int) -> str:
    """As LLaVA-558K's are: `00123/001234567.jpg`."""
    return f"{row // 1000:05d}/{row:09d}.jpg"


def image_paths(rows: int) -> pa.LargeStringArray:
    return pa.array(map(image_path, range(rows)), pa.large_string())


def card(key: str, tokens: int, dim: int) -> dict:
    """A card as a teacher makes it, with a fingerprint over its fields."""
    fields = {"name": key, "tokens": tokens, "dim": dim, "size": [8, 8], "versions": {"numpy": np.__version__}}
    return {**fields, "fingerprint": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}
