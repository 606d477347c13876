"""Committed shards from one store to another: merged as they are, or converted to another storage dtype.

Every row that is copied is checked against its record on the way, and goes through the same commit protocol as an
extracted one, so both jobs can be killed and run again, and several can run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    """What is wrong with the source's shards that could not be copied."""


OnShard = Callable[[str, int], None]
"""Called with key and number of rows for every shard dealt with."""


def copy_shard(source: TeacherFeatures, record: Record, writer: ShardWriter, supersedes: Record | None) -> bool:
    """Commit the source's shard of `record` through `writer`; False if another has committed it meanwhile.

    Rows of the same storage dtype are copied as they are stored, others are decoded and encoded. Raises
    `CorruptFeatures` if the source is damaged, `LeaseHeld` and `LeaseLost`, and `StoreError` if it was replaced
    meanwhile.
    """
    as_stored = source.layout.dtype == writer.layout.dtype
    with writer.begin(record.shard, record.rows, record.segment) as shard:
        standing = writer.valid_record(record.shard)
        if standing is not None and (supersedes is None or standing.revision != supersedes.revision):
            return False
        for row, reason, sha256 in zip(range(*record.rows), record.reasons, record.images_sha256, strict=True):
            if reason is not None:
                shard.append(None, image_sha256=sha256, **reason)
            elif as_stored:
                parts, _ = source.read_stored([row])
                shard.append_stored({name: part[0] for name, part in parts.items()}, image_sha256=sha256)
            else:
                shard.append(source[row], image_sha256=sha256)
            shard.lease.renew()
        if source.record(record.shard) != record:
            raise StoreError(f"{source.folder}: shard {record.shard} was replaced while it was copied; run it again")
        shard.commit(timings=record.timings, host=record.host, like=record if as_stored else None)
    return True


def merge(target: str, sources: Sequence[str], on_shard: OnShard = lambda key, rows: None) -> list[Transfer]:
    """Copy into `target` every shard that it lacks and one of `sources` has; it is made if it is not there.

    All must have the same plan, or the target's is the beginning of it, and a teacher the same card and layout, or
    `StoreError` says what differs. Where two have a shard, the target's stands unless the other covers its rows and
    has more valid ones.
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
            done.append(_copy_all(group, into, builder, _is_better, on_shard))
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

    `dtype` None keeps each teacher's. The records of the target hold the fidelity to the source's features. Raises
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
        done.append(_copy_all(group, into, builder, lambda there, here: _covers_more(here, there), on_shard))
    builder.index()
    return done


def _same_plan(builder: StoreBuilder, source: FeatureStore) -> None:
    """Give a new store, or one that has the beginning of it, the source's plan; StoreError if it has another."""
    builder.adopt_plan(source.rows)
    plan = builder.plan()
    if plan.hash != source.rows.hash:
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
) -> Transfer:
    done, writer = Transfer(source.key), builder.writer(target)
    ledger = source.ledger()
    done.damaged += ledger.damaged.values()
    for shard in ledger.table["shard"].to_pylist():
        try:
            here, there = source.record(shard), writer.valid_record(shard)
            if here is None:
                continue
            if there is not None and not better(there, here):
                done.already_there += 1
            elif copy_shard(source, here, writer, there):
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


def _is_better(there: Record, here: Record) -> bool:
    """A committed row is never given up, and then more valid ones count."""
    return here.rows[1] >= there.rows[1] and (here.num_valid, here.rows[1]) > (there.num_valid, there.rows[1])


def _covers_more(here: Record, there: Record) -> bool:
    """Whether the source has come further since it was converted."""
    return (
        here.rows[1] > there.rows[1] or here.images_sha256 != there.images_sha256 or here.num_valid != there.num_valid
    )
