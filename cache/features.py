"""One teacher's features in a store, row by row.

Reading a row is one positioned read into the caller's buffer, and its crc32c is compared with the record's, so that
damage, a swapped file or a stale one is an error and never a wrong value. zarr-python reads the same files.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .errors import BadImage, StoreError
from .files import Location
from .ledger import Ledger
from .local_cache import LocalCache
from .plan import Plan
from .records import Record, canonical_json
from .row_reader import RowReader
from .shard import Layout, read_metadata


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


class TeacherFeatures:
    """One teacher's features: `.card`, `.shape` (plan rows, tokens, dim), `.dtype`, `.coverage()`, rows by index.

    Plan rows run from 0 to the plan's last row; in a plan that has grown, the numbers between two segments hold no
    image. Safe to share between threads and to send to other processes.
    """

    def __init__(self, store: Location, key: str, plan: Plan, local_cache: LocalCache | None = None) -> None:
        self.key, self.plan, self.folder = key, plan, store / key
        group = read_metadata(self.folder)
        try:
            self.card: dict = group["attributes"]["card"]
            self.fingerprint: str = self.card["fingerprint"]
        except (KeyError, TypeError):
            raise StoreError(f"{self.folder / 'zarr.json'} is damaged: it holds no teacher card") from None
        if group["attributes"].get("card_sha256") != card_checksum(self.card):
            raise StoreError(f"{self.folder / 'zarr.json'} is damaged: its card is not the one that was written")
        self.layout = Layout.of(self.folder)
        self._reader = RowReader(self.folder, self.layout, self.fingerprint, plan, local_cache)
        self._known: Ledger | None = None

    def __getstate__(self):
        return {**self.__dict__, "_known": None}

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
        return self._reader.record(shard)

    def ledger(self) -> Ledger:
        """What the records say now, in columns."""
        self._known = Ledger.load(self.folder, self.layout, self.fingerprint, self.plan, self._known)
        return self._known

    def reload(self) -> None:
        """Forget what was read of records and files, to see what has been committed since."""
        self._reader.forget()

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
        shard = self._reader.committed(row)
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
        valid = self._reader.read(numbers, out)
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
