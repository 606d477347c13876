"""Commit records: the only proof that a shard exists.

One JSON file a shard and revision, `commits/000012.0.json`, published last and by exclusive create. It names the card
(fingerprint), the plan segment, the rows it covers, per row validity, reason, image hash and crc32c, and each shard
file's size and checksum, and carries a checksum of its own canonical JSON. The highest valid revision counts; a
record that does not check out counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from . import files
from .errors import CorruptFeatures, WrongSize
from .files import Location
from .shard import CRC_BYTES, Layout

FORMAT = 1
_NAME = re.compile(r"(\d{6}|[1-9]\d{6,})\.(0|[1-9]\d*)\.(json|withdrawn)")
_PREFIX = b'{"checksum":"'  # "checksum" is the first of a record's sorted keys


def canonical_json(value: object) -> bytes:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class ShardFile:
    """What a record says of one array's shard file: its size in bytes and crc32, and the crc32c of each row's bytes.

    The whole has the crc32 of zlib and gzip: a crc32c over a file in which each row is followed by its own crc32c is
    the same whatever the rows hold. `rows_crc32c` has an entry a row of the record, None where the row is quarantined.
    `rows_bytes` are the lengths of compressed rows without their crc32c, and None where nothing is compressed.
    """

    size: int
    crc32: int
    rows_crc32c: list[int | None]
    rows_bytes: list[int | None] | None = None


@dataclass(frozen=True)
class Record:
    """What one commit vouches for. Row lists are in row order and have `rows[1] - rows[0]` entries.

    A quarantined row has `{"reason", "detail"}` in `reasons`, a valid one None. `files` has an entry for every array
    of the teacher, and is empty when no row is valid. `host` and `timings` describe the run and are left out when
    records are compared.
    """

    shard: int
    revision: int
    fingerprint: str  # of the card
    segment: str  # hash of the plan segment
    rows: tuple[int, int]  # [start, stop) of the plan
    reasons: list[dict[str, str] | None]
    images_sha256: list[str | None]  # of each image file's bytes; None if it could not be read
    files: dict[str, ShardFile]
    fidelity: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.rows[1] - self.rows[0]
        assert n > 0, self.rows
        assert len(self.reasons) == len(self.images_sha256) == n
        assert bool(self.files) == (self.num_valid > 0)
        for file in self.files.values():
            for per_row in (file.rows_crc32c, file.rows_bytes or file.rows_crc32c):
                assert all((c is None) != (r is None) for c, r in zip(per_row, self.reasons, strict=True))
            assert all(c is None or 0 <= c < 2**32 for c in file.rows_crc32c)
        assert all(r is None or r.keys() == {"reason", "detail"} for r in self.reasons)

    @property
    def num_valid(self) -> int:
        return sum(r is None for r in self.reasons)

    @property
    def bytes(self) -> int:
        """Bytes of the shard files."""
        return sum(file.size for file in self.files.values())

    @property
    def name(self) -> str:
        return record_name(self.shard, self.revision)

    def comparable(self) -> dict:
        """The record without what differs between two runs that did the same."""
        return {k: v for k, v in self._content().items() if k not in ("host", "timings")}

    def _content(self) -> dict:
        """As `dataclasses.asdict`, which copies every number of every row."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**content, "files": {name: vars(file) for name, file in self.files.items()}}

    def fits(self, layout: Layout) -> bool:
        """Whether its rows and its files are those of this layout, and the files as long as the rows make them."""
        if not layout.shard_of(self.rows[0]) == layout.shard_of(self.rows[1] - 1) == self.shard:
            return False
        if self.files and set(self.files) != set(layout.arrays):
            return False
        for name, file in self.files.items():
            array = layout.arrays[name]
            if (file.rows_bytes is None) != (array.compress == "none"):
                return False
            rows = [n for n in file.rows_bytes or [array.row_bytes] * self.num_valid if n is not None]
            if file.size != sum(rows) + CRC_BYTES * len(rows) + array.index_bytes:
                return False
        return True

    def publish(self, folder: Location) -> None:
        """Write `folder/name`; raises FileExistsError if another writer was first."""
        files.publish(folder / self.name, self.to_bytes())

    def to_bytes(self) -> bytes:
        """As it is written."""
        content = {"format": FORMAT, **self._content()}
        content["checksum"] = hashlib.sha256(canonical_json(content)).hexdigest()
        return canonical_json(content) + b"\n"

    @classmethod
    def read(cls, file: Location) -> Record:
        """Read and check a record; raises `CorruptFeatures` if it is not what was written, or its disk lost it."""
        try:
            record = cls.parse(files.read(file), file)
        except OSError as e:
            if e.errno not in files.UNREADABLE:
                raise
            raise CorruptFeatures(f"commit record {file} cannot be read: {e.strerror}") from None
        if record.name != file.name:
            raise CorruptFeatures(f"commit record {file} is damaged: it is the record {record.name}")
        return record

    @classmethod
    def parse(cls, raw: bytes, file: Location) -> Record:
        """A record of its bytes, which `file` holds; raises `CorruptFeatures`."""
        try:
            content = json.loads(_checked(raw))
            if content.pop("format") != FORMAT:
                raise ValueError("unknown format number")
            content["files"] = {name: ShardFile(**f) for name, f in content["files"].items()}
            return cls(**{**content, "rows": tuple(content["rows"])})
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
            raise CorruptFeatures(f"commit record {file} is damaged: {e}") from None


def _checked(raw: bytes) -> bytes:
    """A record's JSON without its checksum; ValueError if a byte of it is not what was written.

    The checksum is of the canonical JSON without itself, and stands first in it, so nothing is spelled anew.
    """
    start = len(_PREFIX)
    checksum, body = raw[start : start + 64], b"{" + raw[start + 66 : -1]
    spelled = raw[:start] == _PREFIX and raw[start + 64 : start + 66] == b'",' and raw[-1:] == b"\n"
    if not spelled or checksum != hashlib.sha256(body).hexdigest().encode():
        raise ValueError("its checksum is not its content's")
    return body


def record_name(shard: int, revision: int) -> str:
    return f"{shard:06d}.{revision}.json"


def latest_records(names: Iterable[str]) -> dict[int, int]:
    """The highest revision of each shard that has a record, by the names in a folder of records."""
    found = _numbered(names)
    latest = {}
    for shard, revision, kind in sorted(found):
        if kind == "json" and (shard, revision, "withdrawn") not in found:
            latest[shard] = revision
    return latest


def withdrawn_shards(names: Iterable[str]) -> set[int]:
    """The shards that had a record once and have none now: their writer died while it replaced them."""
    found = _numbered(names)
    return {shard for shard, _, _ in found} - latest_records(names).keys()


def _numbered(names: Iterable[str]) -> set[tuple[int, int, str]]:
    """(shard, revision, kind) of every name of a record."""
    return {(int(m[1]), int(m[2]), m[3]) for m in map(_NAME.fullmatch, names) if m}


def revisions_of(folder: Location, shard: int) -> tuple[list[Location], int]:
    """The records of one shard, highest revision first, whether valid or not, and the next free revision.

    A withdrawn record keeps its number (as `.withdrawn`), so that the numbers have no gap and a few look-ups find
    them all, whatever the number of shards in the folder.
    """
    there = None if files.is_local(folder) else files.listing(folder, f"{shard:06d}.")
    found, revision = [], 0
    while True:
        file = folder / record_name(shard, revision)
        withdrawn = file.with_suffix(".withdrawn")
        is_there, is_withdrawn = (f.exists() if there is None else f.name in there for f in (file, withdrawn))
        if is_there and not is_withdrawn:  # both: an object store's writer died while it withdrew
            found.insert(0, file)
        elif not is_withdrawn:
            return found, revision
        revision += 1


def withdraw(file: Location) -> None:
    """Take back what a record vouches for, durably; FileNotFoundError if another writer has."""
    if files.is_local(file):
        file.rename(file.with_suffix(".withdrawn"))
        files.fsync_folder(file.parent)
        return
    try:
        files.publish(file.with_suffix(".withdrawn"), files.read(file))
    except FileExistsError:
        raise FileNotFoundError(f"{file} was withdrawn by another writer") from None
    files.remove(file)


def valid_record(group: Location, layout: Layout, shard: int, fingerprint: str) -> Record | None:
    """The record that counts for `shard` of a teacher group, or None if the shard does not exist.

    That is the highest revision that is whole, of this card and layout, and whose shard files have the sizes it names.
    Raises `CorruptFeatures` when records are there and none of them counts.
    """
    revisions, _ = revisions_of(group / "commits", shard)
    problem = None
    for file in revisions:
        try:
            record = Record.read(file)
        except FileNotFoundError:  # withdrawn since it was listed
            continue
        except CorruptFeatures as e:
            problem = problem or e
            continue
        try:
            check_counts(record, file, group, layout, fingerprint)
        except CorruptFeatures as e:
            problem = problem or e
            continue
        return record
    if revisions_of(group / "commits", shard)[0] != revisions:  # a writer is replacing the shard: look again
        return valid_record(group, layout, shard, fingerprint)
    if problem is not None:
        raise problem
    return None


def check_counts(record: Record, file: Location, group: Location, layout: Layout, fingerprint: str) -> None:
    """CorruptFeatures if a record, whole as it is and read from `file`, does not count."""
    if record.fingerprint != fingerprint:
        raise CorruptFeatures(f"commit record {file} is of another card ({record.fingerprint[:12]})")
    if not record.fits(layout):
        raise CorruptFeatures(f"commit record {file} is of another layout")
    for name, array in layout.arrays.items():
        stored = array.file(group, record.shard)
        size, recorded = files.size(stored), record.files[name].size if record.files else None
        if size != recorded:
            raise WrongSize(f"commit record {file} says that shard file {stored} has size {recorded}, it has {size}")
