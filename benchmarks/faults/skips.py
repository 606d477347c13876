"""The protections, each to be left out alone: the control arms, which show that the faults are real.

Each is a context manager; what is forked inside it, and what is judged inside it, goes without that protection.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from olavlm.cache import commit, files, lease, ledger, records
from olavlm.cache.commit import OpenShard, ShardWriter
from olavlm.cache.lease import Lease
from olavlm.cache.records import Record, canonical_json
from olavlm.cache.staged import Staged

Skip = contextlib.AbstractContextManager


def private_name() -> Skip:
    """Metadata and plan are written under their public names, in two halves."""

    def publish(file: Path, content: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb", buffering=0) as f:
            f.write(content[: len(content) // 2])
            sys.audit("olavlm.half", str(file))
            f.write(content[len(content) // 2 :])

    return mock.patch.object(files, "publish", publish)


def lease_taken() -> Skip:
    """Every writer begins at once."""

    class Nobodys(Lease):
        def held(self) -> bool:
            return True

        def release(self) -> None:
            pass

    def acquire(folder: Path, shard: int) -> Lease:
        return Nobodys(folder, shard, 0, secrets.token_hex(16))

    return mock.patch.object(commit, "acquire_lease", acquire)


def lease_looked_at_again() -> Skip:
    """A writer believes to the end that it holds the lease it took."""
    return mock.patch.object(Lease, "held", return_value=True)


def takeover() -> Skip:
    """A lease is held until it is released, whoever made it."""
    return mock.patch.object(lease, "_is_dead", return_value=False)


def damaged_lease_is_free() -> Skip:
    """A lease that cannot be understood is somebody's."""
    is_dead = lease._is_dead
    return mock.patch.object(lease, "_is_dead", lambda file, holder, *a: bool(holder) and is_dead(file, holder, *a))


def recover() -> Skip:
    """What a dead writer left stays."""
    return mock.patch.object(ShardWriter, "_recover", return_value=None)


@contextlib.contextmanager
def staging() -> Iterator[None]:
    """A shard is written under its public name."""

    class InPlace(Staged):
        def __init__(self, layout, path: Path) -> None:
            shard, _, _ = path.name.split(".")
            public = layout.file(path.parent.parent, int(shard))
            public.parent.mkdir(parents=True, exist_ok=True)
            public.touch()
            os.link(public, path)
            with mock.patch.object(Path, "open", return_value=public.open("wb")):
                super().__init__(layout, path)

    place = files.place

    def placed(staged: Path, file: Path) -> None:
        if not (file.exists() and file.samefile(staged)):
            place(staged, file)

    with mock.patch.object(commit, "Staged", InPlace), mock.patch.object(files, "place", placed):
        yield


def compare() -> Skip:
    """What was staged is not compared with what was meant."""

    def believe(self: Staged) -> None:
        raw = self.path.read_bytes()
        self.size, self.crc32 = len(raw), zlib.crc32(raw)

    return mock.patch.object(Staged, "compare", believe)


def fsync_of_the_file() -> Skip:
    """The staged files are not flushed."""

    class Os:
        def __getattr__(self, name: str):
            return (lambda fd: None) if name == "fsync" else getattr(os, name)

    return mock.patch.object(commit, "os", Os())


def fsync_of_the_folder() -> Skip:
    """No folder is flushed."""
    return mock.patch.object(files, "fsync_folder", return_value=None)


def withdrawal() -> Skip:
    """A shard is replaced while its record stands."""
    return mock.patch.object(commit, "withdraw", return_value=None)


def link() -> Skip:
    """A shard file is placed by a plain rename, which replaces what is there."""

    def place(staged: Path, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(file)

    return mock.patch.object(files, "place", place)


def errors_of_place() -> Skip:
    """A shard file that could not be placed is passed over."""
    place = OpenShard._place

    def placed(self: OpenShard, staged: Staged) -> None:
        with contextlib.suppress(PermissionError):
            place(self, staged)

    return mock.patch.object(OpenShard, "_place", placed)


def exclusive_record() -> Skip:
    """A record gets its name by a plain rename, which replaces what is there."""

    def publish(self: Record, folder: Path) -> None:
        with mock.patch.object(files, "publish", files.replace):
            original(self, folder)

    original = Record.publish
    return mock.patch.object(Record, "publish", publish)


@contextlib.contextmanager
def record_last() -> Iterator[None]:
    """The record is published first; then the old files go and the new ones are placed."""
    commit_shard, remove, place, publish = OpenShard.commit, ShardWriter.remove_files, OpenShard._place, Record.publish
    waiting: list | None = None

    def committing(self: OpenShard, **options) -> Record:
        nonlocal waiting
        waiting = []
        try:
            return commit_shard(self, **options)
        finally:
            waiting = None

    def removing(self: ShardWriter, shard: int) -> None:
        remove(self, shard) if waiting is None else waiting.append(lambda: remove(self, shard))

    def placing(self: OpenShard, staged: Staged) -> None:
        waiting.append(lambda: place(self, staged))

    def publishing(self: Record, folder: Path) -> None:
        publish(self, folder)
        for act in waiting or []:
            act()

    with (
        mock.patch.object(OpenShard, "commit", committing),
        mock.patch.object(ShardWriter, "remove_files", removing),
        mock.patch.object(OpenShard, "_place", placing),
        mock.patch.object(Record, "publish", publishing),
    ):
        yield


def checksum_of_the_record() -> Skip:
    """A record is believed if it is JSON of the right fields."""

    def unchecked(raw: bytes) -> bytes:
        content = json.loads(raw)
        content.pop("checksum", None)
        return canonical_json(content)

    return mock.patch.object(records, "_checked", unchecked)


def sizes() -> Skip:
    """A record counts whatever its files are."""
    return mock.patch.object(records, "check_counts")


def index_compared() -> Skip:
    """A line of the index is believed whatever has become of its record."""
    return mock.patch.object(ledger, "_mark", return_value="")


def index_checksum() -> Skip:
    """The index is believed if it can be parsed."""
    read = files.read

    def fitting(file: Path) -> bytes:
        raw = read(file)
        return hashlib.sha256(raw[32:]).digest() + raw[32:] if file.name == "index" else raw

    return mock.patch.object(files, "read", fitting)
