"""Starts work of a `tasks.py` in a process of its own, where seconds and memory above the imports can be told."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(task: str, module: str = f"{__package__}.tasks", **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", module, task, json.dumps(options)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} failed with status {process.returncode}; its error is above")
    return json.loads(output.splitlines()[-1])


def run(task: str, module: str = f"{__package__}.tasks", **options: object) -> dict:
    return result(start(task, module, **options))


class Peak:
    """How far this process's resident memory rises from here on."""

    def __init__(self) -> None:
        self.forget()
        self._base = _status("VmRSS")

    def forget(self) -> None:
        """Peaks so far; where the rise is counted from stays."""
        with contextlib.suppress(OSError):  # not permitted: the figure may hold an earlier peak, and is never too low
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    def mb(self) -> float:
        return round((_status("VmHWM") - self._base) * 1024 / 1e6, 2)


def _status(field: str) -> int:
    """In KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
