"""What an extraction's driver does before the first worker starts: list the shards that lack, and divide them.

Nothing is committed yet, which is when most lacks. Three teachers with the shards that they have by default.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..cache import fresh
from ..cache.payload import card
from ..figures import Measurement
from .arithmetic import TEACHERS, all_shards
from .sizes import Size

SHARD_ROWS = {key: shape.shard_rows for key, shape in TEACHERS.items()}


def measure(size: Size, folder: Path) -> list[Measurement]:
    values, counts = {}, {}
    for rows in size.driver_rows:
        store = folder / str(rows)
        fresh.run("plan", store=str(store), rows=rows)
        cards = {key: card(key, 1, 2) for key in SHARD_ROWS}
        subject = f"{rows:,} rows, {all_shards(rows):,} shards"
        found = [
            fresh.run("list", f"{__package__}.tasks", store=str(store), cards=cards, shard_rows=SHARD_ROWS)
            for _ in range(size.rounds)
        ]
        values[subject] = {column: [round(figures[column], 5) for figures in found] for column in found[0]}
        counts[subject] = rows
        shutil.rmtree(store)
    return [Measurement("listing and dividing the shards of three teachers", values, rows=counts)]
