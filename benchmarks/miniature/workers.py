"""Processes that run the product's commands one after the other, so that libraries are imported once and not each time.

A worker calls the command's `main(argv)` in the run's folder, with one thread of its own, and writes what it prints to
the step's log. Workers die with who started them; a command that they are at is stopped as by a user.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import connection, get_context
from pathlib import Path

from .steps import EVAL, EXTRACT, OWN, PROBE, REPORT, TRAIN

MODULES = {
    OWN: "benchmarks.miniature.__main__",
    EXTRACT: "olavlm.pipelines.extract",
    TRAIN: "olavlm.pipelines.train",
    PROBE: "olavlm.pipelines.probe",
    EVAL: "olavlm.pipelines.evaluate",
    REPORT: "olavlm.pipelines.report",
}
"""Whose `main` is called."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_STOP_SECONDS = 60
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class Worker:
    """A process, and what it was given to do."""

    def __init__(self, folder: Path) -> None:
        self.connection, theirs = get_context("spawn").Pipe()
        # Not a daemon: commands have children of their own.
        self._process = get_context("spawn").Process(target=_serve, args=(theirs, str(folder)))
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        self._process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, command: str, words: Sequence[str], log: Path) -> None:
        """Begin; `status` has the end, once `connection` is ready."""
        self.connection.send((MODULES[command], list(words), str(log)))

    def status(self) -> int | None:
        """The command's exit status; None if the process died of it."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def stop(self) -> None:
        """End it; a command that it is at saves what it has first, if it can."""
        self.connection.close()
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _serve(given: connection.Connection, folder: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()  # Ctrl-C is for who started this, and stops the workers in turn
    os.chdir(folder)
    own = os.dup(1), os.dup(2)
    while True:
        try:
            module, words, log = given.recv()
        except EOFError:
            return
        with Path(log).open("w", buffering=1) as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            status = _call(module, words)
            sys.stdout.flush(), sys.stderr.flush()
            for number, old in enumerate(own, 1):
                os.dup2(old, number)
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more: the next `recv` ends this
            given.send(status)


def _call(module: str, words: Sequence[str]) -> int:
    try:
        return int(importlib.import_module(module).main(list(words)) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        return 1
