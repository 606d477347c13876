"""Child processes that die or stop at a chosen change of the file system.

Python's audit hooks hear of every link, rename, removal, new folder and file opened for writing before it happens, so
that no instant between two of them is left out, whatever the protocol's code looks like.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGCONT, SIGKILL

CHANGES = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "olavlm.half")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_libc = ctypes.CDLL(None)
_SET_DEATH_SIGNAL = 1

Tell = Callable[[str], None]
Where = Callable[[str], bool]
"""The words of an event -> whether it is the one; asked of each in turn."""


class Process:
    """A forked process that runs `work(tell)`; what it tells is heard when it has ended or stopped.

    With `root` it also tells of every change below that folder before it makes it, and at the first event for which
    `where` holds it gets the signal.
    """

    def __init__(
        self,
        work: Callable[[Tell], object],
        *,
        root: Path | None = None,
        where: Where | None = None,
        signal: int = SIGKILL,
    ) -> None:
        self._pipe, write = os.pipe()
        self.words: list[str] = []
        self.ended = self.killed = False
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._pipe)
                _libc.prctl(_SET_DEATH_SIGNAL, int(SIGKILL))  # a stopped one would outlive its parent
                status = self._child(work, write, root, where, signal)
            finally:
                os._exit(status)
        os.close(write)

    @staticmethod
    def _child(work: Callable[[Tell], object], write: int, root: Path | None, where: Where | None, signal: int) -> int:
        def tell(word: str) -> None:
            os.write(write, (word.replace("\n", " ") + "\n").encode())
            hit = where is not None and where(word)
            if hit:
                os.kill(os.getpid(), signal)

        def hear(name: str, arguments: tuple) -> None:
            if name in CHANGES and (name != "open" or (isinstance(arguments[2], int) and arguments[2] & _WRITING)):
                path = str(arguments[1] if name in ("os.link", "os.rename") else arguments[0])
                if path.startswith(str(root)):
                    tell(f"{name} {path[len(str(root)) + 1 :]}")

        if root is not None:
            sys.addaudithook(hear)
        try:
            work(tell)
        except BaseException as e:
            os.write(write, f"error {type(e).__name__}: {e}\n".replace("\n", " ").encode() + b"\n")
            return 1
        return 0

    def wait(self) -> str:
        """Until it has ended or stopped: "ok", "error", "killed" or "stopped"."""
        status = os.waitpid(self.pid, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            return "stopped"
        self.ended = True
        with os.fdopen(self._pipe, "rb") as pipe:
            self.words += pipe.read().decode().splitlines()
        self.killed = os.WIFSIGNALED(status)
        return "killed" if self.killed else "ok" if status == 0 else "error"

    def go_on(self) -> str:
        os.kill(self.pid, SIGCONT)
        return self.wait()

    def kill(self) -> None:
        if not self.ended:
            os.kill(self.pid, SIGKILL)
            self.wait()

    def kill_after(self, seconds: float) -> str:
        time.sleep(seconds)
        os.kill(self.pid, SIGKILL)
        return self.wait()

    @property
    def done(self) -> set[int]:
        """The shards whose commit returned."""
        return {int(w.split()[1]) for w in self.words if w.startswith("done ")}

    @property
    def withdrawn(self) -> set[int]:
        """The shards that it began to replace."""
        return {int(w.split()[2]) for w in self.words if w.startswith("step withdraw ")}

    @property
    def error(self) -> str | None:
        return next((w.removeprefix("error ") for w in self.words if w.startswith("error ")), None)


def steps_of(words: list[str]) -> list[tuple[str, int]]:
    """The protocol's step and the shard that each event belongs to; after a commit has returned, "done"."""
    step, shard, steps = "make", -1, []
    for word in words:
        if word.startswith("step "):
            step, shard = word.split()[1], int(word.split()[2])
        elif word.startswith("done "):
            step = "done"
        steps.append((step, shard))
    return steps


def the_same(events: list[str], number: int) -> Where:
    """Holds at the event that another run told as its number `number`, where others may come before it in this one."""
    told = [(shard, _without_nonce(e)) for e, (_, shard) in zip(events, steps_of(events), strict=True)][: number + 1]
    left, now = told.count(told[-1]), -1

    def where(words: str) -> bool:
        nonlocal left, now
        if words.startswith("step "):
            now = int(words.split()[2])
        if (now, _without_nonce(words)) != told[-1]:
            return False
        left -= 1
        return left == 0

    return where


def _without_nonce(words: str) -> str:
    """The same in every run, however a file gets its name."""
    return re.sub(r"[0-9a-f]{16,}", "*", words).replace("os.rename", "os.link")
