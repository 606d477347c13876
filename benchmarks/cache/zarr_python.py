"""zarr-python: an array of the same sharding written by it, and any such array read by it, a store's included."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from .formats import fsync_tree
from .payload import Payload


class ZarrPython:
    name: ClassVar[str] = "zarr-python"
    checksums: ClassVar[str] = "crc32c, beside the row"

    def write(self, folder: Path, payload: Payload) -> None:
        shape = payload.shape
        array = zarr.create_array(
            folder,
            shape=(payload.rows, shape.tokens, shape.dim),
            chunks=(1, shape.tokens, shape.dim),
            shards=(shape.shard_rows, shape.tokens, shape.dim),
            dtype="float16",
            fill_value=float("nan"),
            compressors=[Crc32cCodec()],
        )
        for shard, features in enumerate(payload.in_shards()):
            start = shard * shape.shard_rows
            array[start : start + shape.shard_rows] = features.astype(np.float16)
        fsync_tree(folder)

    def open(self, folder: Path) -> ZarrReader:
        return ZarrReader(folder)


class ZarrReader:
    def __init__(self, folder: Path) -> None:
        self.array = zarr.open_array(folder, mode="r")

    def read(self, rows: list[int], out: np.ndarray) -> None:
        for i, row in enumerate(rows):  # fancy indexing over a sharded array is far slower
            out[i] = self.array[row]

    def read_slice(self, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = self.array[start:stop]
