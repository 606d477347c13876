"""The machine that figures were measured on, in words: what a reader needs to judge them."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def describe(folder: Path, packages: Sequence[str]) -> dict:
    """CPU, memory, file system and disk of `folder`, kernel, versions (None where not installed), date and commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        **_disk(folder),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _disk(folder: Path) -> dict[str, str]:
    """The file system that holds `folder`, and its block device if it has one."""
    best = max(
        (line.split() for line in Path("/proc/self/mounts").read_text().splitlines()),
        key=lambda mount: len(mount[1]) if folder.resolve().is_relative_to(mount[1]) else -1,
    )
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        return {"file_system": best[2], "disk": best[0]}
    disk = block.resolve() if (block / "queue").exists() else block.resolve().parent
    kind = "rotational" if (disk / "queue/rotational").read_text().strip() == "1" else "not rotational"
    driver = disk / "device/driver"
    model = disk / "device/model"
    words = [
        disk.name,
        driver.resolve().name if driver.exists() else "",
        model.read_text().strip() if model.exists() else "",
        f"says it is {kind}",
    ]
    return {"file_system": f"{best[2]} ({best[3]})", "disk": ", ".join(w for w in words if w)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit measured, with a `+` if the package's or the benchmark's files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
