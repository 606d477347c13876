"""The floor: what the bytes cost when a program does nothing but write them, or read and sum them.

Written are the very bytes of a store's shard files, ready in memory, one `write` a file and fsync of file and folder.
Read are a store's own shard files, open and their index known: one `preadv` a row into the batch and its crc32c.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import google_crc32c
import numpy as np

from .olavlm_store import KEY
from .payload import Payload
from .sizes import Shape

_CRC_BYTES = 4


def shard_files(store: Path) -> list[Path]:
    """Of a store of one segment, in order."""
    chunks = store / KEY / "features" / "c"
    return [chunks / str(shard) / "0" / "0" for shard in range(len(list(chunks.iterdir())))]


class PlainFiles:
    name: ClassVar[str] = "plain files"
    checksums: ClassVar[str] = "crc32c, beside the row"

    def __init__(self, store: Path) -> None:
        """`store` is one that is complete; its shard files are what `write` writes."""
        self._contents = [file.read_bytes() for file in shard_files(store)]

    def write(self, folder: Path, payload: Payload | None = None) -> None:
        folder.mkdir()
        for shard, content in enumerate(self._contents):
            with (folder / str(shard)).open("xb", buffering=0) as file:
                assert file.write(content) == len(content)
                os.fsync(file.fileno())
            _fsync_folder(folder)

    def check(self, folder: Path, without: int = 0) -> None:
        """Raise if what lies in `folder` is not the shard files, `without` their last bytes."""
        for shard, content in enumerate(self._contents):
            if (folder / str(shard)).read_bytes() != content[: len(content) - without]:
                raise RuntimeError(f"{folder / str(shard)} is not what was written")


class ByHand:
    """A floor with the work that any such store has: float32 to float16, a crc32c a row, read back and compared."""

    name: ClassVar[str] = "plain files: float16, crc32c, read back"

    @staticmethod
    def omits(shape: Shape) -> int:
        """Bytes of a shard file's end, its index, that are not written."""
        return 16 * shape.shard_rows + _CRC_BYTES

    def write(self, folder: Path, payload: Payload) -> None:
        folder.mkdir()
        slot = np.empty(payload.shape.row_bytes + _CRC_BYTES, np.uint8)
        for shard, features in enumerate(payload.in_shards()):
            sums = []
            with (folder / str(shard)).open("xb", buffering=0) as file:
                for row in features:
                    stored = row.astype(np.float16).reshape(-1).view(np.uint8)
                    sums.append(google_crc32c.value(stored))
                    slot[:-_CRC_BYTES] = stored
                    slot[-_CRC_BYTES:] = np.frombuffer(sums[-1].to_bytes(_CRC_BYTES, "little"), np.uint8)
                    assert file.write(slot) == len(slot)
                with (folder / str(shard)).open("rb", buffering=0) as back:
                    for expected in sums:
                        assert back.readinto(slot) == len(slot)
                        assert google_crc32c.value(slot[:-_CRC_BYTES]) == expected
                os.fsync(file.fileno())
            _fsync_folder(folder)


class PlainReader:
    """Rows of a store's own shard files."""

    def __init__(self, store: Path, shape: Shape) -> None:
        self.shape = shape
        self._places: list[tuple[int, int, int]] = []  # of each row: descriptor, offset, crc32c
        self._descriptors = []
        for file in shard_files(store):
            content = np.memmap(file, np.uint8, "r")
            index = content[-16 * shape.shard_rows - _CRC_BYTES : -_CRC_BYTES].view("<u8").reshape(-1, 2)
            self._descriptors.append(os.open(file, os.O_RDONLY))
            for offset, length in index.tolist():
                assert length == shape.row_bytes + _CRC_BYTES
                crc = int.from_bytes(content[offset + shape.row_bytes : offset + length].tobytes(), "little")
                self._places.append((self._descriptors[-1], offset, crc))

    def read(self, rows: list[int], out: np.ndarray) -> None:
        flat = out.reshape(len(out), -1).view(np.uint8)
        for row, into in zip(rows, flat, strict=True):
            descriptor, offset, crc = self._places[row]
            assert os.preadv(descriptor, [into], offset) == self.shape.row_bytes
            if google_crc32c.value(into) != crc:
                raise RuntimeError(f"row {row} is damaged")

    def read_slice(self, start: int, stop: int, out: np.ndarray) -> None:
        self.read(list(range(start, stop)), out)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
