"""The bytes of a shard: Zarr v3's `sharding_indexed` layout, written and read without Zarr.

A teacher has one array `features`, and with int8 and int4 a second one, `scales`. A shard file of either holds the
valid rows of one shard, in row order and without gaps, each followed by its crc32c, then the shard index: for every row
of the shard (offset, length) as little-endian uint64, 2^64 - 1 twice for a row that is absent, and the index's crc32c.
That is what zarr-python writes for inner chunks of one row with codecs `[bytes, crc32c]`, or `[bytes, zstd, crc32c]`,
and the index at the end, byte for byte, so any Zarr v3 reader can read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from . import files
from .codec import CODECS, Codec
from .errors import StoreError
from .files import Location

CRC_BYTES = 4
COMPRESSIONS = ("none", "zstd")
ZSTD_LEVEL = 3
_ABSENT = np.uint64(2**64 - 1)
_zstd = Zstd(level=ZSTD_LEVEL, checksum=False)  # as zarr's own codec calls it


def crc32c(data: np.ndarray | bytes, start: int = 0) -> int:
    """crc32c (Castagnoli) of the bytes of `data`, which must be contiguous, continuing from the value `start`."""
    if isinstance(data, np.ndarray):
        data = data.reshape(-1).view(np.uint8)
    return google_crc32c.extend(start, data)


@dataclass(frozen=True)
class ArrayLayout:
    """What is fixed for every shard of one Zarr array: `shard_rows` rows of `row_shape` in `dtype`."""

    name: str
    shard_rows: int
    row_shape: tuple[int, ...]
    dtype: str
    compress: str  # one of COMPRESSIONS

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row before compression."""
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    @property
    def index_bytes(self) -> int:
        return 16 * self.shard_rows + CRC_BYTES

    def pack(self, row: np.ndarray) -> np.ndarray | bytes:
        """The bytes of a row's inner chunk, before its crc32c."""
        return _zstd.encode(row) if self.compress == "zstd" else row

    def unpack(self, chunk: bytes, into: np.ndarray) -> bool:
        """Undo `pack` into a contiguous row; False if the chunk is not one of this layout."""
        try:
            row = _zstd.decode(chunk)
        except (RuntimeError, ValueError):
            return False
        if len(row) != self.row_bytes:
            return False
        into.reshape(-1).view(np.uint8)[:] = np.frombuffer(row, np.uint8)
        return True

    def index(self, offsets_in_shard: Sequence[int], lengths: Sequence[int]) -> bytes:
        """The index of a shard whose valid rows have these offsets in the shard, ascending, with its crc32c.

        `lengths` are those of their inner chunks in bytes, crc32c included.
        """
        index = np.full((self.shard_rows, 2), _ABSENT, "<u8")
        lengths = np.asarray(lengths, np.uint64)
        index[offsets_in_shard, 0] = np.cumsum(lengths) - lengths
        index[offsets_in_shard, 1] = lengths
        return index.tobytes() + crc32c(index).to_bytes(CRC_BYTES, "little")

    def file(self, group: Location, shard: int) -> Location:
        """Where Zarr's default chunk keys put a shard."""
        return group / self.name / self.key(shard)

    def key(self, shard: int) -> str:
        """The shard's key under the array's folder."""
        return "/".join(["c", str(shard), *"0" * len(self.row_shape)])

    def metadata(self, extent: int, codec: str) -> dict:
        """The array's `zarr.json` with room for `extent` rows in whole shards, as zarr-python writes it.

        Spelled out here and not made by the library, whose versions differ: a store is checked against it for years.
        """
        dtype = np.dtype(self.dtype)
        little = {"name": "bytes", **({"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {})}
        zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        inner = [little, *([zstd] if self.compress == "zstd" else []), {"name": "crc32c"}]
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": [1, *self.row_shape],
            "codecs": inner,
            "index_codecs": index,
            "index_location": "end",
        }
        return {
            "shape": [self.padded(extent), *self.row_shape],
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *self.row_shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if dtype.kind == "f" else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"codec": codec},
            "dimension_names": ["row", "token", "channel"][: 1 + len(self.row_shape)],
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

    def padded(self, extent: int) -> int:
        return -(-extent // self.shard_rows) * self.shard_rows


@dataclass(frozen=True)
class Layout:
    """What is fixed for every shard of a teacher: `shard_rows` rows of `(tokens, dim)` in the storage dtype `dtype`.

    `dtype` is a key of `codec.CODECS`. With `compress="zstd"` every row is compressed by itself.
    """

    shard_rows: int
    tokens: int
    dim: int
    dtype: str
    compress: str = "none"

    def __post_init__(self) -> None:
        if self.dtype not in CODECS:
            raise StoreError(f"dtype {self.dtype!r} is not a storage dtype; use one of {', '.join(CODECS)}")
        if self.compress not in COMPRESSIONS:
            raise StoreError(f"compression {self.compress!r} is not known; use one of {', '.join(COMPRESSIONS)}")
        if self.shard_rows < 1 or self.tokens < 1 or self.dim < 1:
            raise StoreError(f"shard rows, tokens and dim are at least 1, got {self}")
        if self.dim % self.codec.values_per_item:
            raise StoreError(f"dtype {self.dtype} packs {self.codec.values_per_item} channels, dim is {self.dim}")

    @property
    def codec(self) -> Codec:
        return CODECS[self.dtype]

    @cached_property
    def arrays(self) -> dict[str, ArrayLayout]:
        """By name: "features", and "scales" where the codec has them."""
        shapes = {"features": (self.tokens, self.dim // self.codec.values_per_item)}
        dtypes = {"features": self.codec.dtype.name, "scales": "float32"}
        if self.codec.has_scales:
            shapes["scales"] = (self.tokens,)
        return {
            name: ArrayLayout(name, self.shard_rows, shape, dtypes[name], self.compress)
            for name, shape in shapes.items()
        }

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of the array "features"."""
        return self.codec.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in storage, all arrays together, before compression."""
        return sum(array.row_bytes for array in self.arrays.values())

    def shard_of(self, row: int) -> int:
        return row // self.shard_rows

    def padded(self, extent: int) -> int:
        return -(-extent // self.shard_rows) * self.shard_rows

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        """Room for a batch of stored rows, by array."""
        return {name: np.empty((rows, *array.row_shape), array.dtype) for name, array in self.arrays.items()}

    def metadata(self, name: str, extent: int) -> dict:
        """The `zarr.json` of one of the arrays."""
        return self.arrays[name].metadata(extent, self.dtype)

    @classmethod
    def of(cls, group: Location) -> Layout:
        """The layout of a teacher's group, by its arrays' `zarr.json`; StoreError if they are not ours."""
        there = read_metadata(group / "features")
        try:
            rows, tokens, items = there["chunk_grid"]["configuration"]["chunk_shape"]
            dtype = there["attributes"]["codec"]
            inner = [codec["name"] for codec in there["codecs"][0]["configuration"]["codecs"]]
            dim = items * CODECS[dtype].values_per_item
            layout = cls(rows, tokens, dim, dtype, "zstd" if "zstd" in inner else "none")
            fits = same_array(there, layout.metadata("features", 1))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            fits = False
        if not fits:
            raise StoreError(f"{group / 'features'}: not a feature array of this format (one row a chunk, crc32c)")
        # The two are not of one extent while a plan grows: their metadata is replaced one after the other.
        scales = layout.metadata("scales", 1) if "scales" in layout.arrays else None
        if scales is not None and not same_array(read_metadata(group / "scales"), scales):
            raise StoreError(f"{group / 'scales'}: not the scales of {group / 'features'}")
        return layout


def same_array(there: dict, ours: dict) -> bool:
    """Whether two `zarr.json` say the same but for the extent in rows."""
    shape = there.get("shape")
    sound = isinstance(shape, list) and len(shape) == len(ours["shape"]) and type(shape[0]) is int
    return sound and {**there, "shape": shape[1:]} == {**ours, "shape": ours["shape"][1:]}


def read_metadata(folder: Location) -> dict:
    """The `zarr.json` of a Zarr v3 node; StoreError if there is none."""
    file = folder / "zarr.json"
    try:
        metadata = json.loads(files.read(file))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{folder} is not a feature store: it has no zarr.json; make one with olavlm-extract"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise StoreError(f"{file} is damaged: not JSON") from None
    sound = isinstance(metadata, dict) and isinstance(metadata.get("attributes", {}), dict)
    if not sound or metadata.get("zarr_format") != 3 or metadata.get("node_type") not in ("group", "array"):
        raise StoreError(f"{file} is not Zarr v3 metadata")
    return metadata
