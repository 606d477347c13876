"""Opening a store of LLaVA-558K's size: seconds and memory until three teachers' coverage and one row are there.

In a process that has imported `olavlm.cache` and no more; in one that has opened another, small store before, so that
what is imported late is not counted either; and the latter before the store's records are indexed, as after an
extraction that was killed.
"""

from __future__ import annotations

from pathlib import Path

from ..figures import Measurement
from . import fresh
from .sizes import Size
from .tiny_store import index, make

MUST = {"all s": 1.0, "all MB": 200.0}


def measure(size: Size, folder: Path) -> list[Measurement]:
    rows, store, small = size.open_rows, folder / "store", folder / "small"
    make(store, rows, size.open_shard_rows)
    make(small, 10, size.open_shard_rows)
    shards = sum(-(-rows // n) for n in size.open_shard_rows.values())
    title = (
        f"open, coverage of {len(size.open_shard_rows)} teachers, one read by path; {rows:,} rows, {shards:,} shards"
    )
    index(small)
    no_index = opened(store, rows, size.fresh_rounds, small)
    index(store)
    values = {
        "olavlm.cache imported": opened(store, rows, size.fresh_rounds),
        "a small store opened before": opened(store, rows, size.fresh_rounds, small),
        "the same, no index": no_index,
    }
    return [Measurement(title, values, limits=MUST)]


def opened(store: Path, rows: int, rounds: int, before: Path | None = None) -> dict[str, list[float]]:
    """What `tasks.open_store` finds, once a round, after one that is not kept."""
    options = {"store": str(store), "row": rows // 3, "rows": rows, "before": before and str(before)}
    found = [fresh.run("open", **options) for _ in range(rounds + 1)]
    return {column: [round(figures[column], 5) for figures in found[1:]] for column in found[0]}
