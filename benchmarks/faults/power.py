"""A power cut, as a model: what was never flushed may not be there afterwards.

The model: of a file only the bytes of its last `fsync` are sure, and of a folder only the names it had at its own last
`fsync`. Whatever else was written may have reached the disk or not: at the cut each name that changed since is as it
was then or as it was last, by the toss of a coin, and each file that was never flushed has no bytes, zeros, a part of
its bytes, or all of them. Every second time the worst of all this happens together: every such name is as it was, every
such file is empty. Real file systems keep more (a journal orders names, a rename is one change), so that what survives
the model survives them. What was there before the job is sure.
"""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from .kills import Fault, must_stand
from .lab import Lab, Missed
from .outcome import Outcome, judge
from .process import Process, Tell, steps_of
from .scene import extract

Names = dict[str, int | None]
"""What a folder holds: the inode of a file, None for a folder."""


@dataclass
class Sure:
    """What is on the disk whatever happens: of folders by path, of files by inode."""

    folders: dict[str, Names] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> Sure:
        """All that is there now."""
        sure = cls({str(folder): _names(folder) for folder in (root, *root.rglob("*")) if folder.is_dir()})
        sure.files = {f.stat().st_ino: f.read_bytes() for f in root.rglob("*") if f.is_file()}
        return sure

    def learn(self, journal: Path) -> None:
        """What a process has flushed."""
        with journal.open("rb") as file:
            while True:
                try:
                    where, what = pickle.load(file)
                except EOFError:
                    return
                (self.folders if isinstance(where, str) else self.files)[where] = what


def _names(folder: Path) -> Names:
    with os.scandir(folder) as entries:
        return {e.name: None if e.is_dir() else e.inode() for e in entries}


def journal_of_fsync(journal: Path) -> Callable[[int], None]:
    """An `os.fsync` that notes what it makes sure. Files stay open, so that no inode number is used twice."""
    out, held = journal.open("ab", buffering=0), []

    def fsync(fd: int) -> None:
        info, itself = os.fstat(fd), Path(f"/proc/self/fd/{fd}")
        if stat.S_ISDIR(info.st_mode):
            out.write(pickle.dumps((str(itself.readlink()), _names(itself.readlink()))))
        else:
            held.append(os.dup(fd))
            out.write(pickle.dumps((info.st_ino, itself.read_bytes())))

    return fsync


def cut(root: Path, sure: Sure, rng: np.random.Generator) -> Path:
    """What is found at `root` when the power is back, as a new folder beside it."""
    after, worst = root.with_name("after"), rng.random() < 0.5

    def content(file: Path, inode: int) -> bytes:
        if inode in sure.files:
            return sure.files[inode]
        there = file.read_bytes() if file.exists() and file.stat().st_ino == inode else b""
        part = there[: rng.integers(len(there) + 1)]
        return b"" if worst else [b"", bytes(len(there)), part, there][rng.integers(4)]

    def rebuild(folder: Path, into: Path) -> None:
        into.mkdir()
        now = _names(folder) if folder.is_dir() else {}
        then = sure.folders.get(str(folder), {})
        for name in sorted(now.keys() | then.keys()):
            kept = then if worst or rng.random() < 0.5 else now
            if name not in kept:
                continue
            if kept[name] is None:
                rebuild(folder / name, into / name)
            else:
                (into / name).write_bytes(content(folder / name, kept[name]))

    rebuild(root, after)
    return after


def power_cut(*steps: str) -> Fault:
    """The power goes at any event of these steps (of all by default), after all that the job has flushed before."""

    def trial(lab: Lab, rng: np.random.Generator) -> Outcome:
        scene = lab.scene(rng)
        events = lab.events(scene)
        where = lab.draw_event(scene, rng, steps or sorted({step for step, _ in steps_of(events)}))
        with lab.copy(scene) as path:
            sure, journal = Sure.of(path), path.with_name("journal")
            journal.touch()
            held = [f.open("rb") for f in path.rglob("*") if f.is_file()]

            def work(tell: Tell) -> None:
                with mock.patch.object(os, "fsync", journal_of_fsync(journal)):
                    extract(scene, path, tell=tell)

            process = Process(work, root=path, where=where)
            if process.wait() != "killed":
                raise Missed
            sure.learn(journal)
            after = cut(path, sure, rng)
            for file in held:
                file.close()
            return judge(scene, after, must_stand(scene, [process]))

    return trial
