"""Stores of many rows with tiny features but real shard counts, made through the package's own interface."""

from __future__ import annotations

import os
from pathlib import Path

from olavlm.cache import StoreBuilder

from . import fresh
from .payload import card

TOKENS, DIM = 1, 2


def make(store: Path, rows: int, shard_rows: dict[str, int]) -> dict:
    """A complete store of these teachers, filled by as many processes as there are cores; what its plan took.

    The index of its records is left to `index`.
    """
    planned = fresh.run("plan", store=str(store), rows=rows)
    builder = StoreBuilder(store)
    for key, count in shard_rows.items():
        builder.ensure_teacher(key, card(key, TOKENS, DIM), dtype="float16", shard_rows=count)
    parts = len(os.sched_getaffinity(0))
    options = {"store": str(store), "keys": list(shard_rows), "parts": parts}
    for process in [fresh.start("fill", part=part, **options) for part in range(parts)]:
        fresh.result(process)
    return planned


def index(store: Path) -> None:
    """What an extraction ends with, and one that is killed does not come to."""
    StoreBuilder(store).index()
