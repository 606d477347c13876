"""STORE/runs: what every extraction, repair, conversion and merge was asked, and what it cost.

That of an extraction or a repair is published when the run begins, so that a run which was killed has one too, and so
that `olavlm-cache status` knows how far a running one wants to go; it is replaced by one with the costs when the run
ends. A conversion and a merge have theirs when they are done.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from olavlm.cache import files
from olavlm.cache.files import Location
from olavlm.cache.images import without_credentials
from olavlm.cache.lease import is_running, this_process
from olavlm.cache.records import canonical_json
from olavlm.pipelines.cli import versions

if TYPE_CHECKING:  # `olavlm-cache status` reads records, and needs no torch for it
    from .extractor import TeacherSpec
    from .summary import Tally


class RunRecord:
    """The record of one run. `args` are its resolved arguments; secrets in URLs are left out."""

    def __init__(self, store: Location, args: argparse.Namespace, specs: list[TeacherSpec]) -> None:
        self._file, self._content = _begun(store, args)
        self._began = time.monotonic()
        self._content |= {
            "teachers": [{k: v for k, v in asdict(spec).items() if v is not None} for spec in specs],
            "driver": this_process(),
            "outcome": "running",
        }
        files.publish(self._file, _json(self._content))

    def end(self, tally: Tally, outcome: str) -> float:
        """Add the costs and how the run ended; returns its seconds."""
        seconds = time.monotonic() - self._began
        files.replace(self._file, _json({**self._content, "outcome": outcome, "cost": tally.cost(seconds)}))
        return seconds


def record_copy(store: Location, args: argparse.Namespace) -> None:
    """The record of a run that put features into a store and extracted none."""
    file, content = _begun(store, args)
    files.publish(file, _json({**content, "teachers": [], "outcome": "done"}))


def _begun(store: Location, args: argparse.Namespace) -> tuple[Location, dict]:
    """Where a record lies, and what every one holds."""
    now = datetime.now(UTC)
    said = {k: without_credentials(v) for k, v in vars(args).items() if v is not None and not callable(v)}
    content = {"when": now.isoformat(timespec="seconds"), "arguments": said, "versions": versions()}
    return store / "runs" / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}.json", content


@dataclass(frozen=True)
class Running:
    """The running extractions of one teacher, as one."""

    began: float
    """The earliest, in seconds of the store's clock."""
    limit: int | None
    """The first rows of the plan that are wanted; None for all."""


def running_extractions(store: Location) -> dict[str, Running]:
    """By teacher what the records say of extractions that are running.

    One on another host counts as long as its record does not say that it ended: look whether somebody writes, too.
    """
    found: dict[str, Running] = {}
    for name, stamp in files.listing(store / "runs").items():
        if name[0] == "." or not name.endswith(".json"):
            continue
        try:
            run = json.loads(files.read(store / "runs" / name))
            if run["outcome"] != "running" or is_running(run["driver"]) is False:
                continue
            limit, keys = run["arguments"].get("limit"), [teacher["key"] for teacher in run["teachers"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or not ours: what is written can be told without it
        for key in keys:
            other = found.get(key, Running(stamp.changed, limit))
            most = None if None in (limit, other.limit) else max(limit, other.limit)
            found[key] = Running(min(stamp.changed, other.began), most)
    return found


@dataclass(frozen=True)
class Recorded:
    """What the extractions that are on record took together, for some teachers."""

    hours: float
    worker_seconds: float
    device_seconds: float
    """Of the workers' time, that their devices computed."""
    rows: dict[str, int]
    """By teacher; a row that was extracted again counts again."""
    devices: list[str]
    others: list[str]
    """Teachers that the same extractions made beside: their cost cannot be told apart."""

    @property
    def images(self) -> float:
        """Rows a teacher, on average."""
        return sum(self.rows.values()) / len(self.rows)


def recorded_extractions(store: Location, keys: Sequence[str]) -> Recorded | None:
    """What those took that have ended and gave rows of these teachers; None unless all are on record."""
    rows, others, devices = dict.fromkeys(keys, 0), set(), set()
    hours = worker_seconds = device_seconds = 0.0
    for name in files.listing(store / "runs"):
        if name[0] == "." or not name.endswith(".json"):
            continue
        try:
            cost = json.loads(files.read(store / "runs" / name))["cost"]
            gave = {key: done["rows"] for key, done in cost["teachers"].items() if done["rows"]}
            took = (cost["hours"], cost["worker_seconds"], cost["stages"]["device"], cost["device"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, running, or killed: what it cost is not known
        if not gave.keys() & rows.keys():
            continue
        for key, count in gave.items():
            if key in rows:
                rows[key] += count
            else:
                others.add(key)
        hours, worker_seconds, device_seconds = hours + took[0], worker_seconds + took[1], device_seconds + took[2]
        devices.add(took[3])
    if not all(rows.values()):
        return None
    return Recorded(hours, worker_seconds, device_seconds, rows, sorted(devices), sorted(others))


def _json(content: dict) -> bytes:
    return canonical_json(content) + b"\n"
