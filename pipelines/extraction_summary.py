"""What an extraction says of itself: the preflight of a dry run, the summary at its end, its record in the store."""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from olavlm.cache import BadImage, FeatureStore, ImageRoots, StoreError
from olavlm.cache.codec import CODECS
from olavlm.cache.files import Location, is_local, location, publish
from olavlm.cache.images import redacted
from olavlm.cache.records import canonical_json

from .cli import JobFailed, versions
from .extractor import ShardResult, TeacherSpec, spec_dict

NAMED_FAILURES = 20  # rows named in the summary; `olavlm-cache status` lists all


@dataclass
class Tally:
    """What a run did; printed, and kept in the store."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    quarantined: int = 0
    forward_seconds: float = 0.0
    worker_seconds: float = 0.0
    failed_shards: list[str] = field(default_factory=list)

    def add(self, result: ShardResult) -> None:
        self.shards += 1
        self.rows += result.task.num_rows
        self.bytes += result.bytes
        self.quarantined += result.quarantined
        self.forward_seconds += result.forward_seconds
        self.worker_seconds += result.seconds


def summarise(
    store: Location, specs: list[TeacherSpec], limit: int | None, tally: Tally, seconds: float, stopped: str | None
) -> int:
    """Print what was done and what is left; 1 if a wanted row is quarantined or missing."""
    opened = FeatureStore(store)
    bad, missing = [], 0
    for spec in specs:
        group = opened[spec.key]
        rows = opened.rows.rows[:limit]
        coverage = group.coverage(rows)
        print(f"{spec.key}: {coverage}")
        wanted = set(rows.tolist())
        bad += [(spec.key, row, failure) for row, failure in group.failures() if row in wanted]
        missing += coverage.missing
    if tally.shards:
        busy = 100 * tally.forward_seconds / tally.worker_seconds if tally.worker_seconds else 0.0
        print(
            f"extracted {tally.rows} rows, {tally.shards} shards, {tally.bytes / 1e6:.1f} MB, {seconds / 3600:.4f} h, "
            f"{tally.rows / seconds:.2f} rows/s, {tally.bytes / 1e6 / seconds:.2f} MB/s, device busy {busy:.0f} %"
        )
    _name_failures(bad)
    if stopped:
        raise JobFailed(
            f"stopped by {stopped}: {tally.shards} shards were committed by this run, those in flight were dropped; "
            "run the same command again to finish"
        )
    if tally.failed_shards:
        raise JobFailed(f"{len(tally.failed_shards)} shards were given up: {tally.failed_shards[0]}")
    if missing or bad:
        raise JobFailed(
            f"incomplete: {len(bad)} rows quarantined, {missing} missing; "
            + ("--retry-failed tries quarantined rows again" if bad else "run the same command again")
        )
    return 0


def _name_failures(bad: list[tuple[str, int, BadImage]]) -> None:
    for key, row, failure in bad[:NAMED_FAILURES]:
        print(f"{key} row {row}: {failure}", file=sys.stderr)
    if len(bad) > NAMED_FAILURES:
        print(f"... and {len(bad) - NAMED_FAILURES} more; olavlm-cache status lists them all", file=sys.stderr)


def record_run(
    store: Location, args: argparse.Namespace, specs: list[TeacherSpec], tally: Tally, seconds: float
) -> None:
    """Keep the resolved configuration, versions and cost of this run beside its output."""
    now = datetime.now(UTC)
    content = {
        "when": now.isoformat(timespec="seconds"),
        "arguments": {k: _without_credentials(v) for k, v in vars(args).items() if v is not None},
        "teachers": [spec_dict(s) for s in specs],
        "versions": versions(),
        "seconds": seconds,
        "done": asdict(tally),
    }
    publish(store / "runs" / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}.json", canonical_json(content) + b"\n")


def _without_credentials(value: object) -> object:
    if isinstance(value, list):
        return [_without_credentials(v) for v in value]
    return redacted(value) if isinstance(value, str) else value


def dry_run(args: argparse.Namespace, teachers: dict, images, roots: ImageRoots, device: str) -> int:
    """Rows, bytes per teacher, free space, measured rows/s on a few images, ETA. Writes nothing."""
    rows = min(args.limit or len(images), len(images))
    sample, failures = [], []
    for image in images[: min(rows, 8)].to_pylist():
        try:
            sample.append(roots.open(image))
        except BadImage as e:
            failures.append(e)
    if not sample:
        raise JobFailed(f"none of the first {len(failures)} images can be read; the first: {failures[0]}")
    where, total, hours = location(args.store), 0, 0.0
    print(f"{rows} rows, {len(failures)} of the first {len(sample) + len(failures)} images cannot be read")
    for key, teacher in teachers.items():
        card = teacher.card
        size = rows * CODECS[args.dtype].row_bytes(card.tokens, card.dim)
        teacher.encode(sample[:1])  # warm up
        began = time.perf_counter()
        teacher.encode(sample)
        rate = len(sample) / (time.perf_counter() - began)
        total, hours = total + size, hours + rows / rate / 3600
        print(f"{key}: {card.tokens} x {card.dim} {args.dtype}, {size / 1e9:.3f} GB, {rate:.2f} rows/s a worker, "
              f"ETA {rows / rate / 3600:.2f} h with one worker")  # fmt: skip
    effort = f"{hours:.2f} h with one {device} worker"
    if not is_local(where):
        print(f"all: {total / 1e9:.3f} GB to {where}, whose free space is unknown, {effort}")
        return 0
    folder = where.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    print(f"all: {total / 1e9:.3f} GB of {free / 1e9:.1f} GB free at {folder}, {effort}")
    if total > free:
        raise StoreError(
            f"{folder} has {free / 1e9:.1f} GB free, the features need {total / 1e9:.1f} GB; use another disk"
        )
    return 0
