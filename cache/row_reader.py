"""Rows of one teacher's shard files, each compared with its commit record as it is read.

From a local disk, each row by a positioned read into the caller's buffer; from an object store, all rows of a batch by
ranged requests at once, through a local cache if there is one.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from google_crc32c import extend

from . import files
from .errors import CorruptFeatures, MissingFeatures
from .files import Location
from .local_cache import LocalCache
from .plan import Plan
from .records import Record, valid_record
from .shard import CRC_BYTES, Layout
from .vouched import Chunks

# Shard files kept open by one reader, of which a process may have several.
_OPEN_FILES = min(1024, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))
Span = tuple[int, int]
"""Bytes [start, stop) of a shard file."""
Sound = Callable[[bytes], bool]
"""Says whether bytes are those that a record names, and takes them if so."""


class _OpenFile:
    """A descriptor that closes with its last user. Positioned reads share it between threads and forks."""

    def __init__(self, file: os.PathLike) -> None:
        self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass
class ShardRows:
    """What is needed of a record to read its rows."""

    start: int
    stop: int
    valid: bytes  # 1 or 0 a row
    chunks: dict[str, Chunks]
    reasons: dict[int, dict[str, str]]
    revision: int
    index_checked: bool = False

    def holds(self, row: int) -> bool:
        return self.start <= row < self.stop


class RowReader:
    """Reads rows of shards that are committed, and remembers what it has read of records and which files are open.

    Safe to share between threads and to send to other processes.
    """

    def __init__(
        self, folder: Location, layout: Layout, fingerprint: str, plan: Plan, local_cache: LocalCache | None
    ) -> None:
        self.folder, self.layout, self.fingerprint, self.plan = folder, layout, fingerprint, plan
        self._local_cache = local_cache
        self._shards: dict[int, ShardRows] = {}
        self._files: OrderedDict[tuple[str, int], _OpenFile] = OrderedDict()

    def __getstate__(self):
        return {**self.__dict__, "_files": OrderedDict()}

    def forget(self) -> None:
        """Forget records and files, to see what has been committed since."""
        self._files.clear()
        self._shards.clear()

    def record(self, shard: int) -> Record | None:
        """As `TeacherFeatures.record`."""
        record = valid_record(self.folder, self.layout, shard, self.fingerprint)
        if record is None or record.rows[0] >= self.plan.extent:  # the plan has grown since this store was opened
            return None
        start, stop = record.rows
        if record.segment not in [s.hash for s in self.plan.segments if s.start <= start and stop <= s.stop]:
            raise CorruptFeatures(f"{self.folder}: shard {shard} was committed for another plan")
        return record

    def read(self, rows: list[int], out: dict[str, np.ndarray]) -> np.ndarray:
        """Fill `out` (by array, contiguous, in storage dtypes) with rows of the plan; valid `(B,)` bool.

        What is in `out` of a quarantined row is undefined. Raises `MissingFeatures` and `CorruptFeatures`.
        """
        shards = self._committed_all(rows)
        return (self._read_local if files.is_local(self.folder) else self._read_remote)(rows, shards, out)

    def _shard(self, number: int) -> ShardRows | None:
        known = self._shards.get(number)
        if known is None and (record := self.record(number)) is not None:
            known = self._shards[number] = ShardRows(
                *record.rows,
                bytes(reason is None for reason in record.reasons),
                {name: Chunks(array, record) for name, array in self.layout.arrays.items()},
                {i: reason for i, reason in enumerate(record.reasons) if reason is not None},
                record.revision,
            )
        return known

    def committed(self, row: int) -> ShardRows:
        """The shard of a row; MissingFeatures if it is not there."""
        shard = self._shard(self.layout.shard_of(row))
        if shard is None or not shard.holds(row):
            raise MissingFeatures(
                f"{self.folder}: row {row} ({self.plan.image_of(row)}) is not committed; run olavlm-extract again"
            )
        return shard

    def _committed_all(self, rows: list[int]) -> list[ShardRows]:
        shard_rows, known, absent, shards = self.layout.shard_rows, self._shards, [], []
        for row in rows:
            shard = known.get(row // shard_rows) or self._shard(row // shard_rows)
            if shard is None or not shard.start <= row < shard.stop:
                absent.append(row)
            shards.append(shard)
        if absent:
            raise MissingFeatures(
                f"{self.folder}: {len(absent)} of {len(rows)} rows are not committed (first: {absent[:5]}); "
                "run olavlm-extract again to finish the store"
            )
        return shards

    def _read_local(self, rows: list[int], shards: list[ShardRows], out: dict[str, np.ndarray]) -> np.ndarray:
        valid, trailer, plain = np.ones(len(rows), bool), bytearray(CRC_BYTES), self.layout.compress == "none"
        whole_rows = set()  # of which all parts were read at once
        for name, array in self.layout.arrays.items() if rows else ():
            shard_rows, whole = array.shard_rows, array.row_bytes + CRC_BYTES
            for i, (row, shard, into) in enumerate(
                zip(rows, shards, out[name].reshape(len(rows), -1).view(np.uint8), strict=True)
            ):
                offset = row - shard.start
                if not shard.valid[offset]:
                    valid[i] = False
                    continue
                if i in whole_rows:
                    continue
                if plain and shard.index_checked:
                    chunks = shard.chunks[name]
                    expected = chunks.crc32c[offset]
                    try:
                        file = self._file(name, row // shard_rows)  # kept in hand: another thread may push it out
                        read = os.preadv(file.descriptor, (into, trailer), chunks.starts[offset])
                    except OSError as e:
                        if e.errno not in (errno.ENOENT, errno.ESTALE):
                            raise
                        read = 0
                    if read == whole and extend(0, into) == expected == int.from_bytes(trailer, "little"):
                        continue
                valid[i] &= self._read_carefully(row, {part: rows_of[i] for part, rows_of in out.items()})
                whole_rows.add(i)
        return valid

    def _read_remote(self, rows: list[int], shards: list[ShardRows], out: dict[str, np.ndarray]) -> np.ndarray:
        """One request a row and array that the local cache has not, all at once."""
        valid, wanted = np.ones(len(rows), bool), []
        for i, (row, shard) in enumerate(zip(rows, shards, strict=True)):
            offset = row - shard.start
            if not shard.valid[offset]:
                valid[i] = False
            elif not shard.index_checked:
                valid[i] = self._read_carefully(row, {name: part[i] for name, part in out.items()})
            else:
                for name, chunks in shard.chunks.items():
                    number, span = row // chunks.array.shard_rows, chunks.range_of(offset)
                    take = partial(chunks.take, offset=offset, into=out[name][i])
                    if not self._kept(chunks, number, span, take):
                        wanted.append((i, name, chunks.array.file(self.folder, number), span))
        parts = [file for _, _, file, _ in wanted]
        starts, stops = ([span[end] for *_, span in wanted] for end in (0, 1))
        for (i, name, _, span), answer in zip(wanted, files.read_ranges(parts, starts, stops), strict=True):
            chunks = shards[i].chunks[name]
            if chunks.take(answer, rows[i] - shards[i].start, out[name][i]):
                self._keep(chunks, self.layout.shard_of(rows[i]), span, answer)
            else:
                valid[i] &= self._read_carefully(rows[i], {name: part[i] for name, part in out.items()})
        return valid

    def _read_carefully(self, row: int, into: dict[str, np.ndarray]) -> bool:
        """Fill `into` (storage dtypes, contiguous) with a committed row; False if it is quarantined.

        All parts are of one record. Checks a shard's index at its first reading, and looks again where what is read is
        not what the record in hand says: the shard may have been replaced since. It is damaged if a second look, at
        files opened anew, is by the same record: one that was withdrawn does not come back.
        """
        number, faulty = self.layout.shard_of(row), None
        while True:
            shard, faults = self.committed(row), []
            if not shard.valid[row - shard.start]:
                return False
            for name, chunks in shard.chunks.items():
                offset, span = row - shard.start, (chunks.data_bytes, chunks.data_bytes + len(chunks.index))
                if not shard.index_checked and not self._find(chunks, number, span, partial(operator.eq, chunks.index)):
                    faults.append(f"the index of {chunks.array.file(self.folder, number)}")
                take = partial(chunks.take, offset=offset, into=into[name])
                if not self._find(chunks, number, chunks.range_of(offset), take):
                    faults.append(f"its bytes in {chunks.array.file(self.folder, number)}")
            if not faults:
                shard.index_checked = True
                return True
            self._shards.pop(number, None)
            for name in shard.chunks:
                self._files.pop((name, number), None)
            if shard.revision == faulty:
                raise CorruptFeatures(
                    f"{self.folder}: row {row} ({self.plan.image_of(row)}) is damaged: {' and '.join(faults)} "
                    "do not match its commit record"
                )
            faulty = shard.revision

    def _find(self, chunks: Chunks, shard: int, span: Span, sound: Sound) -> bool:
        """Whether bytes [start, stop) of a shard file are sound: those of the local cache, or else the store's."""
        if self._kept(chunks, shard, span, sound):
            return True
        found = self._read_range(chunks.array.name, shard, *span)
        if not sound(found):
            return False
        self._keep(chunks, shard, span, found)
        return True

    def _kept(self, chunks: Chunks, shard: int, span: Span, sound: Sound) -> bool:
        """Whether the local cache has sound bytes [start, stop) of a shard file."""
        if self._local_cache is None:
            return False
        file = self._local_file(chunks, shard)
        if not sound(self._local_cache.read(file, *span)):
            return False
        self._local_cache.used(file)
        return True

    def _keep(self, chunks: Chunks, shard: int, span: Span, found: bytes) -> None:
        if self._local_cache is not None:
            self._local_cache.keep(self._local_file(chunks, shard), span[0], found)

    def _local_file(self, chunks: Chunks, shard: int) -> Path:
        return self._local_cache.file(self.folder, self.fingerprint, chunks.array.name, shard, *chunks.content)

    def _read_range(self, name: str, shard: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard file; what is not there is empty."""
        try:
            if files.is_local(self.folder):
                file = self._file(name, shard)  # kept in hand, as above
                return os.pread(file.descriptor, stop - start, start)
            (answer,) = files.read_ranges([self.layout.arrays[name].file(self.folder, shard)], [start], [stop])
            if isinstance(answer, Exception):
                raise answer if isinstance(answer, OSError) else OSError(f"{type(answer).__name__}: {answer}")
            return answer
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ESTALE) and not isinstance(e, FileNotFoundError):
                raise
            return b""

    def _file(self, name: str, shard: int) -> _OpenFile:
        key = name, shard
        file = self._files.pop(key, None)
        if file is None:
            path = self.layout.arrays[name].file(self.folder, shard)
            try:
                file = _OpenFile(path)
            except OSError as e:
                if e.errno != errno.EMFILE:
                    raise
                self._files.clear()
                file = _OpenFile(path)
        if len(self._files) >= _OPEN_FILES:
            with contextlib.suppress(KeyError):  # emptied by another thread
                self._files.popitem(last=False)
        self._files[key] = file
        return file
