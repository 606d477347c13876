"""The feature store: one plan, and beside it one group of committed shards a teacher.

    STORE/zarr.json                a Zarr v3 group
    STORE/plan/00000.parquet       the rows (plan.py)
    STORE/depth/zarr.json          group; its attribute `card` says what made the features
    STORE/depth/features/          (rows padded to whole shards, tokens, dim), fill value NaN (shard.py)
    STORE/depth/commits/           one record a shard: a shard exists if and only if its valid record does
    STORE/depth/leases/ staging/   writers at work (commit.py)

    >>> from olavlm.cache import FeatureStore
    >>> store = FeatureStore("STORE")
    >>> store["depth"]["coco/000001.jpg"].shape
    (576, 1024)

Reading a row is one positioned read into the caller's buffer, and its crc32c is compared with the record's, so that
damage, a swapped file or a stale one is an error and never a wrong value. zarr-python reads the same files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .codec import decode
from .errors import BadImage, CorruptFeatures, MissingFeatures, StoreError
from .plan import Plan
from .records import Record, shards_on_record, valid_record
from .shard import Layout, crc32c, shard_file

_OPEN_FILES = 64  # shard files kept open by one reader


@dataclass(frozen=True)
class Coverage:
    """Of the plan's images: how many have features, were quarantined, or are not committed."""

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


def read_metadata(folder: Path) -> dict:
    """The `zarr.json` of a Zarr v3 node; StoreError if there is none."""
    file = folder / "zarr.json"
    try:
        metadata = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{folder} is not a feature store: it has no zarr.json; make one with olavlm-extract"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise StoreError(f"{file} is damaged: not JSON") from None
    sound = isinstance(metadata, dict) and isinstance(metadata.get("attributes", {}), dict)
    if not sound or metadata.get("zarr_format") != 3:
        raise StoreError(f"{file} is not Zarr v3 metadata")
    return metadata


class FeatureStore(Mapping[str, "TeacherFeatures"]):
    """A store, opened read-only. `store["depth"]` is a teacher's features, `store.plan` the rows.

    Raises `StoreError` if `path` is not a store, `PlanError` if its plan is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        metadata = read_metadata(self.path)
        if "olavlm" not in metadata.get("attributes", {}):
            raise StoreError(f"{self.path} is a Zarr group but not a feature store; make one with olavlm-extract")
        self._plan = Plan.load(self.path / "plan")
        self._opened: dict[str, TeacherFeatures] = {}

    @property
    def teachers(self) -> list[str]:
        """The keys present, sorted."""
        return sorted(
            f.name
            for f in self.path.iterdir()
            if (f / "features" / "zarr.json").is_file() and not f.name.startswith(".")
        )

    @property
    def plan(self) -> pa.Table:
        """Columns row (int64) and image (string), one line per distinct image."""
        return self._plan.table

    @property
    def rows(self) -> Plan:
        """The plan with its look-ups, path to row and back."""
        return self._plan

    def __getitem__(self, key: str) -> TeacherFeatures:
        if key not in self._opened:
            if key not in self.teachers:
                raise MissingFeatures(
                    f"{self.path} has no features '{key}'; it has {', '.join(self.teachers) or 'none'}"
                )
            self._opened[key] = TeacherFeatures(self.path, key, self._plan)
        return self._opened[key]

    def __iter__(self):
        return iter(self.teachers)

    def __len__(self) -> int:
        return len(self.teachers)

    def preview(self, image: str | int, roots: Sequence[str] | None = None):
        """A picture (PIL, RGB): the image beside each teacher's tokens as PCA colours.

        `roots` are image roots as for `ImageRoots`; by default those that the store was extracted from.
        """
        from .display import preview

        return preview(self, image, roots)

    def _repr_html_(self) -> str:
        from .display import store_html

        return store_html(self)

    def __repr__(self) -> str:
        lines = [f"FeatureStore({str(self.path)!r}), plan of {self._plan.num_images} images"]
        lines += [f"  {key}: {self[key].shape} {self[key].dtype}, {self[key].coverage()}" for key in self.teachers]
        return "\n".join(lines)


class _OpenFile:
    """A descriptor that closes with its last user. Positioned reads share it between threads and forks."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TeacherFeatures:
    """One teacher's features: `.card`, `.shape` (plan rows, tokens, dim), `.dtype`, `.coverage()`, rows by index.

    Plan rows run from 0 to the plan's last row; in a plan that has grown, the numbers between two segments hold no
    image. Safe to share between threads and to send to other processes.
    """

    def __init__(self, store: Path, key: str, plan: Plan) -> None:
        self.key, self.plan, self.folder = key, plan, store / key
        group = read_metadata(self.folder)
        try:
            self.card: dict = group["attributes"]["card"]
            self.fingerprint: str = self.card["fingerprint"]
        except (KeyError, TypeError):
            raise StoreError(f"{self.folder / 'zarr.json'} is damaged: it holds no teacher card") from None
        self.array = self.folder / "features"
        self.layout = Layout.of(read_metadata(self.array), self.array)
        self._records: dict[int, tuple[Record, np.ndarray]] = {}  # with the offset of each row in the shard file
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    def __getstate__(self):
        return {**self.__dict__, "_files": OrderedDict()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(plan rows, tokens, dim)"""
        return self.plan.extent, self.layout.tokens, self.layout.dim

    @property
    def dtype(self) -> np.dtype:
        """The dtype in storage; `[]` and `read` hand out float32."""
        return self.layout.numpy_dtype

    def record(self, shard: int) -> Record | None:
        """The commit record of a shard, None if it is not committed; CorruptFeatures if its records are damaged."""
        known = self._located(shard)
        return known and known[0]

    def _located(self, shard: int) -> tuple[Record, np.ndarray] | None:
        known = self._records.get(shard)
        if known is None:
            record = valid_record(self.folder, self.layout, shard, self.fingerprint)
            if record is None:
                return None
            if record.rows[0] >= self.plan.extent:
                return None  # the plan has grown since this store was opened
            start, stop = record.rows
            if record.segment not in [s.hash for s in self.plan.segments if s.start <= start and stop <= s.stop]:
                raise CorruptFeatures(f"{self.folder}: shard {shard} was committed for another plan")
            # Valid rows lie without gaps: row i starts after the valid rows before it.
            valid = np.array([c is not None for c in record.crc32c])
            known = self._records[shard] = record, (np.cumsum(valid) - valid) * self.layout.slot_bytes
        return known

    def reload(self) -> None:
        """Forget what was read of records and files, to see what has been committed since."""
        self._files.clear()
        self._records.clear()

    def coverage(self, rows: np.ndarray | None = None) -> Coverage:
        """Coverage of `rows` (those of the whole plan by default). Damaged shards count as missing."""
        wanted = self.plan.rows if rows is None else np.unique(np.asarray(rows, np.int64))
        valid, reasons = 0, Counter()
        for record in self._valid_records():
            at = wanted[np.searchsorted(wanted, record.rows[0]) : np.searchsorted(wanted, record.rows[1])]
            for row in at - record.rows[0]:
                reason = record.reasons[row]
                if reason is None:
                    valid += 1
                else:
                    reasons[reason["reason"]] += 1
        return Coverage(len(wanted), valid, reasons.total(), dict(reasons))

    def failures(self) -> list[tuple[int, BadImage]]:
        """The quarantined rows, ascending, each with its `BadImage`."""
        return [
            (row, self._bad_image(row, reason))
            for record in self._valid_records()
            for row, reason in zip(range(*record.rows), record.reasons, strict=True)
            if reason is not None
        ]

    def missing_rows(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Of `rows` (default: the whole plan) those that are not committed, ascending, int64."""
        wanted = self.plan.rows if rows is None else np.unique(np.asarray(rows, np.int64))
        covered = np.zeros(len(wanted), bool)
        for record in self._valid_records():
            covered[np.searchsorted(wanted, record.rows[0]) : np.searchsorted(wanted, record.rows[1])] = True
        return wanted[~covered]

    def _valid_records(self):
        for shard in shards_on_record(self.folder / "commits"):
            try:
                record = self.record(shard)
            except CorruptFeatures:
                continue
            if record is not None:
                yield record

    def failure(self, row: int | str) -> BadImage | None:
        """Why a row was quarantined (reason, detail, image), or None if it is valid; MissingFeatures if uncommitted."""
        row = self._row(row)
        record, _ = self._committed(row)
        reason = record.reasons[row - record.rows[0]]
        return None if reason is None else self._bad_image(row, reason)

    def _bad_image(self, row: int, reason: dict[str, str]) -> BadImage:
        return BadImage(self.plan.image_of(row), reason["reason"], reason["detail"])

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

        Returns values `(B, tokens, dim)` float32, or `out` filled in the storage dtype if it is given, and valid `(B,)`
        bool; a quarantined row is NaN. Raises `MissingFeatures` naming the first rows that are not committed, and
        `CorruptFeatures` for damage.
        """
        rows = [self._row(r) for r in rows]
        shape = (len(rows), self.layout.tokens, self.layout.dim)
        if out is not None and (out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous):
            raise ValueError(f"out must be a contiguous {shape} array of {self.dtype}, got {out.shape} of {out.dtype}")
        stored = np.empty(shape, self.dtype) if out is None else out
        valid = np.zeros(len(rows), bool)
        absent = [r for r in rows if not self._is_committed(r)]
        if absent:
            raise MissingFeatures(
                f"{self.folder}: {len(absent)} of {len(rows)} rows are not committed (first: {absent[:5]}); "
                "run olavlm-extract again to finish the store"
            )
        for i, row in enumerate(rows):
            valid[i] = self._read_row(row, stored[i])
        return (decode(stored) if out is None else stored), valid

    def _row(self, row: int | str) -> int:
        if isinstance(row, str):
            return self.plan.row_of(row)
        row = operator.index(row)
        self.plan.segment_of(row)
        return row

    def _is_committed(self, row: int) -> bool:
        record = self.record(self.layout.shard_of(row))
        return record is not None and record.rows[0] <= row < record.rows[1]

    def _committed(self, row: int) -> tuple[Record, np.ndarray]:
        known = self._located(self.layout.shard_of(row))
        if known is None or not known[0].rows[0] <= row < known[0].rows[1]:
            raise MissingFeatures(
                f"{self.folder}: row {row} ({self.plan.image_of(row)}) is not committed; run olavlm-extract again"
            )
        return known

    def _read_row(self, row: int, into: np.ndarray) -> bool:
        """Fill `into` (storage dtype, contiguous) with a committed row; NaN and False if it is quarantined."""
        shard = self.layout.shard_of(row)
        for _ in range(2):  # again with the record and file of now: the shard may have been replaced since
            record, starts = self._committed(row)
            offset = row - record.rows[0]
            expected = record.crc32c[offset]
            if expected is None:
                into.fill(np.nan)
                return False
            try:
                file = self._file(shard)  # kept in hand: another thread may push it out of the open files
                read = os.preadv(file.descriptor, [into.reshape(-1).view(np.uint8)], int(starts[offset]))
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                read = 0
            if read == self.layout.row_bytes and crc32c(into) == expected:
                return True
            self._records.pop(shard, None)
            self._files.pop(shard, None)
        raise CorruptFeatures(
            f"{self.folder}: row {row} ({self.plan.image_of(row)}) in {shard_file(self.array, shard)} is damaged: "
            "its bytes do not match its commit record"
        )

    def _file(self, shard: int) -> _OpenFile:
        file = self._files.pop(shard, None) or _OpenFile(shard_file(self.array, shard))
        if len(self._files) >= _OPEN_FILES:
            with contextlib.suppress(KeyError):  # emptied by another thread
                self._files.popitem(last=False)
        self._files[shard] = file
        return file

    def _repr_html_(self) -> str:
        from .display import teacher_html

        return teacher_html(self)

    def __repr__(self) -> str:
        return f"TeacherFeatures({self.key!r}, shape={self.shape}, dtype={self.dtype}, {self.coverage()})"

    def info(self) -> dict:
        """Card, shapes and coverage as JSON-clean values."""
        return {
            "key": self.key,
            "card": self.card,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "shard_rows": self.layout.shard_rows,
            "row_bytes": self.layout.row_bytes,
            "coverage": {**asdict(self.coverage()), "missing": self.coverage().missing},
        }
