"""Writers that are killed: before every change of the file system, step by step, and from outside at any instant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from .lab import Lab, Missed
from .outcome import Outcome, judge, rows_wrong_by_zarr
from .process import Process
from .scene import FLAVOURS, Scene, extract

Fault = Callable[[Lab, np.random.Generator], Outcome]
STEPS = ("make", "lease", "recover", "stage", "compare", "fsync", "withdraw", "place", "record", "release", "index")


def must_stand(scene: Scene, processes: Iterable[Process], before: Iterable[int] = ()) -> set[int]:
    """The shards that were committed, other than those that a process had begun to replace when it ended."""
    processes = list(processes)
    replacing = set().union(*(p.withdrawn - p.done for p in processes))
    return (scene.committed | set(before)).union(*(p.done for p in processes)) - replacing


def killed_at(*steps: str, flavours: Iterable[str] = FLAVOURS, shards: Iterable[int] | None = None) -> Fault:
    """SIGKILL of itself at any event of these steps (of the commits of these shards)."""

    def trial(lab: Lab, rng: np.random.Generator) -> Outcome:
        scene = lab.scene(rng, flavours)
        where = lab.draw_event(scene, rng, steps, shards)
        with lab.copy(scene) as path:
            process = Process(lambda tell: extract(scene, path, tell=tell), root=path, where=where)
            if process.wait() != "killed":
                raise Missed
            return _judge(scene, path, [process])

    return trial


def _judge(scene: Scene, path: Path, processes: list[Process]) -> Outcome:
    zeros = rows_wrong_by_zarr(scene, path)
    outcome = judge(scene, path, must_stand(scene, processes))
    outcome.zeros_by_zarr = zeros
    return outcome


def killed_between_halves(lab: Lab, rng: np.random.Generator) -> Outcome:
    """SIGKILL of itself when half of a file is written, where files are written in halves."""
    scene, left = lab.scene(rng, ("fresh",)), int(rng.integers(6))

    def where(words: str) -> bool:
        nonlocal left
        left -= words.startswith("olavlm.half")
        return left < 0

    with lab.copy(scene) as path:
        process = Process(lambda tell: extract(scene, path, tell=tell), root=path, where=where)
        if process.wait() != "killed":
            raise Missed
        return judge(scene, path, must_stand(scene, [process]))


def killed_at_random_instants(lab: Lab, rng: np.random.Generator) -> Outcome:
    """SIGKILL by the parent, after a random part of the job's time; then the job again, killed again, up to 4 times."""
    scene = lab.scene(rng, ("long", *FLAVOURS))
    with lab.copy(scene) as path:
        processes = [_killed(lab, scene, path, rng) for _ in range(rng.integers(1, 5))]
        if not any(p.killed for p in processes):
            raise Missed
        return _judge(scene, path, processes)


def _killed(lab: Lab, scene: Scene, path: Path, rng: np.random.Generator) -> Process:
    process = Process(lambda tell: extract(scene, path, tell=tell))
    process.kill_after(rng.uniform(0, 1.1) * lab.seconds(scene))
    return process
