"""After a fault: what is read, whether the status is true, and whether the same command finishes the store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import zarr

from olavlm.cache import CacheError, CorruptFeatures, FeatureStore, MissingFeatures

from .scene import KEY, Scene, extract, image_number, open_group


@dataclass
class Outcome:
    """What a fault cost. All zero but for `bytes_equal`: nothing."""

    wrong_values: int = 0
    """Rows that were read as something else than what was written, and records read that nobody wrote."""
    untrue_status: int = 0
    """Rows of which `coverage()` says other than what reading them shows."""
    undone_commits: int = 0
    """Shards committed before the fault that cannot be read after it, other than those that were being replaced."""
    lost_shards: int = 0
    """Shards that are missing or differ after the same command ran again."""
    zeros_by_zarr: int = 0
    """After kills: rows that plain zarr-python reads as numbers that nobody wrote, where there must be NaN."""
    bytes_equal: int = 1
    """1 if plan, metadata and shard files are then those of an uninterrupted run, byte for byte."""
    note: str = ""

    @property
    def lost(self) -> bool:
        """Whether it cost anything."""
        return any(getattr(self, name) for name in self.counts()[:-1]) or not self.bytes_equal

    @classmethod
    def counts(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name != "note"]


@dataclass
class Sight:
    """What a fresh reader finds, image by image: "valid", "quarantined" or "missing"."""

    states: dict[int, str]
    shards: dict[int, list[int]]
    wrong: int
    untrue: int


def look(scene: Scene, path: Path, values: np.ndarray | None = None) -> Sight:
    """Open the store anew and read every row of it, one by one and in a batch."""
    values = scene.values if values is None else values
    try:
        group = open_group(path)
    except CacheError:
        group = None
    if group is None:
        return Sight({}, {}, 0, 0)
    states, shards, wrong, sound = {}, {}, 0, []
    rows = group.plan.rows.tolist()
    for row in rows:
        image = image_number(group.plan.image_of(row))
        shards.setdefault(group.layout.shard_of(row), []).append(image)
        try:
            read, valid = group.read([row])
        except (MissingFeatures, CorruptFeatures):
            states[image] = "missing"
            continue
        states[image] = "valid" if valid[0] else "quarantined"
        if valid[0]:
            wrong += not np.array_equal(read[0], values[image])
            sound.append((row, image))
        else:
            wrong += image not in scene.ever_bad or not np.isnan(read).all()
    if sound:
        read, valid = open_group(path).read([row for row, _ in sound[::-1]])
        wrong += not (valid.all() and np.array_equal(read, values[[image for _, image in sound[::-1]]]))
    try:
        untrue = _untrue(path, states)
    except Exception:  # whatever an unchecked index makes of its reader
        untrue = len(states)
    return Sight(states, shards, int(wrong), untrue)


def rows_wrong_by_zarr(scene: Scene, path: Path) -> int:
    """Rows that plain zarr-python reads without an error as numbers that nobody wrote; what is missing reads as NaN."""
    group = open_group(path)
    if group is None:
        return 0
    arrays = {name: zarr.open_array(path / KEY / name, mode="r") for name in group.layout.arrays}
    room, wrong = min(array.shape[0] for array in arrays.values()), 0  # one array is grown before the other
    for segment in group.plan.segments:
        for start in range(segment.start, min(segment.stop, room), scene.shard_rows):
            stop = min(start + scene.shard_rows, segment.stop)
            images = [image_number(group.plan.image_of(row)) for row in range(start, stop)]
            with contextlib.suppress(ValueError):  # a checksum that does not match
                values = group.layout.codec.decode({name: array[start:stop] for name, array in arrays.items()})
                wrong += int((np.isfinite(values) & (values != scene.values[images])).any(axis=(1, 2)).sum())
    return wrong


def _untrue(path: Path, states: dict[int, str]) -> int:
    """Rows of which the status of a fresh reader says something else."""
    group = FeatureStore(path)[KEY]
    said = dict.fromkeys(states, "valid")
    said |= {image_number(group.plan.image_of(row)): "missing" for row in group.missing_rows().tolist()}
    said |= {image_number(error.image): "quarantined" for _, error in group.failures()}
    coverage, count = group.coverage(), list(said.values()).count
    counted = (coverage.valid, coverage.quarantined, coverage.missing) == (
        count("valid"), count("quarantined"), count("missing"),
    )  # fmt: skip
    return sum(said[image] != state for image, state in states.items()) or int(not counted)


def unreadable(sight: Sight, shards: Iterable[int]) -> list[int]:
    """Of `shards` those of which some row cannot be read."""
    return [s for s in shards if any(sight.states[i] == "missing" for i in sight.shards.get(s, [])) or
            s not in sight.shards]  # fmt: skip


def judge(
    scene: Scene,
    path: Path,
    standing: Iterable[int],
    *,
    values: np.ndarray | None = None,
    others: frozenset[int] = frozenset(),
) -> Outcome:
    """Look, run the same command again, look again, and compare with the uninterrupted run.

    `standing` are the shards that must be readable before that. `values` are what readers must get, if not the
    scene's, and `others` the shards that a writer of other values rightly committed, whose bytes are not compared.
    """
    sight = look(scene, path, values)
    outcome = Outcome(sight.wrong, sight.untrue, len(unreadable(sight, standing)))
    try:
        extract(scene, path)
    except (CacheError, OSError, ValueError) as e:
        outcome.note = f"{type(e).__name__}: {e}"
    sight = look(scene, path)
    # A shard that another rightly committed is done again only if the request asks for that.
    outcome.wrong_values += sight.wrong if values is None else min(sight.wrong, look(scene, path, values).wrong)
    outcome.untrue_status += sight.untrue
    outcome.lost_shards = len(_differing(scene, path, sight, others))
    outcome.bytes_equal = int(_bytes(path, others) == _bytes(scene.final, others))
    return outcome


def _differing(scene: Scene, path: Path, sight: Sight, others: frozenset[int]) -> list[int]:
    wanted = open_group(scene.final)
    try:
        found = open_group(path)
    except CacheError:
        found = None
    differing = []
    for shard in wanted.ledger().table["shard"].to_pylist():
        if shard in others:
            continue
        try:
            there = None if found is None else found.record(shard)
        except CorruptFeatures:
            there = None
        images = [image_number(wanted.plan.image_of(r)) for r in range(*wanted.record(shard).rows)]
        states = {i: "quarantined" if i in scene.request.bad else "valid" for i in images}
        same = there is not None and _comparable(there) == _comparable(wanted.record(shard))
        if not same or any(sight.states.get(i) != state for i, state in states.items()):
            differing.append(shard)
    return differing


def _comparable(record) -> dict:
    return {k: v for k, v in record.comparable().items() if k != "revision"}


def _bytes(path: Path, others: frozenset[int]) -> dict[str, bytes]:
    """Plan, metadata and shard files, by path."""
    files = (*path.glob("plan/*.parquet"), *path.rglob("zarr.json"), *(path / KEY).glob("*/c/**/*"))
    skipped = {str(shard) for shard in others}
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in files
        if f.is_file() and not ("c" in f.parts and f.parts[f.parts.index("c", len(path.parts)) + 1] in skipped)
    }
