"""Commit records: the only proof that a shard exists.

One JSON file a shard and revision, `commits/000012.0.json`, published last and by exclusive create. It names the card
(fingerprint), the plan segment, the rows it covers, per row validity, reason, image hash and crc32c, and the shard
file's size and checksum, and ends with a checksum of its own canonical JSON. The highest valid revision counts; a
record that does not check out counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import CorruptFeatures
from .files import fsync_folder, publish
from .shard import Layout, shard_file

FORMAT = 1
_NAME = re.compile(r"(\d{6,})\.(\d+)\.json")


def canonical_json(value: object) -> bytes:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Record:
    """What one commit vouches for. Row lists are in row order and have `rows[1] - rows[0]` entries.

    `reasons` and `crc32c` complement each other: a valid row has a crc32c of its stored bytes and no reason, a
    quarantined row has `{"reason", "detail"}` and no crc32c. `file` is None when no row is valid, else its size in
    bytes and crc32c. `host` and `timings` describe the run and are left out when records are compared.
    """

    shard: int
    revision: int
    fingerprint: str  # of the card
    segment: str  # hash of the plan segment
    rows: tuple[int, int]  # [start, stop) of the plan
    crc32c: list[int | None]
    reasons: list[dict[str, str] | None]
    images_sha256: list[str | None]  # of each image file's bytes; None if it could not be read
    file: dict[str, int] | None
    fidelity: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.rows[1] - self.rows[0]
        assert n > 0, self.rows
        assert len(self.crc32c) == len(self.reasons) == len(self.images_sha256) == n
        assert all((c is None) != (r is None) for c, r in zip(self.crc32c, self.reasons, strict=True))
        assert (self.file is None) == (self.num_valid == 0)

    @property
    def num_valid(self) -> int:
        return sum(c is not None for c in self.crc32c)

    @property
    def name(self) -> str:
        return f"{self.shard:06d}.{self.revision}.json"

    def comparable(self) -> dict:
        """The record without what differs between two runs that did the same."""
        return {k: v for k, v in asdict(self).items() if k not in ("host", "timings")}

    def publish(self, folder: Path) -> None:
        """Write `folder/name`; raises FileExistsError if another writer was first."""
        content = {"format": FORMAT, **asdict(self), "rows": list(self.rows)}
        content["checksum"] = hashlib.sha256(canonical_json(content)).hexdigest()
        publish(folder / self.name, canonical_json(content) + b"\n")

    @classmethod
    def read(cls, file: Path) -> Record:
        """Read and check a record; raises `CorruptFeatures` if it is not what was written."""
        raw = file.read_bytes()
        try:
            content = json.loads(raw)
            checksum = content.pop("checksum")
            if checksum != hashlib.sha256(canonical_json(content)).hexdigest():
                raise ValueError("its checksum is not its content's")
            if raw != canonical_json({**content, "checksum": checksum}) + b"\n":
                raise ValueError("it is not spelled as it was written")
            if content.pop("format") != FORMAT:
                raise ValueError("unknown format number")
            record = cls(**{**content, "rows": tuple(content["rows"])})
            if record.name != file.name:
                raise ValueError(f"it is the record {record.name}")
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
            raise CorruptFeatures(f"commit record {file} is damaged: {e}") from None
        return record


def shards_on_record(folder: Path) -> list[int]:
    """The shards that have a commit record, valid or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted({int(m[1]) for f in folder.iterdir() if (m := _NAME.fullmatch(f.name))})


def revisions_of(folder: Path, shard: int) -> tuple[list[Path], int]:
    """The records of one shard, highest revision first, whether valid or not, and the next free revision.

    A withdrawn record keeps its number (as `.withdrawn`), so that the numbers have no gap and a few look-ups find
    them all, whatever the number of shards in the folder.
    """
    files, revision = [], 0
    while True:
        file = folder / f"{shard:06d}.{revision}.json"
        if file.exists():
            files.insert(0, file)
        elif not file.with_suffix(".withdrawn").exists():
            return files, revision
        revision += 1


def withdraw(file: Path) -> None:
    """Take back what a record vouches for, durably."""
    file.rename(file.with_suffix(".withdrawn"))
    fsync_folder(file.parent)


def valid_record(group: Path, layout: Layout, shard: int, fingerprint: str) -> Record | None:
    """The record that counts for `shard` of a teacher group, or None if the shard does not exist.

    That is the highest revision that is whole, of this card, and whose shard file has the size it names. Raises
    `CorruptFeatures` when records are there and none of them counts.
    """
    files, _ = revisions_of(group / "commits", shard)
    problem = None
    for file in files:
        try:
            record = Record.read(file)
        except FileNotFoundError:  # withdrawn since it was listed
            continue
        except CorruptFeatures as e:
            problem = problem or e
            continue
        if record.fingerprint != fingerprint:
            problem = problem or CorruptFeatures(f"commit record {file} is of another card ({record.fingerprint[:12]})")
            continue
        data = shard_file(group / "features", shard)
        try:
            size = data.stat().st_size
        except FileNotFoundError:
            size = None
        if size != (record.file or {}).get("size"):
            problem = problem or CorruptFeatures(f"shard file {data} has size {size}, its record says {record.file}")
            continue
        return record
    if revisions_of(group / "commits", shard)[0] != files:  # a writer is replacing the shard: look again
        return valid_record(group, layout, shard, fingerprint)
    if problem is not None:
        raise problem
    return None
