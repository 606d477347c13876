"""Every fault, and for each the control arm: the same or a harder fault with exactly one protection left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import skips
from .disks import file_size_limit, full_disk, lying_disk, read_only
from .kills import Fault, killed_at, killed_at_random_instants, killed_between_halves
from .leftovers import (
    damaged_index,
    damaged_lease,
    half_written_record,
    record_without_shard,
    shard_without_record,
    stale_index,
)
from .power import power_cut
from .scene import KEY
from .writers import at_once, stuck


@dataclass(frozen=True)
class Control:
    """`without` leaves the protection out; `fault` is made with that."""

    without: Callable[[], skips.Skip]
    fault: Fault
    how: str
    """The fault, where it is not that of the row."""


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    how: str
    fault: Fault
    control: Control
    real_fsync: bool = False
    """Whether the disk is waited for; elsewhere `os.fsync` does nothing, or only keeps the model's journal."""
    weight: int = 1
    """Times this many trials."""
    undone_allowed: str = ""
    """Why finished shards may have to be done again after this one, if they may."""


def _killed(step: str, what: str, control: Control, **options) -> Entry:
    return Entry(f"killed at `{step}`", what, killed_at(step), control, **options)


_BETWEEN = ("place", "record")
_BEGINS_IN_BETWEEN = stuck(steps=("record",), others_steps=("stage", "compare", "fsync"))
_BEGINS = "another begins while one is at `record`"
_WAKES_IN_BETWEEN = stuck(steps=("record",), others_steps=("record",))

_BETWEEN_TWO_LOOKS = (
    "no file system changes a name on condition that a lease is held, so that a writer taken for dead can, between two "
    "looks at its lease, undo the shard that another has just done; the same command does it again"
)

CATALOGUE = [
    _killed(
        "make",
        "while store, plan, metadata and folders are made or grown",
        Control(skips.private_name, killed_between_halves, "between the halves of a file"),
    ),
    _killed(
        "lease",
        "before and while the lease is created",
        Control(skips.lease_taken, _BEGINS_IN_BETWEEN, _BEGINS),
    ),
    _killed(
        "recover",
        "before a dead writer's left-overs are swept up",
        Control(skips.recover, killed_at(*_BETWEEN), "killed at `place` or `record`"),
    ),
    _killed(
        "stage",
        "before and after every row is staged",
        Control(skips.staging, killed_at("stage", flavours=("retry",)), "while a shard is replaced"),
    ),
    _killed(
        "compare",
        "while the staged files are read back",
        Control(skips.compare, lying_disk, "the disk flips a bit"),
    ),
    _killed(
        "fsync",
        "while the staged files are flushed",
        Control(skips.fsync_of_the_file, power_cut("record", "release", "done", "index"), "a power cut later on"),
    ),
    _killed(
        "withdraw",
        "before the replaced record goes, and before each old file does",
        Control(skips.withdrawal, killed_at("record", flavours=("retry",), shards=[1]), "killed at `record`"),
    ),
    _killed(
        "place",
        "before, between and after the files of the arrays, and at each new folder",
        Control(
            skips.link,
            stuck(steps=("place",), stale_listing=True),
            "stuck at `place`, and the other writer's listing of the staged files lags",
        ),
    ),
    _killed(
        "record",
        "before the record is written, between its private and its public name, and after",
        Control(skips.record_last, killed_at("record", flavours=("retry",), shards=[1]), "while a shard is replaced"),
    ),
    _killed(
        "release",
        "while the staged names and the lease go",
        Control(skips.takeover, killed_at("stage", "record"), "killed at `stage` or `record`"),
    ),
    _killed(
        "index",
        "while the index of the records is written",
        Control(skips.index_compared, stale_index, "a record changes after the index was written"),
    ),
    Entry(
        "killed at any instant",
        "SIGKILL from outside after a random part of the job's time, up to 4 times in a row",
        killed_at_random_instants,
        Control(skips.takeover, killed_at_random_instants, ""),
        real_fsync=True,
    ),
    Entry(
        "power cut",
        "a model, below: what was not flushed may be gone, at any change of the file system",
        power_cut(),
        Control(skips.fsync_of_the_folder, power_cut(), ""),
    ),
    Entry(
        "2 to 4 extractors at once",
        "on one store, each pausing up to 10 ms at every step; every second time one is killed",
        at_once,
        Control(skips.lease_taken, _BEGINS_IN_BETWEEN, _BEGINS),
    ),
    Entry(
        "a stuck writer",
        "stopped (SIGSTOP) at a random step and taken for dead; wakes when another is done, or at a random step",
        stuck(),
        Control(skips.lease_looked_at_again, _WAKES_IN_BETWEEN, "both at `record`"),
        weight=3,
    ),
    Entry(
        "a stuck writer, between a look and what follows it",
        "the same, stopped before any change of the file system",
        stuck(in_steps_alone=False),
        Control(skips.lease_looked_at_again, _WAKES_IN_BETWEEN, "both at `record`"),
        undone_allowed=_BETWEEN_TWO_LOOKS,
    ),
    Entry(
        "a stuck writer with its record in hand",
        "stopped just before its record gets its name",
        stuck(at_its_record=True),
        Control(skips.exclusive_record, stuck(at_its_record=True), ""),
    ),
    Entry(
        "a stuck writer, stale listings",
        "stopped at `place`; the other does not see its staged files and leaves them",
        stuck(steps=("place",), stale_listing=True),
        Control(skips.link, stuck(steps=("place",), stale_listing=True), ""),
    ),
    Entry(
        "a disk that lies",
        "one bit of a staged file reads back as another",
        lying_disk,
        Control(skips.compare, lying_disk, ""),
    ),
    Entry(
        "full disk",
        "a file system of 512 KB, full but for a random rest of up to 44 KB",
        full_disk(),
        Control(skips.private_name, full_disk(flavours=("fresh", "grow")), "while a store is made or grown"),
    ),
    Entry(
        "file size limit",
        "RLIMIT_FSIZE, random",
        file_size_limit(),
        Control(skips.staging, file_size_limit(flavours=("retry",)), "while a shard is replaced"),
    ),
    Entry(
        "read-only folder",
        "the store or one of its folders, to another user than root",
        read_only(),
        Control(skips.errors_of_place, read_only(f"{KEY}/features", flavours=("resume",)), "`features`"),
    ),
    Entry(
        "half-written record",
        "ends at a random byte, or goes on in zeros, or has 48 bytes of another",
        half_written_record,
        Control(skips.checksum_of_the_record, half_written_record, ""),
    ),
    Entry(
        "a shard whose record is gone",
        "the records of a shard removed",
        shard_without_record,
        Control(skips.recover, shard_without_record, ""),
    ),
    Entry(
        "a record whose shard is gone",
        "a shard file removed, cut short or longer",
        record_without_shard,
        Control(skips.sizes, record_without_shard, ""),
    ),
    Entry(
        "damaged lease",
        "of a killed writer: a bit flipped, cut short, or random bytes",
        damaged_lease,
        Control(skips.damaged_lease_is_free, damaged_lease, ""),
    ),
    Entry(
        "damaged or old index",
        "a bit flipped, cut short, or of before the job",
        damaged_index,
        Control(skips.index_checksum, damaged_index, ""),
    ),
    Entry(
        "a record damaged after the index was written",
        "a bit flipped",
        stale_index,
        Control(skips.index_compared, stale_index, ""),
    ),
]
