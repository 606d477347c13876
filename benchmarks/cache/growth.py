"""Plan, open, coverage and one read by path as the rows grow: costs must grow no faster than the rows.

Every process has opened another, small store before, so that what is imported late is not counted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..figures import Measurement
from .opening import opened
from .sizes import Size
from .tiny_store import index, make


def measure(size: Size, folder: Path) -> list[Measurement]:
    every, once = size.growth_shard_rows
    planned, found, counts = {}, {}, {}
    make(folder / "small", 10, {"depth": every})
    index(folder / "small")
    for rows, shard_rows in [*((n, every) for n in size.growth_rows), (size.growth_rows[0], once)]:
        subject = f"{rows:,} rows, {shard_rows} a shard"
        made = make(folder / "store", rows, {"depth": shard_rows})
        index(folder / "store")
        counts[subject] = rows
        planned[subject] = {"all s": [round(made["s"], 5)], "all MB": [made["MB"]]}
        found[subject] = opened(folder / "store", rows, size.fresh_rounds, folder / "small")
        shutil.rmtree(folder / "store")
    return [
        Measurement("making the plan, as the rows grow", planned, rows=counts),
        Measurement("open, coverage, one read by path, as the rows grow", found, rows=counts),
    ]
