"""Making a store: its plan, its teacher groups, and the list of shards still to do.

Nothing here writes features; `commit.ShardWriter` does. Everything comes to be by `files.publish`, so that two builders
at once end with one store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from . import files
from .commit import ShardWriter
from .errors import CorruptFeatures, PlanError, StoreError
from .features import TeacherFeatures, card_checksum
from .lease import is_live, leased
from .ledger import write_index
from .plan import Plan, segment_name
from .records import canonical_json, withdrawn_shards
from .replacement import vouched_rows
from .shard import Layout, read_metadata, same_array
from .store import FORMAT, RESERVED, FeatureStore

DEFAULT_SHARD_ROWS = 128
DEFAULT_SHARD_ROWS_ONE_TOKEN = 4096  # a shard of rows of 2 KB would be a small file
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*")
_OF_A_GROUP = ("zarr.json", "commits", "leases", "staging", "index")
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

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = files.location(path)
        if files.is_local(self.path) and self.path.exists() and not self.path.is_dir():
            raise StoreError(f"store {path} is a file; give a folder")
        if not files.is_local(self.path):
            files.probe(self.path)
        if files.exists(self.path / "zarr.json"):
            FeatureStore(self.path)  # is it one?
            return
        # The plan folder and private names are what a builder killed right here leaves behind.
        foreign = [name for name in files.names(self.path) if name not in ("plan", "zarr.json") and name[0] != "."]
        if foreign and not files.exists(self.path / "zarr.json"):  # else another builder has made it by now
            raise StoreError(
                f"store {path} is a folder with other content ({foreign[0]}, ...); give an empty or new one"
            )
        with contextlib.suppress(FileExistsError):  # another builder was first
            files.publish(self.path / "zarr.json", _group_metadata({"olavlm": {"format": FORMAT}}))

    def plan(self) -> Plan:
        return Plan.load(self.path / "plan")

    def extend_plan(self, images: pa.LargeStringArray, *, replace: bool = False) -> tuple[Plan, int]:
        """Make the plan cover `images` (distinct paths); returns it and the number of images added.

        A plan of another dataset is a `PlanError`, or with `replace` dropped together with all features.
        """
        while True:
            plan = self.plan()
            groups, damage = self._groups(plan)
            try:
                segment = plan.growth(images, [t.layout.shard_rows for t in groups])
            except PlanError:
                if not replace:
                    raise
                for key in FeatureStore(self.path).teachers:
                    self.drop(key)
                self._drop_plan()
                continue
            if segment is not None:
                if damage is not None:
                    raise damage  # where the new rows may begin depends on every teacher
                try:
                    segment.write(self.path / "plan" / segment_name(len(plan.segments)))
                except FileExistsError:
                    continue  # another builder was first: see what it added
            self.grow()
            return self.plan(), len(segment.images) if segment else 0

    def _groups(self, plan: Plan) -> tuple[list[TeacherFeatures], StoreError | None]:
        """The teachers that can be opened, and what is wrong with the last one that cannot."""
        groups, damage = [], None
        for key in FeatureStore(self.path).teachers:
            try:
                groups.append(TeacherFeatures(self.path, key, plan))
            except StoreError as e:
                damage = e
        return groups, damage

    def adopt_plan(self, plan: Plan) -> None:
        """Give a store whose plan is the beginning of this one the segments that it lacks; else do nothing.

        Another builder may be first with any of them. StoreError for a teacher, or one that is damaged, into whose
        shards they would not fit.
        """
        hashes, there = [s.hash for s in plan.segments], [s.hash for s in self.plan().segments]
        if hashes[: len(there)] == there:
            if len(hashes) > len(there):
                groups, damage = self._groups(self.plan())
                if damage is not None:
                    raise damage
                for group in groups:
                    rows = group.layout.shard_rows
                    if off := [s.start for s in plan.segments if s.start % rows]:
                        raise StoreError(
                            f"{group.folder} has shards of {rows} rows, and images were added to the other plan at row "
                            f"{off[0]}, within one; use a new store"
                        )
            for number, segment in enumerate(plan.segments[len(there) :], len(there)):
                with contextlib.suppress(FileExistsError):
                    segment.write(self.path / "plan" / segment_name(number))
            self.grow()

    def grow(self) -> None:
        """Give every teacher's arrays room for the plan, which a builder that died after extending it did not."""
        self._grow(self._groups(self.plan())[0])

    def _drop_plan(self) -> None:
        if files.is_local(self.path):
            files.remove_tree(self.path / "plan")  # at once: half a plan would be a damaged one
            return
        for name in reversed(files.names(self.path / "plan")):  # what is left is a plan at every moment
            files.remove(self.path / "plan" / name)

    def _grow(self, groups: list[TeacherFeatures]) -> None:
        """Give the arrays room for the plan's rows, by replacing their metadata, each at once."""
        plan = None
        while plan is None or plan.extent < self.plan().extent:  # another builder's growth may have been undone
            plan = self.plan()
            for group in groups:
                for name in reversed(group.layout.arrays):
                    metadata = read_metadata(group.folder / name)
                    if metadata["shape"][0] < group.layout.padded(plan.extent):
                        grown = _json(group.layout.metadata(name, plan.extent))
                        files.replace(group.folder / name / "zarr.json", grown)

    def ensure_teacher(
        self,
        key: str,
        card: dict,
        *,
        dtype: str,
        shard_rows: int | None = None,
        compress: str = "none",
        replace: bool = False,
    ) -> TeacherFeatures:
        """The group `key` for features of `card`, created if absent.

        A group with another card, dtype, compression or (if one is asked for) shard size is a `StoreError` that shows
        the difference, or with `replace` dropped and made anew.
        """
        plan = self.plan()
        check_key(key)
        rows = shard_rows or (DEFAULT_SHARD_ROWS_ONE_TOKEN if card["tokens"] == 1 else DEFAULT_SHARD_ROWS)
        layout = Layout(rows, card["tokens"], card["dim"], dtype, compress)
        wanted = {"dtype": dtype, "compression": compress, **({"shard rows": shard_rows} if shard_rows else {})}
        if files.exists(self.path / key / "features" / "zarr.json"):
            group = TeacherFeatures(self.path, key, plan)
            difference = self._difference(group, card, wanted)
            if not difference:
                self._grow([group])
                return group
            if not replace:
                raise StoreError(
                    f"{self.path / key} holds other features: {difference}; take another store or key, or remove these "
                    f"first (olavlm-cache drop {self.path} {key}; olavlm-extract: --as KEY, --replace)"
                )
            self.drop(key)
        elif replace and self._is_left_over(key):
            self.drop(key)
        _check_alignment(rows, plan)
        self._create_group(key, card, layout, plan)
        try:
            _check_alignment(
                rows, self.plan()
            )  # it may have grown meanwhile, by segments that did not know of this one
        except StoreError:
            self.drop(key)
            raise
        group = TeacherFeatures(self.path, key, plan)
        if difference := self._difference(group, card, wanted):
            raise StoreError(f"{self.path / key} was made meanwhile for other features: {difference}")
        self._grow([group])  # the plan may have grown meanwhile
        return group

    @staticmethod
    def _difference(group: TeacherFeatures, card: dict, wanted: dict[str, object]) -> str:
        parts = []
        if group.fingerprint != card["fingerprint"]:
            fields = [
                f for f in sorted({*group.card, *card}) if f not in _NOT_COMPARED and group.card.get(f) != card.get(f)
            ]
            parts += [
                f"{f} is {json.dumps(group.card.get(f))} there and {json.dumps(card.get(f))} here" for f in fields
            ]
        layout = group.layout
        there = {"dtype": layout.dtype, "compression": layout.compress, "shard rows": layout.shard_rows}
        for what, here in wanted.items():
            if there[what] != here:
                parts.append(f"{what} {'are' if what.endswith('s') else 'is'} {there[what]} there and {here} here")
        return "; ".join(parts)

    def _create_group(self, key: str, card: dict, layout: Layout, plan: Plan) -> None:
        """The group exists when `features/zarr.json`, the last, does. Another builder may be first with any of it."""
        there = {name for name in files.names(self.path / key) if name[0] != "."}  # private names are of builders
        foreign = there - {*layout.arrays, *_OF_A_GROUP}
        if foreign or (files.is_local(self.path) and (self.path / key).is_file()):
            raise StoreError(
                f"{self.path / key} is no teacher's folder ({', '.join(foreign) or 'a file'}); use --as KEY"
            )
        card = json.loads(canonical_json(card))
        group = {"zarr.json": _group_metadata({"card": card, "card_sha256": card_checksum(card)})}
        arrays = {f"{name}/zarr.json": _json(layout.metadata(name, plan.extent)) for name in reversed(layout.arrays)}
        for name, content in (group | arrays).items():
            try:
                files.publish(self.path / key / name, content)
            except FileExistsError:
                if not files.exists(self.path / key / "features" / "zarr.json"):
                    self._resume_creation(key, name, content)
        if files.is_local(self.path):
            for name in ("commits", "leases", "staging"):
                files.make_folder(self.path / key / name)

    def _resume_creation(self, key: str, name: str, content: bytes) -> None:
        """A builder died, or is at work, between two files of the group; what it wrote must be what we would."""
        there, here = read_metadata((self.path / key / name).parent), json.loads(content)
        if here["node_type"] == "group":
            same = there["attributes"].get("card", {}).get("fingerprint") == here["attributes"]["card"]["fingerprint"]
        else:
            same = same_array(there, here)
        if not same:
            raise StoreError(
                f"{self.path / key} was begun for other features and not finished; "
                f"remove it with: olavlm-cache drop {self.path} {key}"
            )

    def drop(self, key: str) -> None:
        """Remove a teacher's features; StoreError if there are none, or while a live writer is at work on them."""
        folder = self.path / key
        if not _is_key(key) or not (files.exists(folder / "zarr.json") or self._is_left_over(key)):
            keys = FeatureStore(self.path).teachers
            raise StoreError(f"{self.path} has no features '{key}' to drop; it has {', '.join(keys) or 'none'}")
        busy = [shard for shard, lease in leased(folder / "leases").items() if is_live(lease, files.clock)]
        if busy:
            raise StoreError(f"{folder} is being written (shard {busy[0]}); stop that extraction first")
        # Where not all vanishes at once: first the records, that no shard comes back to life in a group made anew.
        order = ["/commits/", "/features/zarr.json"]
        files.remove_tree(folder, lambda name: [part not in name for part in order])

    def _is_left_over(self, key: str) -> bool:
        """Whether a folder without `features/zarr.json` is what a killed builder left of a teacher."""
        there = {name for name in files.names(self.path / key) if name[0] != "."}
        return bool(there) and there <= {"features", "scales", *_OF_A_GROUP}

    def writer(self, group: TeacherFeatures, on_step: Callable[[str], None] | None = None) -> ShardWriter:
        return ShardWriter(group.folder, group.layout, group.fingerprint, on_step)

    def index(self) -> None:
        """Bring every teacher's index of its records up to date; a job that has changed the store ends with it."""
        for group in self._groups(self.plan())[0]:
            write_index(group.folder, group.fingerprint, group.ledger())


def check_key(key: str) -> None:
    """StoreError for a name that a teacher's features cannot have in a store."""
    if not _is_key(key):
        raise StoreError(
            f"store key {key!r} is not usable: letters, digits and ._+=@- are, and not {', '.join(RESERVED)}"
        )


def _is_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None and key not in RESERVED


def _check_alignment(shard_rows: int, plan: Plan) -> None:
    for segment in plan.segments:
        if segment.start % shard_rows:
            raise StoreError(
                f"--shard-rows {shard_rows} does not divide the start of plan segment at row {segment.start}; "
                f"use a divisor of {segment.start}"
            )


def _json(metadata: dict) -> bytes:
    return json.dumps(metadata, indent=2).encode()


def _group_metadata(attributes: dict) -> bytes:
    return _json({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def pending(group: TeacherFeatures, limit: int | None = None, *, retry_failed: bool = False) -> list[ShardTask]:
    """The shards of `group` that the plan's first `limit` images (all by default) still need.

    A shard committed for fewer rows than are wanted now is done again, and with `retry_failed` also one in which a
    wanted row is quarantined.
    """
    rows = group.plan.rows[:limit]
    failed = {row for row, _ in group.failures()} if retry_failed else set()
    todo = set(group.missing_rows(rows).tolist()) | failed.intersection(rows.tolist())
    tasks, withdrawn = [], withdrawn_shards(files.names(group.folder / "commits"))
    for shard in sorted({group.layout.shard_of(row) for row in todo}):
        first = shard * group.layout.shard_rows
        wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + group.layout.shard_rows)]
        stop = int(wanted[-1]) + 1
        segment = group.plan.segment_of(first).hash
        try:
            record = group.record(shard)
        except CorruptFeatures:
            record = None  # to a writer a damaged shard does not exist
            withdrawn.add(shard)
        there = [record] if record is not None else []
        if shard in withdrawn:  # its rows may be carried over
            found = vouched_rows(group.folder, group.layout, group.fingerprint, shard, segment)
            there += [vouched.record for vouched in found]
        stop = max([stop, *(r.rows[1] for r in there)])  # a committed row is never given up
        supersedes = None if record is None else record.revision
        tasks.append(ShardTask(group.key, shard, first, stop, segment, supersedes))
    return tasks
