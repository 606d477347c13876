"""Disks that are full, lie, or may not be written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .kills import Fault, must_stand
from .lab import Lab, Missed, NotPossible
from .outcome import Outcome, judge, look
from .process import Process, Tell
from .scene import FLAVOURS, KEY, extract

NOBODY = 65534
DISK_BYTES = 512 * 1024


def file_size_limit(flavours: Iterable[str] = FLAVOURS) -> Fault:
    """No file may become longer than a random limit (RLIMIT_FSIZE), below the longest shard file or file at all."""

    def trial(lab: Lab, rng: np.random.Generator) -> Outcome:
        scene = lab.scene(rng, flavours)
        below = scene.final / KEY / "features" / "c" if rng.random() < 0.5 else scene.final
        limit = int(rng.integers(1, max(f.stat().st_size for f in below.rglob("*") if f.is_file())))
        with lab.copy(scene) as path:

            def work(tell: Tell) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                extract(scene, path, tell=tell)

            process = Process(work)
            process.wait()
            return _of_this_error(judge(scene, path, must_stand(scene, [process])), process, "OSError")

    return trial


def full_disk(flavours: Iterable[str] = FLAVOURS) -> Fault:
    """A file system of 512 KB that is full but for a random rest; the rest of the space is there again afterwards."""

    def trial(lab: Lab, rng: np.random.Generator) -> Outcome:
        scene = lab.scene(rng, flavours)
        with lab.copy(scene) as source, _small_disk(lab.folder) as disk:
            path, ballast = disk / "store", disk / "ballast"
            shutil.copytree(source, path)
            free = int(rng.integers(0, 12)) * os.statvfs(disk).f_bsize
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"\0" * 4096):
                    pass
            os.truncate(ballast, max(0, ballast.stat().st_size - free))
            process = Process(lambda tell: extract(scene, path, tell=tell))
            process.wait()
            sight = look(scene, path)  # while it is full
            ballast.unlink()
            outcome = judge(scene, path, must_stand(scene, [process]))
            outcome.wrong_values += sight.wrong
            outcome.untrue_status += sight.untrue
            return _of_this_error(outcome, process, "OSError")

    return trial


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    options = f"size={DISK_BYTES}"
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True)
    except OSError as e:
        raise NotPossible(f"no file system can be mounted here: {e}") from None
    if made.returncode:
        raise NotPossible(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # a reader may still hold a file


def read_only(*folders: str, flavours: Iterable[str] = ("resume", "retry", "grow")) -> Fault:
    """The store, or one of its folders (of `folders`, all by default), may not be written by the user who extracts."""

    def trial(lab: Lab, rng: np.random.Generator) -> Outcome:
        if os.getuid() != 0:
            raise NotPossible("only root can become a user to whom a folder is read-only")
        scene = lab.scene(rng, flavours)
        with lab.copy(scene) as path:
            lab.folder.chmod(0o755), path.parent.chmod(0o755)
            for file in (path, *path.rglob("*")):
                os.chown(file, NOBODY, NOBODY)
            there = [".", KEY, *(f"{KEY}/{f.name}" for f in sorted((path / KEY).iterdir()) if f.is_dir())]
            closed = path / str(rng.choice(folders or there))
            below = [f for f in (closed, *closed.rglob("*")) if f.is_dir()]
            for folder in below:
                folder.chmod(0o555)

            def work(tell: Tell) -> None:
                os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
                try:
                    extract(scene, path, tell=tell)
                finally:
                    sight = look(scene, path)
                    tell(f"seen {sight.wrong} {sight.untrue}")

            process = Process(work)
            process.wait()
            for folder in below:
                folder.chmod(0o755)
            outcome = judge(scene, path, must_stand(scene, [process]))
            seen = next((w.split()[1:] for w in process.words if w.startswith("seen ")), ["1", "1"])
            outcome.wrong_values += int(seen[0])
            outcome.untrue_status += int(seen[1])
            return _of_this_error(outcome, process, "PermissionError")

    return trial


def lying_disk(lab: Lab, rng: np.random.Generator) -> Outcome:
    """One bit of a staged file is another when it is read back."""
    scene = lab.scene(rng)
    with lab.copy(scene) as path:
        seed = int(rng.integers(2**31))

        def lie(step: str, shard: int) -> None:
            if step == "compare":
                own = np.random.default_rng(seed)
                staged = sorted((path / KEY / "staging").iterdir())
                flip(staged[own.integers(len(staged))], own)

        process = Process(lambda tell: extract(scene, path, tell=tell, on_step=lie))
        process.wait()
        outcome = judge(scene, path, must_stand(scene, [process]))
        return _of_this_error(outcome, process, "CorruptFeatures", "reads back differently")


def flip(file: Path, rng: np.random.Generator) -> None:
    """Flip one random bit."""
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def _of_this_error(outcome: Outcome, process: Process, name: str, words: str = "") -> Outcome:
    """The job must have ended with the error that the fault makes."""
    if process.error is None and not outcome.lost:
        raise Missed
    if process.error and not (process.error.startswith(name) and words in process.error):
        outcome.note = f"ended with {process.error}"
        outcome.lost_shards += 1
    return outcome
