"""STORE/runs: what every extraction was asked, and what it cost.

A record is published when a run begins, so that a run which was killed has one too, and so that `olavlm-cache status`
knows how far a running one wants to go; it is replaced by one with the costs when the run ends.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from olavlm.cache import files
from olavlm.cache.files import Location
from olavlm.cache.images import redacted
from olavlm.cache.lease import is_running, this_process
from olavlm.cache.records import canonical_json
from olavlm.pipelines.cli import versions

if TYPE_CHECKING:  # `olavlm-cache status` reads records, and needs no torch for it
    from .extractor import TeacherSpec
    from .summary import Tally


class RunRecord:
    """The record of one run. `args` are its resolved arguments; secrets in URLs are left out."""

    def __init__(self, store: Location, args: argparse.Namespace, specs: list[TeacherSpec]) -> None:
        now = datetime.now(UTC)
        self._file = store / "runs" / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}.json"
        self._began = time.monotonic()
        self._content = {
            "when": now.isoformat(timespec="seconds"),
            "arguments": {k: _without_credentials(v) for k, v in vars(args).items() if v is not None},
            "teachers": [{k: v for k, v in asdict(spec).items() if v is not None} for spec in specs],
            "versions": versions(),
            "driver": this_process(),
            "outcome": "running",
        }
        files.publish(self._file, _json(self._content))

    def end(self, tally: Tally, outcome: str) -> float:
        """Add the costs and how the run ended; returns its seconds."""
        seconds = time.monotonic() - self._began
        files.replace(self._file, _json({**self._content, "outcome": outcome, "cost": tally.cost(seconds)}))
        return seconds


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


def _json(content: dict) -> bytes:
    return canonical_json(content) + b"\n"


def _without_credentials(value: object) -> object:
    if isinstance(value, list):
        return [_without_credentials(v) for v in value]
    return redacted(value) if isinstance(value, str) else value
