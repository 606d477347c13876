"""The rows of a shard by a record that vouches for them: where each lies in the shard files, and whether it is sound.

`Chunks` is that knowledge, for whoever reads; `VouchedRows` reads what is sound of a shard of which other things may
not be: other rows, the index, the length of a file.
"""

from __future__ import annotations

import os
from array import array as stdlib_array
from collections.abc import Mapping

import numpy as np
from google_crc32c import extend

from . import files
from .files import Location
from .records import Record
from .shard import CRC_BYTES, ArrayLayout, Layout


class Chunks:
    """Where one array's rows lie in a shard file, and their checksums, as a record says.

    Kept in arrays of the standard library: as small as numpy's, and an item of them is a Python number at once.
    """

    def __init__(self, array: ArrayLayout, record: Record) -> None:
        self.array, recorded = array, record.files.get(array.name)
        self.content = (record.revision, recorded.crc32, recorded.size) if recorded else ()  # of the file, in short
        valid = np.array([reason is None for reason in record.reasons])
        self.crc32c = stdlib_array("I", [c or 0 for c in recorded.rows_crc32c] if recorded else [0] * len(valid))
        if recorded and recorded.rows_bytes:
            lengths = np.array([n or 0 for n in recorded.rows_bytes], np.int64)
        else:
            lengths = np.where(valid, array.row_bytes, 0)
        slots = np.where(valid, lengths + CRC_BYTES, 0)
        self.lengths = stdlib_array("q", lengths.tolist())
        self.starts = stdlib_array("q", (np.cumsum(slots) - slots).tolist())
        self.data_bytes = int(slots.sum())
        offsets = record.rows[0] - record.shard * array.shard_rows + np.flatnonzero(valid)
        self.index = array.index(offsets, slots[valid])

    def range_of(self, offset: int) -> tuple[int, int]:
        """Where a row's chunk and its crc32c are in the shard file: bytes [start, stop)."""
        return self.starts[offset], self.starts[offset] + self.lengths[offset] + CRC_BYTES

    def take(self, slot: bytes | Exception, offset: int, into: np.ndarray) -> bool:
        """Fill `into` from a chunk and its crc32c as read, if they are what the record names."""
        expected = self.crc32c[offset]
        if isinstance(slot, Exception) or len(slot) != self.lengths[offset] + CRC_BYTES:
            return False
        if extend(0, slot[:-CRC_BYTES]) != expected or slot[-CRC_BYTES:] != expected.to_bytes(CRC_BYTES, "little"):
            return False
        if self.array.compress != "none":
            return self.array.unpack(slot[:-CRC_BYTES], into)
        into.reshape(-1).view(np.uint8)[:] = np.frombuffer(slot, np.uint8, len(slot) - CRC_BYTES)
        return True


class VouchedRows:
    """The valid rows of one shard by a whole `record` of it, from `shard_files` (by array)."""

    def __init__(self, layout: Layout, record: Record, shard_files: Mapping[str, Location]) -> None:
        self.record, self._layout, self._files = record, layout, shard_files
        self._chunks = {name: Chunks(array, record) for name, array in layout.arrays.items()}

    def read(self, row: int) -> tuple[dict[str, np.ndarray], str | None] | None:
        """A row's part of each array, as stored, and the sha256 of its image.

        None for a row that the record does not call valid, or whose bytes are no longer those that it names.
        """
        offset, parts = row - self.record.rows[0], {}
        if not 0 <= offset < len(self.record.reasons) or self.record.reasons[offset] is not None:
            return None
        for name, array in self._layout.arrays.items():
            parts[name] = np.empty(array.row_shape, array.dtype)
            chunks = self._chunks[name]
            if not chunks.take(_bytes(self._files[name], *chunks.range_of(offset)), offset, parts[name]):
                return None
        return parts, self.record.images_sha256[offset]


def _bytes(file: Location, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; what is not there, or what its disk cannot give back, is empty."""
    try:
        if files.is_local(file):
            with file.open("rb", buffering=0) as opened:
                return os.pread(opened.fileno(), stop - start, start)
        (answer,) = files.read_ranges([file], [start], [stop])
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as e:
        if e.errno in files.UNREADABLE:
            return b""
        raise
    if isinstance(answer, FileNotFoundError):
        return b""
    if isinstance(answer, Exception):
        raise answer if isinstance(answer, OSError) else OSError(f"{file}: {type(answer).__name__}: {answer}")
    return answer
