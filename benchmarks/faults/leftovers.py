"""Files that are not as a writer left them: halves of pairs, half-written, damaged, or of another time."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .disks import flip
from .kills import must_stand
from .lab import Lab, Missed
from .outcome import Outcome, judge
from .process import Process
from .scene import KEY, Scene, extract, open_group, record_file, shard_files, shards_of


def half_written_record(lab: Lab, rng: np.random.Generator) -> Outcome:
    """A record ends at a random byte, or goes on from there in zeros, or has a block of another record in its place."""
    scene = lab.scene(rng)
    with lab.copy(scene, "final") as path:
        shard = _draw_shard(path, rng)
        file = record_file(path, shard)
        raw = file.read_bytes()
        at, kind = int(rng.integers(len(raw) - 1)), rng.choice(3, p=[0.25, 0.25, 0.5])
        block = _other_digits(raw[at : at + 48]) + raw[at + 48 :]
        file.write_bytes(raw[:at] + [b"", bytes(len(raw) - at), block][kind])
        if file.read_bytes() == raw:
            raise Missed
        return _judge(scene, path, shard)


def _other_digits(raw: bytes) -> bytes:
    """As of the record of other rows, and still JSON."""
    return bytes(b"1234567891"[b - 48] if 48 <= b < 58 else b for b in raw)


def shard_without_record(lab: Lab, rng: np.random.Generator) -> Outcome:
    """Every record of a shard is gone, its files are there."""
    scene = lab.scene(rng)
    with lab.copy(scene, "final") as path:
        shard = _draw_shard(path, rng, with_files=True)
        for file in (path / KEY / "commits").glob(f"{shard:06d}.*"):
            file.unlink()
        return _judge(scene, path, shard)


def record_without_shard(lab: Lab, rng: np.random.Generator) -> Outcome:
    """A file of a shard is gone, or shorter or longer than its record says."""
    scene = lab.scene(rng)
    with lab.copy(scene, "final") as path:
        shard = _draw_shard(path, rng, with_files=True)
        file = rng.choice(shard_files(path, shard))
        size = file.stat().st_size
        if rng.random() < 0.5:
            file.unlink()
        else:
            os.truncate(file, int(rng.choice([rng.integers(size), size + rng.integers(1, 100)])))
        return _judge(scene, path, shard)


def damaged_lease(lab: Lab, rng: np.random.Generator) -> Outcome:
    """A writer was killed, and the lease it left has a flipped bit, or ends early, or holds random bytes."""
    scene = lab.scene(rng)
    where = lab.draw_event(scene, rng, ("recover", "stage", "place", "record"))
    with lab.copy(scene) as path:
        process = Process(lambda tell: extract(scene, path, tell=tell), root=path, where=where)
        if process.wait() != "killed":
            raise Missed
        (lease,) = (f for f in (path / KEY / "leases").iterdir() if f.name[0] != ".")
        raw, kind = lease.read_bytes(), rng.integers(3)
        if kind == 0:
            flip(lease, rng)
        else:
            lease.write_bytes(raw[: rng.integers(len(raw))] if kind == 1 else rng.bytes(len(raw)))
        os.utime(lease, (0, 0))  # no sign of life for long: a flipped bit may make it that of another host
        return judge(scene, path, must_stand(scene, [process]))


def damaged_index(lab: Lab, rng: np.random.Generator) -> Outcome:
    """The index of the records has a flipped bit, ends early, or is of before the job."""
    scene = lab.scene(rng, ("retry", "grow"))
    with lab.copy(scene) as path:
        index, kind = path / KEY / "index", rng.integers(3)
        before = index.read_bytes()
        extract(scene, path)
        if kind == 0:
            flip(index, rng)
        elif kind == 1:
            os.truncate(index, int(rng.integers(index.stat().st_size)))
        else:
            index.write_bytes(before)
        standing = open_group(scene.final).ledger().table["shard"].to_pylist()
        return _judged_apart(scene, path, standing)


def _judged_apart(scene: Scene, path: Path, standing: list[int]) -> Outcome:
    """By a process of its own: the libraries below a reader may die of what they are given unchecked."""
    process = Process(lambda tell: tell(json.dumps(asdict(judge(scene, path, standing)))))
    if process.wait() != "ok":
        return Outcome(untrue_status=1, bytes_equal=0, note=process.error or "the reader died")
    return Outcome(**json.loads(process.words[-1]))


def stale_index(lab: Lab, rng: np.random.Generator) -> Outcome:
    """After the index was written, a record was damaged."""
    scene = lab.scene(rng)
    with lab.copy(scene) as path:
        extract(scene, path)
        shard = _draw_shard(path, rng)
        flip(record_file(path, shard), rng)
        return _judge(scene, path, shard)


def _draw_shard(path: Path, rng: np.random.Generator, with_files: bool = False) -> int:
    shards = [s for s in shards_of(open_group(path)) if not with_files or shard_files(path, s)]
    return int(rng.choice(shards))


def _judge(scene: Scene, path: Path, shard: int) -> Outcome:
    """The shard is not what it was; nothing else may have changed, and no record may be read that nobody wrote."""
    there = open_group(path)
    wrong = 0
    try:
        record, written = there.record(shard), open_group(scene.final).record(shard)
        wrong = record is not None and record.comparable() != written.comparable()
    except ValueError:
        pass  # CorruptFeatures, as it must be
    outcome = judge(scene, path, set(shards_of(open_group(scene.final))) - {shard})
    outcome.wrong_values += int(wrong)
    return outcome
