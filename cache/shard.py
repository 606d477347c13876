"""The bytes of a shard: Zarr v3's `sharding_indexed` layout, written and read without Zarr.

A shard file holds the valid rows of one shard, in row order and without gaps, each followed by its crc32c, then the
shard index: for every row of the shard (offset, length) as little-endian uint64, 2^64 - 1 twice for a row that is
absent, and the index's crc32c. That is what zarr-python writes for inner chunks of one row with codecs
`[bytes, crc32c]` and the index at the end, byte for byte, so any Zarr v3 reader can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from .codec import DTYPES
from .errors import StoreError

CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)


def crc32c(data: np.ndarray | bytes, start: int = 0) -> int:
    """crc32c (Castagnoli) of the bytes of `data`, which must be contiguous, continuing from the value `start`."""
    if isinstance(data, np.ndarray):
        data = data.reshape(-1).view(np.uint8)
    return google_crc32c.extend(start, data)


@dataclass(frozen=True)
class Layout:
    """What is fixed for every shard of an array: `shard_rows` rows of `(tokens, dim)` in `dtype`."""

    shard_rows: int
    tokens: int
    dim: int
    dtype: str  # a key of codec.DTYPES

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreError(f"dtype {self.dtype!r} is not a storage dtype; use one of {', '.join(DTYPES)}")
        if self.shard_rows < 1 or self.tokens < 1 or self.dim < 1:
            raise StoreError(f"shard rows, tokens and dim are at least 1, got {self}")

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.dim * self.numpy_dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """A row and its crc32c."""
        return self.row_bytes + CRC_BYTES

    def shard_of(self, row: int) -> int:
        return row // self.shard_rows

    def file_bytes(self, num_valid: int) -> int:
        """Size of a shard file with `num_valid` rows; a shard without a valid row has no file."""
        return num_valid * self.slot_bytes + 16 * self.shard_rows + CRC_BYTES if num_valid else 0

    def index(self, offsets_in_shard: list[int]) -> bytes:
        """The index of a shard whose valid rows have these offsets in the shard, ascending, with its crc32c."""
        index = np.full((self.shard_rows, 2), _ABSENT, "<u8")
        n = len(offsets_in_shard)
        index[offsets_in_shard, 0] = np.arange(n, dtype=np.uint64) * np.uint64(self.slot_bytes)
        index[offsets_in_shard, 1] = self.slot_bytes
        return index.tobytes() + crc32c(index).to_bytes(CRC_BYTES, "little")

    def create_array(self, group: zarr.Group, name: str, extent: int) -> zarr.Array:
        """Create the Zarr array of this layout with room for `extent` rows, rounded up to whole shards."""
        return group.create_array(
            name,
            shape=(self.padded(extent), self.tokens, self.dim),
            chunks=(1, self.tokens, self.dim),
            shards=(self.shard_rows, self.tokens, self.dim),
            dtype=self.dtype,
            fill_value=float("nan"),
            compressors=[Crc32cCodec()],
            dimension_names=("row", "token", "channel"),
        )

    def padded(self, extent: int) -> int:
        return -(-extent // self.shard_rows) * self.shard_rows

    @classmethod
    def of(cls, metadata: dict, where: Path) -> Layout:
        """The layout that an array's `zarr.json` describes; StoreError if it is not one of ours."""
        try:
            (sharding,) = metadata["codecs"]
            inner = sharding["configuration"]
            rows, tokens, dim = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            fits = (
                sharding["name"] == "sharding_indexed"
                and inner["chunk_shape"] == [1, tokens, dim]
                and all(_is_plain(inner[codecs]) for codecs in ("codecs", "index_codecs"))
                and inner.get("index_location", "end") == "end"
                and metadata["chunk_key_encoding"]["name"] == "default"
                and metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/") == "/"
            )
            dtype = str(metadata["data_type"])
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise StoreError(f"{where}: not a feature array of this format (sharded, one row a chunk, crc32c)")
        return cls(rows, tokens, dim, dtype)


def _is_plain(codecs: list[dict]) -> bool:
    """Whether a chunk is little-endian bytes and their crc32c."""
    return [c["name"] for c in codecs] == ["bytes", "crc32c"] and codecs[0]["configuration"]["endian"] == "little"


def shard_file(array_folder: Path, shard: int) -> Path:
    """Where Zarr's default chunk keys put a shard of a 3-dimensional array."""
    return array_folder / "c" / str(shard) / "0" / "0"
