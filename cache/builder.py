"""Making a store: its plan, its teacher groups, and the list of shards still to do.

Nothing here writes features; `commit.ShardWriter` does. Everything comes to be in one step (`files.publish`, or the
rename of a finished folder), so that two builders at once end with one store.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr

from .commit import ShardWriter, lease_is_live
from .errors import CorruptFeatures, PlanError, StoreError
from .files import publish
from .plan import Plan
from .records import canonical_json
from .shard import Layout
from .store import FeatureStore, TeacherFeatures, read_metadata

DEFAULT_SHARD_ROWS = 128
DEFAULT_SHARD_ROWS_ONE_TOKEN = 4096  # a shard of rows of 2 KB would be a small file
_NOT_COMPARED = ("versions", "fingerprint")  # of cards, when they are shown side by side


@dataclass(frozen=True)
class ShardTask:
    """A shard to extract: plan rows [start, stop) of one segment."""

    key: str
    shard: int
    start: int
    stop: int
    segment: str
    supersedes: int | None = None
    """Revision of the commit that is to be replaced; None if the shard was not committed when the task was made."""

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class StoreBuilder:
    """A store open for writing; creates it if `path` is absent or an empty folder."""

    def __init__(self, path: str | Path) -> None:
        if "://" in str(path):
            raise StoreError(f"store {path} is a URL; stores are written to a local or shared file system")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"store {path} is a file; give a folder")
        if not (self.path / "zarr.json").exists():
            # The plan folder and private names are what a builder killed right here leaves behind.
            foreign = (
                [f.name for f in self.path.iterdir() if f.name not in ("plan", "zarr.json") and f.name[0] != "."]
                if self.path.is_dir()
                else []
            )
            if foreign and not (self.path / "zarr.json").exists():  # else another builder has made it by now
                raise StoreError(
                    f"store {path} is a folder with other content ({foreign[0]}, ...); give an empty or new one"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            private = self.path / f".group.{secrets.token_hex(8)}"
            zarr.open_group(private, mode="w", zarr_format=3, attributes={"olavlm": {"format": 1}})
            with contextlib.suppress(FileExistsError):  # another builder was first
                publish(self.path / "zarr.json", (private / "zarr.json").read_bytes())
            shutil.rmtree(private)
        else:
            FeatureStore(self.path)  # is it one?

    def plan(self) -> Plan:
        return Plan.load(self.path / "plan")

    def extend_plan(self, images: pa.LargeStringArray, *, replace: bool = False) -> tuple[Plan, int]:
        """Make the plan cover `images` (distinct paths); returns it and the number of images added.

        A plan of another dataset is a `PlanError`, or with `replace` dropped together with all features.
        """
        while True:
            plan = self.plan()
            try:
                segment = plan.growth(images, [t.layout.shard_rows for t in self._groups(plan)])
            except PlanError:
                if not replace:
                    raise
                for key in FeatureStore(self.path).teachers:
                    self.drop(key)
                dropped = self.path / f".dropped.plan.{secrets.token_hex(8)}"
                (self.path / "plan").rename(dropped)  # at once: half a plan would be a damaged one
                shutil.rmtree(dropped)
                continue
            if segment is not None:
                try:
                    segment.write(self.path / "plan" / f"{len(plan.segments):05d}.parquet")
                except FileExistsError:
                    continue  # another builder was first: see what it added
                plan = self.plan()
            self._grow(self._groups(plan))
            return plan, len(segment.images) if segment else 0

    def _groups(self, plan: Plan) -> list[TeacherFeatures]:
        return [TeacherFeatures(self.path, key, plan) for key in FeatureStore(self.path).teachers]

    def _grow(self, groups: list[TeacherFeatures]) -> None:
        """Give the arrays room for the plan's rows; zarr replaces their metadata atomically."""
        plan = None
        while plan is None or plan.extent < self.plan().extent:  # another builder's resize may have been undone
            plan = self.plan()
            for group in groups:
                array = zarr.open_array(group.array, mode="r+")
                rows = group.layout.padded(plan.extent)
                if array.shape[0] < rows:
                    array.resize((rows, *array.shape[1:]))

    def ensure_teacher(
        self, key: str, card: dict, *, dtype: str, shard_rows: int | None = None, replace: bool = False
    ) -> TeacherFeatures:
        """The group `key` for features of `card`, created if absent.

        A group with another card, dtype or (if one is asked for) shard size is a `StoreError` that shows the
        difference, or with `replace` dropped and made anew.
        """
        plan = self.plan()
        if not key or key.startswith(".") or "/" in key or key == "plan":
            raise StoreError(f"store key {key!r} is not usable; a key is a folder name other than 'plan'")
        rows = shard_rows or (DEFAULT_SHARD_ROWS_ONE_TOKEN if card["tokens"] == 1 else DEFAULT_SHARD_ROWS)
        layout = Layout(rows, card["tokens"], card["dim"], dtype)
        if (self.path / key / "features" / "zarr.json").is_file():
            group = TeacherFeatures(self.path, key, plan)
            difference = self._difference(group, card, dtype, shard_rows)
            if not difference:
                return group
            if not replace:
                raise StoreError(
                    f"{self.path / key} holds other features: {difference}; use another --store, --as KEY, or --replace"
                )
            self.drop(key)
        for segment in plan.segments:
            if segment.start % rows:
                raise StoreError(
                    f"--shard-rows {rows} does not divide the start of plan segment at row {segment.start}; "
                    f"use a divisor of {segment.start}"
                )
        self._create_group(key, card, layout, plan)
        group = TeacherFeatures(self.path, key, plan)
        if difference := self._difference(group, card, dtype, shard_rows):
            raise StoreError(f"{self.path / key} was made meanwhile for other features: {difference}")
        self._grow([group])  # the plan may have grown meanwhile
        return group

    @staticmethod
    def _difference(group: TeacherFeatures, card: dict, dtype: str, shard_rows: int | None) -> str:
        parts = []
        if group.fingerprint != card["fingerprint"]:
            fields = [
                f for f in sorted({*group.card, *card}) if f not in _NOT_COMPARED and group.card.get(f) != card.get(f)
            ]
            parts += [
                f"{f} is {json.dumps(group.card.get(f))} there and {json.dumps(card.get(f))} here" for f in fields
            ]
        if group.layout.dtype != dtype:
            parts.append(f"dtype is {group.layout.dtype} there and {dtype} here")
        if shard_rows is not None and group.layout.shard_rows != shard_rows:
            parts.append(f"shard rows are {group.layout.shard_rows} there and {shard_rows} here")
        return "; ".join(parts)

    def _create_group(self, key: str, card: dict, layout: Layout, plan: Plan) -> None:
        private = self.path / f".{key}.{secrets.token_hex(8)}"
        group = zarr.open_group(private, mode="w", zarr_format=3, attributes={"card": json.loads(canonical_json(card))})
        layout.create_array(group, "features", plan.extent)
        for name in ("commits", "leases", "staging", "features/c"):
            (private / name).mkdir()
        try:
            private.rename(self.path / key)
        except OSError:  # not empty: another builder was first, or something else is in the way
            shutil.rmtree(private)
            read_metadata(self.path / key / "features")

    def drop(self, key: str) -> None:
        """Remove a teacher's features; StoreError if there are none, or while a live writer is at work on them."""
        folder = self.path / key
        if key not in (keys := FeatureStore(self.path).teachers):
            raise StoreError(f"{self.path} has no features '{key}' to drop; it has {', '.join(keys) or 'none'}")
        busy = [lease for lease in (folder / "leases").glob("[0-9]*") if lease_is_live(lease)]
        if busy:
            raise StoreError(f"{folder} is being written (lease {busy[0].name}); stop that extraction first")
        dropped = self.path / f".dropped.{key}.{secrets.token_hex(8)}"
        folder.rename(dropped)
        shutil.rmtree(dropped)

    def writer(self, group: TeacherFeatures, on_step: Callable[[str], None] | None = None) -> ShardWriter:
        return ShardWriter(group.folder, group.layout, group.fingerprint, on_step)


def pending(group: TeacherFeatures, limit: int | None = None, *, retry_failed: bool = False) -> list[ShardTask]:
    """The shards of `group` that the plan's first `limit` images (all by default) still need.

    A shard committed for fewer rows than are wanted now is done again, and with `retry_failed` also one in which a
    wanted row is quarantined.
    """
    rows = group.plan.rows[:limit]
    failed = {row for row, _ in group.failures()} if retry_failed else set()
    todo = set(group.missing_rows(rows).tolist()) | failed.intersection(rows.tolist())
    tasks = []
    for shard in sorted({group.layout.shard_of(row) for row in todo}):
        first = shard * group.layout.shard_rows
        wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + group.layout.shard_rows)]
        stop = int(wanted[-1]) + 1
        try:
            record = group.record(shard)
        except CorruptFeatures:
            record = None  # to a writer a damaged shard does not exist
        if record is not None:
            stop = max(stop, record.rows[1])  # a committed row is never given up
        supersedes = None if record is None else record.revision
        tasks.append(ShardTask(group.key, shard, first, stop, group.plan.segment_of(first).hash, supersedes))
    return tasks
