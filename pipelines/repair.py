"""The shards that are broken, extracted again as the extraction on record did it.

What can be had again is made again, byte for byte; what cannot, because an image is gone, stays as it is stored where
that is sound, and is told where it is not.
"""

from __future__ import annotations

import argparse
import hashlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from olavlm.cache import (
    BadImage,
    CorruptFeatures,
    FeatureStore,
    Finding,
    ImageRoots,
    LeaseHeld,
    ShardTask,
    StoreBuilder,
    TeacherFeatures,
    pending,
)
from olavlm.cache.images import split_root
from olavlm.cache.recorded_roots import recorded_roots
from olavlm.cache.records import Record
from olavlm.cache.wording import counted
from olavlm.teachers.base import resolve_device

from .cli import JobFailed, Stopped
from .extract import BATCH_SIZE, extract
from .extraction.places import Job
from .extraction.preflight import readable
from .extraction.summary import Tally, carried_over_words
from .failed_rows import failed_rows, named
from .reextract import image_roots, load_again, recorded_arguments, spec_of


@dataclass(frozen=True)
class Repaired:
    """What became of broken shards, by teacher."""

    extracted: dict[str, list[int]]
    removed: dict[str, list[int]]
    """Left-overs of shards that the plan does not hold."""
    carried_over: int
    """Rows whose images cannot be had now, and whose stored bytes are sound: they were kept."""
    quarantined: dict[str, list[dict]]
    """Rows that were not quarantined, as far as is on record, and are now: `failed_rows` of each."""

    def lines(self) -> list[str]:
        lines = []
        for what, done in (("extracted again", self.extracted), ("removed, as the plan has none", self.removed)):
            shards = (f"{key} shards {', '.join(map(str, of))}" for key, of in done.items())
            lines += [f"{what}: {', '.join(shards)}"] if done else []
        lines += [carried_over_words(self.carried_over)] if self.carried_over else []
        for key, rows in self.quarantined.items():
            lines += [
                f"{key}: {counted(len(rows), 'row')} could not be extracted again: quarantined",
                *named(key, rows),
            ]
        return lines


def repair_store(store: FeatureStore, findings: list[Finding], args: argparse.Namespace) -> Repaired:
    """Extract the shards with findings again, those rows and no others, and remove those that the plan does not hold.

    A shard stands, broken as it is, until its replacement is ready, so that a repair that was stopped can be run again.
    Raises `JobFailed` for what extracting again does not mend, for a teacher that is not the one of the card, and where
    images are under a root on record that is not here.
    """
    beyond = [f for f in findings if f.shard is None]
    if {f.key for f in beyond} == {f.key for f in findings}:
        raise JobFailed(
            f"{beyond[0]}: this is not mended by extracting again; restore the file from a copy, or olavlm-cache drop "
            f"{args.store} {beyond[0].key} and extract it anew"
        )
    broken: dict[str, set[int]] = {}
    for finding in findings:
        if not any(f.key == finding.key for f in beyond):
            broken.setdefault(finding.key, set()).add(finding.shard)
    builder = StoreBuilder(args.store)
    groups = {key: FeatureStore(args.store)[key] for key in broken}
    tasks = [task for key, shards in broken.items() for task in _tasks(groups[key], shards)]
    failed = {key: failed_rows(group) for key, group in groups.items()}
    tally = _extract(store, groups, tasks, args) if tasks else Tally()
    removed = {key: _sweep(builder, groups[key], shards) for key, shards in broken.items()}
    builder.index()
    lost = {key: [r for row, r in failed_rows(groups[key]).items() if row not in failed[key]] for key in groups}
    return Repaired(
        {key: sorted(t.shard for t in tasks if t.key == key) for key in dict.fromkeys(t.key for t in tasks)},
        {key: shards for key, shards in removed.items() if shards},
        tally.total("carried_over"),
        {key: rows for key, rows in lost.items() if rows},
    )


def _extract(
    store: FeatureStore, groups: dict[str, TeacherFeatures], tasks: list[ShardTask], args: argparse.Namespace
) -> Tally:
    """As the extraction did that is on record."""
    roots, keys = image_roots(store, args.images), list(dict.fromkeys(task.key for task in tasks))
    if not args.images:
        _refuse_without_roots(store, groups, tasks, roots)
        _refuse_other_images(groups, tasks, roots)
    specs, batches = [], set()
    for key in keys:
        load_again(store[key], args)
        specs.append(spec_of(store[key], args))
        batches.add(recorded_arguments(store, key).get("batch_size", BATCH_SIZE))
    if len(batches) > 1:
        raise JobFailed(
            f"the teachers {', '.join(keys)} were extracted in batches of {sorted(batches)}; repair one at a time, "
            "with --teacher"
        )
    batch = batches.pop()
    job = Job(
        store=args.store,
        images=roots.specs,
        specs=specs,
        batch_size=batch,
        device=str(resolve_device(args.device)),
        address=args.address,
        workers=args.workers,
        known_images=readable(roots, store.plan["image"]),
    )
    # With images and batch as an extraction's record has them, for who repairs what this repair made.
    images = args.images or [root.here or root.spec for root in recorded_roots(store)]
    recorded = argparse.Namespace(**{**vars(args), "images": images, "batch_size": batch})
    tally, stopped, _ = extract(StoreBuilder(args.store), job, tasks, recorded)
    if stopped is not None:
        raise Stopped(stopped)
    if tally.broken_off:
        raise JobFailed(tally.broken_off)
    if tally.given_up:
        raise JobFailed(f"{counted(len(tally.given_up), 'shard')} given up: {tally.given_up[0]}")
    return tally


def _refuse_without_roots(
    store: FeatureStore, groups: dict[str, TeacherFeatures], tasks: list[ShardTask], roots: ImageRoots
) -> None:
    """JobFailed if an image of a row that was not quarantined may be under a root on record that is not here."""
    away = [root.spec for root in recorded_roots(store) if root.here is None]
    for task in tasks if away else ():
        group, failed = groups[task.key], set(groups[task.key].ledger().failures.rows.tolist())
        for row in range(task.start, task.stop):
            image = group.plan.image_of(row)
            under = [spec for spec in away if _may_hold(spec, image)]
            if row in failed or not under:
                continue
            try:
                roots.read(image)
            except BadImage as e:
                if e.reason == "missing":
                    raise JobFailed(
                        f"image {image} of {task.key} row {row} cannot be found, and {', '.join(under)}, on record as "
                        "an image root, is not here: mount it, or name all roots with --images"
                    ) from None


def _refuse_other_images(
    groups: dict[str, TeacherFeatures], tasks: list[ShardTask], roots: ImageRoots, tries: int = 16
) -> None:
    """JobFailed if of some images that can be read none has the bytes that were extracted: another data set lies where
    the roots on record were. Those of the shards to be repaired are tried first."""
    shards = [(task.key, task.shard) for task in tasks]
    shards += [(key, shard) for key, group in groups.items() for shard in group.ledger().table["shard"].to_pylist()]
    known: dict[str, str] = {}
    for key, shard in shards:
        if len(known) >= tries:
            break
        if (record := _record(group := groups[key], shard)) is not None:
            for row, sha256 in zip(range(*record.rows), record.images_sha256, strict=True):
                if sha256 is not None:
                    known.setdefault(group.plan.image_of(row), sha256)
    others = []
    for image in _evenly(list(known), tries):
        try:
            same = hashlib.sha256(roots.read(image)).hexdigest() == known[image]
        except BadImage:
            continue
        if same:
            return
        others.append(image)
    if others:
        raise JobFailed(
            f"under {', '.join(roots.specs)} lie other images than those that were extracted: none of {len(others)} is "
            f"the one on record, the first {others[0]}; name all roots with --images, also if these are meant"
        )


def _evenly(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, from the first to the last."""
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]


def _record(group: TeacherFeatures, shard: int) -> Record | None:
    """The one that counts; None if it is damaged."""
    try:
        return group.record(shard)
    except CorruptFeatures:
        return None


def _may_hold(spec: str, image: str) -> bool:
    prefix, _ = split_root(spec)
    return not prefix or image.startswith(f"{prefix}/")


def _sweep(builder: StoreBuilder, group: TeacherFeatures, shards: set[int]) -> list[int]:
    """Remove what there is of those of `shards` that the plan does not hold; them, ascending."""
    removed = []
    for shard in sorted(shards):
        if group.plan.holds(np.array([shard * group.layout.shard_rows])):
            continue
        with suppress(LeaseHeld):  # its writer knows of a plan that has grown
            builder.writer(group).sweep(shard, withdraw_all=True)
            removed.append(shard)
    return removed


def _tasks(group: TeacherFeatures, shards: set[int]) -> list[ShardTask]:
    """Where a shard's record is whole, it says which rows there were; else all that the plan has."""
    tasks, unknown = [], set()
    for shard in sorted(shards):
        record = _record(group, shard)
        if record is None:
            unknown.add(shard)
        else:
            tasks.append(ShardTask(group.key, shard, *record.rows, record.segment, record.revision))
    return tasks + [t for t in pending(group) if t.shard in unknown]
