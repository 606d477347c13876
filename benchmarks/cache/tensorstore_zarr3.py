"""tensorstore's zarr3 driver: an array of the same sharding written by it, and any such array read by it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorstore as ts

from .formats import fsync_tree
from .payload import Payload


def _spec(folder: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}


class TensorStore:
    name: ClassVar[str] = "tensorstore"
    checksums: ClassVar[str] = "crc32c, beside the row"

    def write(self, folder: Path, payload: Payload) -> None:
        shape = payload.shape
        sharding = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, shape.tokens, shape.dim],
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": [shape.shard_rows, shape.tokens, shape.dim]}}
        metadata = {
            "shape": [payload.rows, shape.tokens, shape.dim],
            "data_type": "float16",
            "chunk_grid": grid,
            "codecs": [sharding],
            "fill_value": "NaN",
        }
        array = ts.open({**_spec(folder), "metadata": metadata}, create=True).result()
        for shard, features in enumerate(payload.in_shards()):
            start = shard * shape.shard_rows
            array[start : start + shape.shard_rows].write(features.astype(np.float16)).result()
        fsync_tree(folder)  # it has synced its files itself; this adds the folders

    def open(self, folder: Path) -> TensorStoreReader:
        return TensorStoreReader(folder)


class TensorStoreReader:
    def __init__(self, folder: Path) -> None:
        context = ts.Context({"cache_pool": {"total_bytes_limit": 16_000_000}})  # shard indices stay, rows do not
        spec = _spec(folder)
        self.array = ts.open(spec, open=True, read=True, context=context, recheck_cached_data="open").result()

    def read(self, rows: list[int], out: np.ndarray) -> None:
        """All rows of the batch at once, straight into their places."""
        reads = [ts.array(out[i]).write(self.array[row]) for i, row in enumerate(rows)]
        for read in reads:
            read.result()

    def read_slice(self, start: int, stop: int, out: np.ndarray) -> None:
        ts.array(out).write(self.array[start:stop]).result()
