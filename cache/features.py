"""One teacher's features in a store, row by row.

Reading a row is one positioned read into the caller's buffer, and its crc32c is compared with the record's, so that
damage, a swapped file or a stale one is an error and never a wrong value. zarr-python reads the same files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import operator
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from google_crc32c import extend

from . import files
from .errors import BadImage, CorruptFeatures, MissingFeatures, StoreError
from .files import Location
from .ledger import Ledger
from .local_cache import LocalCache
from .plan import Plan
from .records import Record, canonical_json, valid_record
from .shard import CRC_BYTES, Layout, read_metadata
from .vouched import Chunks

# Shard files kept open by one reader, of which a process may have several.
_OPEN_FILES = min(1024, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))
Span = tuple[int, int]
"""Bytes [start, stop) of a shard file."""
Sound = Callable[[bytes], bool]
"""Says whether bytes are those that a record names, and takes them if so."""


@dataclass(frozen=True)
class Coverage:
    """How many of the plan's images have features, were quarantined, or are not committed."""

    images: int
    valid: int
    quarantined: int
    reasons: dict[str, int]

    @property
    def covered(self) -> int:
        """Committed, valid or quarantined."""
        return self.valid + self.quarantined

    @property
    def missing(self) -> int:
        return self.images - self.covered

    @property
    def complete(self) -> bool:
        return self.missing == 0

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.reasons.items()))
        return (
            f"{self.covered} of {self.images} images: {self.valid} valid, {self.quarantined} quarantined"
            + (f" ({reasons})" if reasons else "")
            + (f", {self.missing} missing" if self.missing else "")
        )


class _OpenFile:
    """A descriptor that closes with its last user. Positioned reads share it between threads and forks."""

    def __init__(self, file: os.PathLike) -> None:
        self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass
class _Shard:
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


class TeacherFeatures:
    """One teacher's features: `.card`, `.shape` (plan rows, tokens, dim), `.dtype`, `.coverage()`, rows by index.

    Plan rows run from 0 to the plan's last row; in a plan that has grown, the numbers between two segments hold no
    image. Safe to share between threads and to send to other processes.
    """

    def __init__(self, store: Location, key: str, plan: Plan, local_cache: LocalCache | None = None) -> None:
        self.key, self.plan, self.folder, self._local_cache = key, plan, store / key, local_cache
        group = read_metadata(self.folder)
        try:
            self.card: dict = group["attributes"]["card"]
            self.fingerprint: str = self.card["fingerprint"]
        except (KeyError, TypeError):
            raise StoreError(f"{self.folder / 'zarr.json'} is damaged: it holds no teacher card") from None
        if group["attributes"].get("card_sha256") != card_checksum(self.card):
            raise StoreError(f"{self.folder / 'zarr.json'} is damaged: its card is not the one that was written")
        self.layout = Layout.of(self.folder)
        self._shards: dict[int, _Shard] = {}
        self._files: OrderedDict[tuple[str, int], _OpenFile] = OrderedDict()
        self._known: Ledger | None = None

    def __getstate__(self):
        return {**self.__dict__, "_files": OrderedDict(), "_known": None}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(plan rows, tokens, dim)"""
        return self.plan.extent, self.layout.tokens, self.layout.dim

    @property
    def dtype(self) -> np.dtype:
        """The storage dtype of `features`; `[]` and `read` hand out float32."""
        return self.layout.numpy_dtype

    def record(self, shard: int) -> Record | None:
        """The commit record of a shard, None if it is not committed; CorruptFeatures if its records are damaged."""
        record = valid_record(self.folder, self.layout, shard, self.fingerprint)
        if record is None or record.rows[0] >= self.plan.extent:  # the plan has grown since this store was opened
            return None
        start, stop = record.rows
        if record.segment not in [s.hash for s in self.plan.segments if s.start <= start and stop <= s.stop]:
            raise CorruptFeatures(f"{self.folder}: shard {shard} was committed for another plan")
        return record

    def ledger(self) -> Ledger:
        """What the records say now, in columns."""
        self._known = Ledger.load(self.folder, self.layout, self.fingerprint, self.plan, self._known)
        return self._known

    def reload(self) -> None:
        """Forget what was read of records and files, to see what has been committed since."""
        self._files.clear()
        self._shards.clear()

    def coverage(self, rows: np.ndarray | None = None) -> Coverage:
        """Coverage of `rows` (those of the whole plan by default). Damaged shards count as missing."""
        ledger = self.ledger()
        wanted = self._wanted(rows)
        reasons = ledger.reasons(wanted)
        return Coverage(
            len(wanted), int(ledger.covered(wanted).sum()) - reasons.total(), reasons.total(), dict(reasons)
        )

    def failures(self) -> list[tuple[int, BadImage]]:
        """The quarantined rows, ascending, each with its `BadImage`."""
        return [
            (int(row), BadImage(self.plan.image_of(row), reason, detail))
            for row, reason, detail in zip(*self.ledger().failures, strict=True)
        ]

    def to_pandas(self):
        """A DataFrame of the quarantined rows: row, image, reason, detail."""
        from .display import failures_frame

        return failures_frame(self)

    def missing_rows(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Those of `rows` (default: the whole plan) that are not committed, ascending, int64."""
        wanted = self._wanted(rows)
        return wanted[~self.ledger().covered(wanted)]

    def _wanted(self, rows: np.ndarray | None) -> np.ndarray:
        return self.plan.rows if rows is None else np.unique(np.asarray(rows, np.int64))

    def failure(self, row: int | str) -> BadImage | None:
        """Why a row was quarantined (reason, detail, image), or None if it is valid; MissingFeatures if uncommitted."""
        row = self._row(row)
        shard = self._committed(row)
        reason = shard.reasons.get(row - shard.start)
        return None if reason is None else BadImage(self.plan.image_of(row), reason["reason"], reason["detail"])

    def __getitem__(self, row: int | str) -> np.ndarray:
        """The features of a row or an image path, `(tokens, dim)` float32.

        Raises `MissingFeatures` if not committed, `CorruptFeatures` if damaged, `BadImage` if quarantined.
        """
        row = self._row(row)
        values, valid = self.read([row])
        if not valid[0]:
            raise self.failure(row)
        return values[0]

    def read(self, rows: Sequence[int], *, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A batch of rows, in the order asked for (repeats allowed).

        Returns values `(B, tokens, dim)` float32, or `out` filled in the storage dtype if it is given (a dtype without
        scales), and valid `(B,)` bool; a quarantined row is NaN. Raises `MissingFeatures` naming the first rows that
        are not committed, and `CorruptFeatures` for damage.
        """
        if out is not None and self.layout.codec.has_scales:
            raise ValueError(f"features stored as {self.layout.dtype} are nothing without scales; use read_stored")
        stored, valid = self.read_stored(rows, out=None if out is None else {"features": out})
        return (self.layout.codec.decode(stored) if out is None else out), valid

    def read_stored(
        self, rows: Sequence[int], *, out: dict[str, np.ndarray] | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `read`, but as stored, for a device that decodes: "features" and, with int8 and int4, "scales".

        Returns a dict of features `(B, tokens, dim)` (int4: `dim / 2` packed uint8) and scales `(B, tokens)` float32,
        those in `out` if it is given, and valid `(B,)` bool. `layout.codec.decode` makes float32 of it; for int8 that
        is features * scales. A quarantined row decodes to NaN.
        """
        numbers = self._numbers(rows)
        if out is None:
            out = self.layout.empty(len(numbers))
        for name, array in self.layout.arrays.items():
            given, shape = out[name], (len(numbers), *array.row_shape)
            if given.shape != shape or given.dtype != array.dtype or not given.flags.c_contiguous:
                raise ValueError(
                    f"out must be a contiguous {shape} array of {array.dtype}, got {given.shape} of {given.dtype}"
                )
        shards = self._committed_all(numbers)
        read = self._read_local if files.is_local(self.folder) else self._read_remote
        valid = read(numbers, shards, out)
        for i in np.flatnonzero(~valid):
            self.layout.codec.mark_invalid(out, i)
        return out, valid

    def _numbers(self, rows: Sequence[int]) -> list[int]:
        """The row numbers, once the plan is known to hold them all."""
        numbers = np.asarray(rows)
        if numbers.dtype.kind in "iu" and numbers.ndim == 1 and self.plan.holds(numbers):
            return numbers.tolist()
        return [self._row(row) for row in rows]

    def _row(self, row: int | str) -> int:
        if isinstance(row, str):
            return self.plan.row_of(row)
        row = operator.index(row)
        self.plan.segment_of(row)
        return row

    def _shard(self, number: int) -> _Shard | None:
        known = self._shards.get(number)
        if known is None and (record := self.record(number)) is not None:
            known = self._shards[number] = _Shard(
                *record.rows,
                bytes(reason is None for reason in record.reasons),
                {name: Chunks(array, record) for name, array in self.layout.arrays.items()},
                {i: reason for i, reason in enumerate(record.reasons) if reason is not None},
                record.revision,
            )
        return known

    def _committed(self, row: int) -> _Shard:
        shard = self._shard(self.layout.shard_of(row))
        if shard is None or not shard.holds(row):
            raise MissingFeatures(
                f"{self.folder}: row {row} ({self.plan.image_of(row)}) is not committed; run olavlm-extract again"
            )
        return shard

    def _committed_all(self, rows: list[int]) -> list[_Shard]:
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

    def _read_local(self, rows: list[int], shards: list[_Shard], out: dict[str, np.ndarray]) -> np.ndarray:
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

    def _read_remote(self, rows: list[int], shards: list[_Shard], out: dict[str, np.ndarray]) -> np.ndarray:
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
            shard, faults = self._committed(row), []
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

    def _repr_html_(self) -> str:
        from .display import teacher_html

        return teacher_html(self)

    def __repr__(self) -> str:
        return f"TeacherFeatures({self.key!r}, shape={self.shape}, dtype={self.layout.dtype}, {self.coverage()})"

    def info(self) -> dict:
        """Card, shapes, storage, sizes, statistics and coverage as JSON-clean values."""
        ledger, coverage = self.ledger(), self.coverage()
        return {
            "key": self.key,
            "card": self.card,
            "shape": list(self.shape),
            "dtype": self.layout.dtype,
            "compress": self.layout.compress,
            "shard_rows": self.layout.shard_rows,
            "row_bytes": self.layout.row_bytes,
            "shards": ledger.table.num_rows,
            "bytes": ledger.bytes,
            "statistics": ledger.statistics(),
            "coverage": {**asdict(coverage), "missing": coverage.missing},
        }


def card_checksum(card: dict) -> str:
    """sha256 of a card's canonical JSON, kept beside it."""
    return hashlib.sha256(canonical_json(card)).hexdigest()
