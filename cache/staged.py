"""One array's shard file on its way: written row by row under a private name, closed with its index, read back."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from google_crc32c import extend

from .errors import CorruptFeatures
from .records import ShardFile
from .shard import CRC_BYTES, ArrayLayout, crc32c

SMALL_ROW = 2**16  # bytes; smaller rows are written and read many at a time


class Staged:
    """One array's shard file on its way: rows are added in order, then the index."""

    def __init__(self, layout: ArrayLayout, path: Path) -> None:
        self.layout, self.path = layout, path
        self.file = path.open("xb", buffering=2**20)
        self.rows_crc32c: list[int | None] = []
        self.rows_bytes: list[int | None] = []
        self.size = self.crc32 = 0  # known once it was read back
        self._index = b""

    def add(self, row: np.ndarray | None) -> None:
        if row is None:
            self.rows_crc32c.append(None)
            self.rows_bytes.append(None)
            return
        chunk = self.layout.pack(row)
        checksum, length = crc32c(chunk), chunk.nbytes if isinstance(chunk, np.ndarray) else len(chunk)
        self.rows_crc32c.append(checksum)
        self.rows_bytes.append(length)
        self.file.write(chunk)
        self.file.write(checksum.to_bytes(CRC_BYTES, "little"))

    def add_batch(self, rows: np.ndarray, valid: np.ndarray) -> None:
        """As `add` for each of `rows` (n, *row_shape), where `valid` (n,) is False for None; small rows cost less."""
        if self.layout.compress != "none" or self.layout.row_bytes > SMALL_ROW:
            for row, is_valid in zip(rows, valid, strict=True):
                self.add(row if is_valid else None)
            return
        rows = rows[valid].reshape(-1).view(np.uint8).reshape(-1, self.layout.row_bytes)
        slots = np.empty(len(rows), [("row", np.uint8, (self.layout.row_bytes,)), ("crc32c", "<u4")])
        slots["row"] = rows
        checksums = [extend(0, row) for row in rows]
        slots["crc32c"] = checksums
        self.file.write(slots)
        upcoming = iter(checksums)
        self.rows_crc32c += (next(upcoming) if is_valid else None for is_valid in valid)
        self.rows_bytes += (self.layout.row_bytes if is_valid else None for is_valid in valid)

    def close_with_index(self, first_offset: int) -> None:
        """`first_offset` is that of the first row in the shard."""
        valid = [(first_offset + i, n + CRC_BYTES) for i, n in enumerate(self.rows_bytes) if n is not None]
        self._index = self.layout.index(*zip(*valid, strict=True))
        self.file.write(self._index)
        self.file.flush()

    def compare(self) -> None:
        """Read the file back and compare every row, its checksum and the index with what was meant.

        Raises `CorruptFeatures`, or FileNotFoundError if it was swept up.
        """
        buffer = np.empty(max(n for n in self.rows_bytes if n is not None) + CRC_BYTES, np.uint8)
        total = size = 0
        with self.path.open("rb", buffering=SMALL_ROW) as staged:
            for expected, length in zip(self.rows_crc32c, self.rows_bytes, strict=True):
                if expected is None:
                    continue
                slot, trailer = buffer[: length + CRC_BYTES], expected.to_bytes(CRC_BYTES, "little")
                whole = staged.readinto(slot) == len(slot) and slot[length:].tobytes() == trailer
                if not whole or extend(0, slot[:length]) != expected:
                    raise CorruptFeatures(f"{self.path}: reads back differently than written")
                total, size = zlib.crc32(slot, total), size + len(slot)
            index = staged.read()
        if index != self._index:
            raise CorruptFeatures(f"{self.path}: reads back differently than written")
        self.crc32, self.size = zlib.crc32(index, total), size + len(index)

    def entry(self) -> ShardFile:
        packed = None if self.layout.compress == "none" else self.rows_bytes
        return ShardFile(self.size, self.crc32, self.rows_crc32c, packed)
