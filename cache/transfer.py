"""Committed shards from one store to another: merged as they are, or converted to another storage dtype.

Every row that is copied is checked against its record on the way, and goes through the same commit protocol as an
extracted one, so both jobs can be killed and run again, and several can run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .builder import StoreBuilder
from .codec import CODECS
from .commit import ShardWriter
from .errors import CorruptFeatures, LeaseHeld, LeaseLost, StoreError
from .features import TeacherFeatures
from .plan import Plan
from .records import Record
from .store import FeatureStore


@dataclass
class Transfer:
    """What became of a teacher's shards."""

    key: str
    copied: int = 0
    already_there: int = 0
    held: int = 0
    """by another writer, which is at work on them"""
    damaged: list[str] = field(default_factory=list)
    """What is wrong with shards, or rows, that the target lacks and that could not be copied."""
    quarantined: list[dict] = field(default_factory=list)
    """Rows that are valid in the source and cannot be in the target: row, image, reason and detail of each."""


OnShard = Callable[[str, int], None]
"""Called with key and number of rows for every shard dealt with."""


def copy_shard(
    source: TeacherFeatures,
    record: Record,
    writer: ShardWriter,
    supersedes: Record | None,
    *,
    unite: bool = False,
    on_damage: Callable[[str], None] = lambda said: None,
) -> bool:
    """Commit the source's shard of `record` through `writer`; False if another has committed it meanwhile.

    Rows of the same storage dtype are copied as they are stored, others are decoded and encoded. To `unite` is to let
    a row that is not valid in the source, or damaged there, stay what it is; `on_damage` hears of those that stay
    quarantined for it. Raises `CorruptFeatures` if the source is damaged where nothing stays, or in all that it has
    more, or if what should stay is damaged; `LeaseHeld` and `LeaseLost`; and `StoreError` if the source was replaced
    meanwhile.
    """
    as_stored = source.layout.dtype == writer.layout.dtype
    vouched = writer.vouched_rows(record.shard, record.segment) if unite else []
    stays = vouched[0].record if vouched else None
    rows = record.rows[0], max(record.rows[1], stays.rows[1] if stays else 0)
    if stays is not None and supersedes is not None:
        _refuse_without_gain(source, record, stays)

    def take(row: int) -> dict[str, np.ndarray] | np.ndarray | None:
        """As it is to be appended; None if it is damaged and something stays."""
        try:
            return source.read_stored([row])[0] if as_stored else source[row]
        except CorruptFeatures as e:
            if stays is None or row >= stays.rows[1]:
                raise
            if not _is_valid(stays, row):
                on_damage(str(e))
            return None

    with writer.begin(record.shard, rows, record.segment) as shard:
        standing = shard.standing
        if standing is not None and (supersedes is None or standing.revision != supersedes.revision):
            return False
        for row in range(*rows):
            if (there := take(row) if _is_valid(record, row) else None) is not None:
                sha256 = record.images_sha256[row - rows[0]]
                if as_stored:
                    shard.append_stored({name: part[0] for name, part in there.items()}, image_sha256=sha256)
                else:
                    shard.append(there, image_sha256=sha256)
            elif unite and (found := shard.carry_over(row)) is not None:
                shard.append_stored(found[0], image_sha256=found[1])
            elif stays and _is_valid(stays, row):
                raise CorruptFeatures(f"{writer.group}: row {row} is damaged, and the source has no valid one either")
            else:
                of = stays if stays and row < stays.rows[1] else record
                shard.append(None, image_sha256=of.images_sha256[row - rows[0]], **of.reasons[row - rows[0]])
            shard.lease.renew()
        if source.record(record.shard) != record:
            raise StoreError(f"{source.folder}: shard {record.shard} was replaced while it was copied; run it again")
        shard.commit(timings=record.timings, host=record.host, like=record if as_stored else None)
    return True


def _refuse_without_gain(source: TeacherFeatures, record: Record, stays: Record) -> None:
    """CorruptFeatures if the rows that are valid in the source and not among those that stay are all damaged."""
    damage = None
    for row in range(*record.rows):
        if _is_valid(record, row) and not _is_valid(stays, row):
            try:
                source.read_stored([row])
                return
            except CorruptFeatures as e:
                damage = damage or e
    if damage is not None:
        raise damage


def _is_valid(record: Record, row: int) -> bool:
    return row < record.rows[1] and record.reasons[row - record.rows[0]] is None


def merge(target: str, sources: Sequence[str], on_shard: OnShard = lambda key, rows: None) -> list[Transfer]:
    """Copy into `target` every row that it lacks and one of `sources` has; it is made if it is not there.

    All must have the same plan, or the beginning of one plan, and a teacher the same card and layout, or `StoreError`
    says what differs. Where two have a shard, the target's stands unless the other has valid rows that it
    has not, or more rows: then the shard is written anew, with every row that is valid in either.
    """
    builder, opened = StoreBuilder(target), [FeatureStore(s) for s in sources]
    for source in opened:
        _same_plan(builder, source)
    done = []
    for source in opened:
        for key, group in source.items():
            into = builder.ensure_teacher(
                key,
                group.card,
                dtype=group.layout.dtype,
                shard_rows=group.layout.shard_rows,
                compress=group.layout.compress,
            )
            done.append(_copy_all(group, into, builder, _offers_more, on_shard, unite=True))
    builder.index()
    return done


def convert(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    compress: str = "none",
    keys: Sequence[str] | None = None,
    on_shard: OnShard = lambda key, rows: None,
) -> list[Transfer]:
    """Write the teachers of `source` (or those of `keys`) to the store `target` in another storage dtype.

    `dtype` None keeps each teacher's. The records of the target hold the fidelity to the source's features; a row that
    the dtype cannot hold is quarantined there, which `Transfer.quarantined` tells of, on a second run too. Raises
    `StoreError` for features that are already quantised, which another dtype would only lose more of.
    """
    opened = FeatureStore(source)
    groups = [opened[key] for key in keys or opened.teachers]
    for group in groups:
        if CODECS[group.layout.dtype].has_scales and dtype not in (None, group.layout.dtype):
            raise StoreError(
                f"{group.folder} is stored as {group.layout.dtype}: convert from float16 or float32, or keep the dtype"
            )
    builder = StoreBuilder(target)
    _same_plan(builder, opened)
    done = []
    for group in groups:
        into = builder.ensure_teacher(
            group.key,
            group.card,
            dtype=dtype or group.layout.dtype,
            shard_rows=group.layout.shard_rows,
            compress=compress,
        )
        done.append(_copy_all(group, into, builder, _has_changed, on_shard))
        rejected = set(group.ledger().failures.rows.tolist())
        done[-1].quarantined = [
            {"row": row, "image": e.image, "reason": e.reason, "detail": e.detail}
            for row, e in into.failures()
            if row not in rejected
        ]
    builder.index()
    return done


def _same_plan(builder: StoreBuilder, source: FeatureStore) -> None:
    """Give a new store, or one that has the beginning of it, the source's plan; StoreError if neither plan is the
    beginning of the other, or the target's teachers cannot take it."""
    builder.adopt_plan(source.rows)
    plan = builder.plan()
    if [s.hash for s in plan.segments[: len(source.rows.segments)]] != [s.hash for s in source.rows.segments]:
        raise StoreError(
            f"{source.path} has another plan than {builder.path}: {_plan_words(source.rows)} there, "
            f"{_plan_words(plan)} here; extract both from the same --data, in the same order"
        )


def _plan_words(plan: Plan) -> str:
    return f"{plan.hash[:12]} of {plan.num_images} images in {len(plan.segments)} segments"


def _copy_all(
    source: TeacherFeatures,
    target: TeacherFeatures,
    builder: StoreBuilder,
    better: Callable[[Record, Record], bool],
    on_shard: OnShard,
    unite: bool = False,
) -> Transfer:
    done, writer = Transfer(source.key), builder.writer(target)
    ledger = source.ledger()
    for shard, damage in ledger.damaged.items():
        wanted = target.plan.rows[target.layout.shard_of(target.plan.rows) == shard]
        if target.coverage(wanted).valid < len(wanted):
            done.damaged.append(damage)
    for shard in ledger.table["shard"].to_pylist():
        try:
            here, there = source.record(shard), writer.valid_record(shard)
            if here is None:
                continue
            if there is not None and not better(there, here):
                done.already_there += 1
            elif copy_shard(source, here, writer, there, unite=unite, on_damage=done.damaged.append):
                done.copied += 1
            else:
                done.already_there += 1
        except (LeaseHeld, LeaseLost):
            done.held += 1
        except CorruptFeatures as e:
            done.damaged.append(str(e))
            continue
        on_shard(source.key, here.rows[1] - here.rows[0])
    return done


def _offers_more(there: Record, here: Record) -> bool:
    """Whether `here` covers rows that `there` does not, or has valid ones that are not valid there."""
    return here.rows[1] > there.rows[1] or any(
        _is_valid(here, row) and not _is_valid(there, row) for row in range(*here.rows)
    )


def _has_changed(there: Record, here: Record) -> bool:
    """Whether the source has come further since it was converted. What overflows in the target always will."""
    if here.rows[1] > there.rows[1] or here.images_sha256 != there.images_sha256:
        return True
    pairs = zip(there.reasons, here.reasons, strict=True)
    return any((a is None) != (b is None) and not (b is None and a["reason"] == "overflow") for a, b in pairs)
