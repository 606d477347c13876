"""What an extraction did and what it cost: kept while it runs, told in plain words at its end."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field

from olavlm.cache import FeatureStore, TeacherFeatures
from olavlm.cache.files import Location
from olavlm.cache.wording import counted, printable
from olavlm.pipelines.cli import JobFailed

from .extractor import ShardResult, Stages, TeacherSpec

NAMED_MISSING = 1000  # rows, a line each; those after them are named as ranges

BOTTLENECKS = {
    "device": "the device is the bottleneck, as it should be",
    "images": "reading and preparing images is the bottleneck: give a worker more CPUs (--worker-cpus), or keep the "
    "images on a faster disk",
    "disk": "writing features is the bottleneck: use a faster disk, or --dtype int8 for half the bytes",
}
"""What to do about the stage that workers spent most time in."""


@dataclass
class Done:
    """What this run did for one teacher."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    quarantined: int = 0
    carried_over: int = 0


@dataclass
class Tally:
    """What a run did, and what it cost."""

    teachers: dict[str, Done] = field(default_factory=dict)
    """By store key."""
    done_by_others: int = 0
    """Shards that another run, or a worker that died before it could say so, had committed."""
    given_up: list[str] = field(default_factory=list)
    """Shards, each with the reason."""
    broken_off: str = ""
    """Why the run ended before its work did."""
    deaths: int = 0
    """Workers that died, hung or lost their node."""
    retries: int = 0
    """Of shards."""
    workers: int = 0
    """That were ever ready."""
    nodes: int = 0
    """They were on."""
    hosts: list[str] = field(default_factory=list)
    device: str = ""
    worker_seconds: float = 0.0
    stages: Stages = field(default_factory=Stages)

    def add(self, result: ShardResult) -> None:
        done = self.teachers.setdefault(result.task.key, Done())
        done.shards += 1
        done.rows += result.task.num_rows
        done.bytes += result.bytes
        done.quarantined += result.quarantined
        done.carried_over += result.carried_over

    def total(self, what: str) -> int:
        """Sum over teachers of `shards`, `rows`, `bytes`, `quarantined` or `carried_over`."""
        return sum(getattr(done, what) for done in self.teachers.values())

    def shares(self) -> dict[str, float]:
        """Shares of the workers' time, by stage; {} if there was none."""
        stages = asdict(self.stages)
        whole = max(self.worker_seconds, sum(stages.values()))
        return {name: seconds / whole for name, seconds in stages.items()} if whole else {}

    def cost(self, seconds: float) -> dict:
        """As JSON: what a run of so many seconds took and gave."""
        rows, size = self.total("rows"), self.total("bytes")
        return {
            "hours": seconds / 3600,
            "rows": rows,
            "rows_per_second": rows / seconds,
            "bytes": size,
            "bytes_per_second": size / seconds,
            "quarantined": self.total("quarantined"),
            "worker_hours": self.worker_seconds / 3600,
            "shares": self.shares(),
            **asdict(self),
        }


def summarise(
    store: Location, specs: list[TeacherSpec], limit: int | None, tally: Tally, seconds: float, stopped: str | None
) -> int:
    """Print what was done and what is left; 0, or `JobFailed` if a wanted row is quarantined or missing."""
    opened = FeatureStore(store)
    bad, lost = [], []
    for spec in specs:
        group = opened[spec.key]
        rows = opened.rows.rows[:limit]
        done = tally.teachers.get(spec.key)
        pace = f"; this run {_pace(done.rows, done.bytes, seconds)}" if done else ""
        print(f"{spec.key}: {group.coverage(rows)}{pace}")
        if done and done.carried_over:
            print(f"  {carried_over_words(done.carried_over)}")
        wanted = set(rows.tolist())
        bad += [(spec.key, row, failure) for row, failure in group.failures() if row in wanted]
        lost += [(group, row) for row in group.missing_rows(rows).tolist()]
    if tally.workers:
        print(cost_words(tally, seconds))
    for key, row, failure in bad:
        print(f"{key} row {row}: {failure}", file=sys.stderr)
    if stopped:
        raise JobFailed(
            f"stopped by {stopped}: {counted(tally.total('shards'), 'shard')} committed by this run, those in flight "
            "dropped; run the same command again to finish"
        )
    _name_missing(lost)
    if tally.broken_off:
        raise JobFailed(f"{tally.broken_off}; when that is mended, run the same command again")
    if tally.given_up:
        rest = f"; and {len(tally.given_up) - 1} more" if len(tally.given_up) > 1 else ""
        raise JobFailed(f"{counted(len(tally.given_up), 'shard')} given up: {tally.given_up[0]}{rest}")
    if lost or bad:
        raise JobFailed(
            f"incomplete: {len(bad)} rows quarantined, {len(lost)} missing; "
            + ("--retry-failed tries quarantined rows again" if bad else "run the same command again")
        )
    return 0


def carried_over_words(rows: int) -> str:
    return f"{counted(rows, 'valid row')} kept the features they had: the images cannot be had now"


def cost_words(tally: Tally, seconds: float) -> str:
    """What the run took, where its workers' time went, and what held it up."""
    shares = tally.shares()
    waits = [f"waited for {name} {100 * shares[name]:.0f} %" for name in ("images", "disk")] if shares else []
    busy = [f"device busy {100 * shares['device']:.0f} %"] if shares else []
    workers = f"{counted(tally.workers, f'{tally.device} worker')} on {counted(tally.nodes, 'node')}"
    lines = [
        f"extracted {_pace(tally.total('rows'), tally.total('bytes'), seconds)}, "
        f"{counted(tally.total('shards'), 'shard')}, {seconds / 3600:.4f} h; {workers}: " + ", ".join([*busy, *waits])
    ]
    if any(shares.values()):
        lines.append(BOTTLENECKS[max(shares, key=shares.__getitem__)])
    if tally.deaths or tally.retries or tally.done_by_others:
        lines.append(
            f"{counted(tally.deaths, 'worker')} died or hung, shards were tried again {tally.retries} times, "
            f"{tally.done_by_others} were found done"
        )
    return "\n".join(lines)


def _pace(rows: int, size: int, seconds: float) -> str:
    return f"{rows} rows, {size / 1e6:.1f} MB, {rows / seconds:.2f} rows/s, {size / 1e6 / seconds:.2f} MB/s"


def _name_missing(lost: list[tuple[TeacherFeatures, int]]) -> None:
    for group, row in lost[:NAMED_MISSING]:
        print(f"{group.key} row {row} {printable(group.plan.image_of(row))}: missing", file=sys.stderr)
    ranges: list[list] = []
    for group, row in lost[NAMED_MISSING:]:
        if ranges and ranges[-1][0] == group.key and ranges[-1][2] == row - 1:
            ranges[-1][2] = row
        else:
            ranges.append([group.key, row, row])
    for key, first, last in ranges:
        print(f"{key} rows {first} to {last}: missing", file=sys.stderr)
