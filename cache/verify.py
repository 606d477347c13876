"""Is every committed byte what was written?

    for finding in verify(FeatureStore("features")["depth"]):
        print(finding)

`verify` goes over the records (whole, of this card, plan and layout), the files they vouch for (there, as long as the
record says) and, unless `fast`, every byte of them: each row and its embedded checksum against the record's crc32c, the
shard index against the one that the rows make, the whole file's crc32, and that compressed rows unpack. Nothing is
changed; `olavlm-cache repair` does shards with findings again.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from . import files
from .errors import CorruptFeatures, StoreError, WrongSize
from .features import TeacherFeatures
from .files import Location
from .lease import is_live, leased
from .records import Record, latest_records, record_name, revisions_of, valid_record, withdrawn_shards
from .shard import CRC_BYTES, ArrayLayout, crc32c, read_metadata
from .store import RESERVED, FeatureStore


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written."""

    key: str
    shard: int | None
    """None for what is the whole teacher's."""
    kind: str
    """metadata, plan, record, withdrawn (a shard whose writer died while it was replaced), no-record (a shard file that
    no record vouches for), size, row, index, file or unreadable"""
    detail: str

    def __str__(self) -> str:
        where = self.key if self.shard is None else f"{self.key} shard {self.shard}"
        return f"{where}: {self.kind}: {self.detail}"


def open_teachers(store: FeatureStore, keys: list[str] | None = None) -> Iterator[TeacherFeatures | Finding]:
    """The teachers of a store, or those of `keys`; a finding in place of one whose metadata is damaged."""
    lost = [
        name
        for name in files.names(store.path)
        if name not in (*store.teachers, *RESERVED) and name[0] != "." and files.names(store.path / name / "commits")
    ]
    for key in keys or store.teachers:
        try:
            yield store[key]
        except StoreError as e:
            yield Finding(key, None, "metadata", str(e))
    for key in lost if keys is None else ():
        yield Finding(key, None, "metadata", f"{store.path / key} has commit records and no features/zarr.json")


def shards_to_verify(group: TeacherFeatures) -> list[int]:
    """Every shard that has a record, a withdrawn one too, or a file, ascending."""
    names = files.names(group.folder / "commits")
    return sorted({*latest_records(names), *withdrawn_shards(names), *_files_by_shard(group)})


def verify(
    group: TeacherFeatures, *, fast: bool = False, on_shard: Callable[[int], None] = lambda shard: None
) -> Iterator[Finding]:
    """What is wrong with a teacher's features; nothing if all is well. `on_shard` hears of every shard gone over.

    What is found in a shard that a live writer is at work on is its own, and not told.
    """
    yield from _extent(group)
    there, suspects = _files_by_shard(group), []
    for shard in shards_to_verify(group):
        if _shard(group, shard, there.get(shard, []), fast):
            suspects.append(shard)
        on_shard(shard)
    if not suspects:
        return
    # Once more, as things are now: the plan may have grown, and a shard been replaced, in between.
    again = FeatureStore(group.folder.parent)[group.key]
    for shard in suspects:
        lease = leased(group.folder / "leases").get(shard)
        if lease is None or not is_live(lease):
            arrays = [n for n, a in again.layout.arrays.items() if files.exists(a.file(again.folder, shard))]
            yield from _shard(again, shard, arrays, fast)


def _shard(group: TeacherFeatures, shard: int, arrays: list[str], fast: bool) -> list[Finding]:
    """What is wrong with one shard; on an object store an error of the server is no damage, and is raised."""
    found = []
    try:
        found += _findings(group, shard, arrays, fast)
    except FileNotFoundError:
        raise
    except OSError as e:
        if not files.is_local(group.folder):
            raise
        found.append(Finding(group.key, shard, "unreadable", f"{e.filename}: {e.strerror}"))
    return found


def _findings(group: TeacherFeatures, shard: int, arrays: list[str], fast: bool) -> Iterator[Finding]:
    damaged = list(_records(group, shard))
    yield from damaged
    try:
        record = group.record(shard)
    except CorruptFeatures as e:
        if not damaged:
            yield Finding(group.key, shard, "size" if isinstance(e, WrongSize) else "record", str(e))
        return
    if record is None and (beyond := valid_record(group.folder, group.layout, shard, group.fingerprint)) is not None:
        yield Finding(group.key, None, "plan", f"shard {shard} is of rows {beyond.rows}, which the plan does not hold")
        return
    if record is None and not arrays and _is_withdrawn(group, shard):
        yield Finding(group.key, shard, "withdrawn", "its writer died before the record that replaces it was there")
    for name in arrays:
        if record is None or name not in record.files:
            yield Finding(group.key, shard, "no-record", f"{name} file that no valid record vouches for")
    for name in record.files if record is not None and not fast else ():
        yield from _bytes(group, record, group.layout.arrays[name])


def _is_withdrawn(group: TeacherFeatures, shard: int) -> bool:
    """Whether a shard of the plan had a record once, and has none now."""
    standing, free = revisions_of(group.folder / "commits", shard)
    first = shard * group.layout.shard_rows
    return bool(free and not standing) and any(s.start <= first < s.stop for s in group.plan.segments)


def _extent(group: TeacherFeatures) -> Iterator[Finding]:
    for name in group.layout.arrays:
        rows = read_metadata(group.folder / name)["shape"][0]
        if rows > group.layout.padded(group.plan.extent):  # a plan is extended before the arrays are
            yield Finding(
                group.key, None, "plan", f"{name} has {rows} rows, the plan {group.plan.extent}: a segment is lost"
            )
        if rows < group.layout.padded(group.plan.extent):
            yield Finding(
                group.key, None, "metadata", f"{name} has room for {rows} rows, the plan has {group.plan.extent}"
            )


def _records(group: TeacherFeatures, shard: int) -> Iterator[Finding]:
    for file in revisions_of(group.folder / "commits", shard)[0]:
        with contextlib.suppress(FileNotFoundError):  # withdrawn this instant
            try:
                record = Record.read(file)
            except CorruptFeatures as e:
                yield Finding(group.key, shard, "record", str(e))
                continue
            first = shard * group.layout.shard_rows
            if not first <= record.rows[0] < record.rows[1] <= first + group.layout.shard_rows:
                yield Finding(
                    group.key, shard, "record", f"{record_name(shard, record.revision)} is of rows {record.rows}"
                )


def _bytes(group: TeacherFeatures, record: Record, array: ArrayLayout) -> Iterator[Finding]:
    """Every byte of one shard file against its record."""
    path, recorded = array.file(group.folder, record.shard), record.files[array.name]
    first, total, slots = record.rows[0], 0, []
    row = np.empty(array.row_shape, array.dtype)
    try:
        opened = path.open("rb") if files.is_local(path) else io.BytesIO(files.read(path))
    except FileNotFoundError:
        yield Finding(group.key, record.shard, "size", f"{path} is gone")
        return
    with opened as file:
        for i, expected in enumerate(recorded.rows_crc32c):
            if expected is None:
                continue
            length = recorded.rows_bytes[i] if recorded.rows_bytes else array.row_bytes
            slot = _next(file, length + CRC_BYTES, path)
            total = zlib.crc32(slot, total)
            slots.append((first - record.shard * array.shard_rows + i, len(slot)))
            chunk, trailer = slot[:-CRC_BYTES], slot[-CRC_BYTES:]
            if crc32c(chunk) != expected or trailer != expected.to_bytes(CRC_BYTES, "little"):
                yield Finding(
                    group.key,
                    record.shard,
                    "row",
                    f"{array.name} of row {first + i} ({group.plan.image_of(first + i)})",
                )
            elif array.compress != "none" and not array.unpack(chunk, row):
                yield Finding(group.key, record.shard, "row", f"{array.name} of row {first + i} does not unpack")
        rest = _next(file, -1, path)
    if rest != array.index(*zip(*slots, strict=True)):
        yield Finding(group.key, record.shard, "index", f"of {path}")
    if zlib.crc32(rest, total) != recorded.crc32:
        yield Finding(group.key, record.shard, "file", f"{path} has another crc32 than its record")


def _next(file: BinaryIO, count: int, path: Location) -> bytes:
    try:
        return file.read(count)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None  # which alone does not say of what file


def _files_by_shard(group: TeacherFeatures) -> dict[int, list[str]]:
    """The arrays that have a file, by shard."""
    found: dict[int, list[str]] = {}
    for name, array in group.layout.arrays.items():
        for key in files.sizes_below(group.folder / name / "c"):
            number = key.partition("/")[0]
            if number.isdigit() and array.key(int(number)) == f"c/{key}":
                found.setdefault(int(number), []).append(name)
    return found
