"""What nobody needs any more: left-overs of killed writers, and what was superseded.

Removed are private files of an interrupted `publish`, dropped groups and plans, groups that were begun and never
finished, dead leases, staged files without a writer, shard files and records that do not count because a newer record
does; the bytes of withdrawn records go, their names stay, for they number the revisions. What is committed, what is
being written, and what is damaged (that is for `olavlm-cache repair`) is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from . import files
from .builder import StoreBuilder
from .errors import LeaseHeld, StoreError
from .features import TeacherFeatures
from .files import Location
from .lease import is_live, leased
from .records import latest_records, revisions_of
from .replacement import is_of_replacement
from .shard import read_metadata
from .store import RESERVED, FeatureStore
from .verify import shards_to_verify

YOUNG_SECONDS = 3600.0  # a private name younger than this may be a writer's at work


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs, and the bytes that it takes."""

    what: str
    path: str
    bytes: int


def collect(path: str, *, older_than: float = YOUNG_SECONDS, dry_run: bool = False) -> Iterator[Garbage]:
    """Remove what nobody needs from the store and say what it was; with `dry_run` only say it.

    `older_than`: seconds that a private file or an unfinished group must be old.
    """
    store = FeatureStore(path)
    builder = StoreBuilder(path) if not dry_run else None
    now = time.time() if dry_run else files.clock(store.path)
    for folder in _folders(store):
        yield from _private_files(folder, now, older_than, dry_run)
    for name in files.names(store.path):
        folder = store.path / name
        begun = name[0] != "." and name not in RESERVED and name not in store.teachers and _is_unfinished(folder)
        if (name.startswith(".dropped.") or begun) and _old(folder, now, older_than):
            yield Garbage("dropped or unfinished", str(folder), sum(files.sizes_below(folder).values()))
            if not dry_run:
                files.remove_tree(folder)
    for key in store.teachers:
        try:
            group = store[key]
        except StoreError:
            continue  # damaged: verify says so
        yield from _of_teacher(group, builder)


def _folders(store: FeatureStore) -> list[Location]:
    parts = ("", "commits", "leases", "staging", "features", "scales")
    return [store.path, *(store.path / n for n in ("plan", "runs")), *(
        store.path / key / part if part else store.path / key for key in store.teachers for part in parts
    )]  # fmt: skip


def _private_files(folder: Location, now: float, older_than: float, dry_run: bool) -> Iterator[Garbage]:
    for name, stamp in files.listing(folder, ".").items():
        if files.is_private(name) and _old(folder / name, now, older_than):
            yield Garbage("private file", str(folder / name), stamp.size)
            if not dry_run:
                files.remove(folder / name)


def _is_unfinished(folder: Location) -> bool:
    """Whether it is a teacher's group that was begun and holds nothing: not one whose metadata was lost."""
    try:
        ours = "card" in read_metadata(folder)["attributes"]
    except (StoreError, KeyError):
        return False
    data = [name for part in ("commits", "features/c", "scales/c") for name in files.names(folder / part)]
    return ours and not data


def _old(path: Location, now: float, older_than: float) -> bool:
    try:
        if files.is_local(path) or files.exists(path):
            changed = files.changed_at(path)
        else:  # a folder of objects is as old as its metadata
            changed = files.changed_at(path / "zarr.json")
    except FileNotFoundError:
        return False
    return now - changed >= older_than


def _of_teacher(group: TeacherFeatures, builder: StoreBuilder | None) -> Iterator[Garbage]:
    staged = files.listing(group.folder / "staging")
    latest = latest_records(files.names(group.folder / "commits"))
    leases = leased(group.folder / "leases")  # last: what was staged before is its holder's
    damaged, sweep = group.ledger().damaged, set()
    for shard, file in leases.items():
        if not is_live(file):
            yield Garbage("dead lease", str(file), files.size(file) or 0)
            sweep.add(shard)
    busy = set(leases) - sweep
    for name, stamp in staged.items():
        if name.partition(".")[0].isdigit() and (shard := int(name.partition(".")[0])) not in busy:
            if is_of_replacement(name) and (shard not in latest or shard in damaged):
                continue  # of rows that the next writer carries over
            yield Garbage("staged file", str(group.folder / "staging" / name), stamp.size)
            sweep.add(shard)
    for shard in shards_to_verify(group):
        if shard in busy:
            continue
        superseded = revisions_of(group.folder / "commits", shard)[0][1:]
        if shard in damaged:
            sweep.discard(shard)
            continue
        shard_files = (array.file(group.folder, shard) for array in group.layout.arrays.values())
        sizes = {file: files.size(file) for file in shard_files if shard not in latest}
        found = [Garbage("superseded record", str(file), files.size(file) or 0) for file in superseded]
        found += [Garbage("shard file without a record", str(f), size) for f, size in sizes.items() if size is not None]
        if found:
            yield from found
            sweep.add(shard)
    if builder is not None:
        writer = builder.writer(group)
        for shard in sorted(sweep):
            try:
                writer.sweep(shard)
            except LeaseHeld:
                continue  # a writer has come; it sweeps by itself
    commits = files.listing(group.folder / "commits")
    for name, stamp in commits.items():
        if name.endswith(".json") and name.removesuffix("json") + "withdrawn" in commits:  # its writer died in between
            yield Garbage("withdrawn record", str(group.folder / "commits" / name), stamp.size)
            if builder is not None:
                files.remove(group.folder / "commits" / name)
        if name.endswith(".withdrawn") and stamp.size:
            yield Garbage("withdrawn record", str(group.folder / "commits" / name), stamp.size)
            if builder is not None:
                files.replace(group.folder / "commits" / name, b"")
