"""Several writers on one store: at once, and one that was taken for dead and wakes up when its shard is another's."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from .kills import Fault, must_stand
from .lab import Lab, Missed
from .outcome import Outcome, judge
from .process import Process, Tell, steps_of, the_same
from .scene import KEY, Scene, decoded, extract

BEFORE_ITS_RECORD = ("lease", "recover", "stage", "compare", "fsync", "withdraw", "place", "record")


def at_once(lab: Lab, rng: np.random.Generator) -> Outcome:
    """2 to 4 extractors on one store, each pausing up to 10 ms at every step; every second time one is killed."""
    scene = lab.scene(rng)
    with lab.copy(scene) as path:
        go, gate = os.pipe()

        def work(tell: Tell, seed: int) -> None:
            own = np.random.default_rng(seed)
            os.read(go, 1)
            extract(scene, path, tell=tell, on_step=lambda step, shard: time.sleep(0.01 * own.uniform() ** 4))

        seeds = rng.integers(2**31, size=rng.integers(2, 5)).tolist()
        processes = [Process(lambda tell, seed=seed: work(tell, seed)) for seed in seeds]
        os.write(gate, b"." * len(seeds))
        if rng.random() < 0.5:
            processes[0].kill_after(rng.uniform(0, 2) * lab.seconds(scene))
        ends = [p.wait() for p in processes if not p.ended]
        os.close(go), os.close(gate)
        outcome = judge(scene, path, must_stand(scene, processes))
        outcome.note = outcome.note or next((p.error for p in processes if p.error), "")
        outcome.lost_shards += ends.count("error")
        return outcome


def take_for_dead(path: Path, shard: int) -> None:
    """Make the shard's lease that of a process of another host that has given no sign of life for too long."""
    leases = sorted((path / KEY / "leases").glob(f"{shard:06d}.*"), key=lambda f: int(f.suffix[1:]))
    for file in leases[-1:]:
        file.write_text(json.dumps({**json.loads(file.read_text()), "host": "another"}))
        os.utime(file, (0, 0))


def stuck(
    *,
    in_steps_alone: bool = True,
    stale_listing: bool = False,
    steps: tuple[str, ...] = BEFORE_ITS_RECORD,
    at_its_record: bool = False,
    others_steps: tuple[str | None, ...] = (*BEFORE_ITS_RECORD, *[None] * 4),
) -> Fault:
    """One writer is stopped (SIGSTOP) and taken for dead, another does the job, and the first goes on.

    The first stops before one of `steps`, or unless `in_steps_alone` before any change of the file system in them, or
    if `at_its_record` with the record in hand, just before it gets its name. The other is itself stopped in one of
    `others_steps` until the first has ended, or with None is not. Every pair of steps comes once before any comes
    again. The first writes other values, so that whatever of it stays behind is seen. With `stale_listing` the other
    does not see what the first has staged, as on a shared file system whose listings lag behind.
    """
    pairs = list(itertools.product(("record",) if at_its_record else steps, others_steps))

    def trial(lab: Lab, rng: np.random.Generator) -> Outcome:
        pair = lab.deal("stuck", pairs, rng)
        scene = lab.scene(rng, ("retry",) if "withdraw" in pair else ("fresh", "resume", "retry"))
        events, of = lab.events(scene), steps_of(lab.events(scene))
        candidates = _until_the_record(events)
        eligible = [e for e in candidates if of[e][0] == pair[0]]
        if at_its_record:
            eligible = [e for e in eligible if _PUBLISHES.fullmatch(events[e])]
        elif in_steps_alone:
            eligible = [e for e in eligible if events[e].startswith("step ")]
        event = int(rng.choice(eligible))
        shard, where, others_stop = of[event][1], lab.strike(scene, event), None
        if pair[1] is not None:
            stops = [e for e in candidates if of[e] == (pair[1], shard)]
            if not stops:  # a shard without a valid row has fewer steps
                raise Missed
            others_stop = the_same(events, stops[0] if in_steps_alone else int(rng.choice(stops)))
        features = scene.features + 1
        with lab.copy(scene) as path, contextlib.ExitStack() as cleanup:
            first = Process(
                lambda tell: extract(
                    scene, path, replace(scene.request, shards=(shard,)), features=features, tell=tell
                ),
                root=path,
                where=where,
                signal=signal.SIGSTOP,
            )
            cleanup.callback(first.kill)
            if first.wait() != "stopped":
                raise Missed
            take_for_dead(path, shard)
            with _blind() if stale_listing else contextlib.nullcontext():
                other = Process(
                    lambda tell: extract(scene, path, tell=tell), root=path, where=others_stop, signal=signal.SIGSTOP
                )
            cleanup.callback(other.kill)
            other_stuck = other.wait() == "stopped"
            first.go_on()
            if other_stuck:
                other.go_on()
            return _judge(scene, path, shard, first, other, features)

    return trial


def _judge(scene: Scene, path: Path, shard: int, first: Process, other: Process, features: np.ndarray) -> Outcome:
    """The shard is the first writer's only if that alone has committed it."""
    if shard in first.done and shard not in other.done:
        values, images = scene.values.copy(), _images(scene, shard)
        values[images] = decoded(scene.dtype, features[images])
        return judge(scene, path, must_stand(scene, [first, other]), values=values, others=frozenset([shard]))
    return judge(scene, path, must_stand(scene, [first, other]))


def _images(scene: Scene, shard: int) -> list[int]:
    return list(range(shard * scene.shard_rows, min((shard + 1) * scene.shard_rows, len(scene.features))))


_PUBLISHES = re.compile(r"os\.(link|rename) \w+/commits/\d+\.\d+\.json")


def _until_the_record(events: list[str]) -> list[int]:
    """Events of commits up to the publication of the record, itself included: from there on the commit stands."""
    found, published = [], False
    for i, (event, (step, _)) in enumerate(zip(events, steps_of(events), strict=True)):
        if event.startswith("step "):
            published = False
        if step in BEFORE_ITS_RECORD and not published:
            found.append(i)
        published |= bool(_PUBLISHES.fullmatch(event))
    return found


def _blind():
    """Staged files of other writers are not listed."""
    glob = Path.glob

    def listed(self: Path, pattern: str, **options):
        return iter(()) if self.name == "staging" else glob(self, pattern, **options)

    return mock.patch.object(Path, "glob", listed)
