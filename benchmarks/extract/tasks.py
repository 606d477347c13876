"""Work for fresh processes, see `driver.py`; each prints its figures as one line of JSON."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from time import perf_counter

from olavlm.cache import StoreBuilder, pending
from olavlm.pipelines.extraction.blocks import plan_blocks

from ..cache.fresh import Peak

WORKERS = 8


def list_shards(store: str, cards: dict[str, dict], shard_rows: dict[str, int]) -> dict:
    """Open a store that has a plan, make its teachers, list their shards and divide them."""
    peak, marks = Peak(), [perf_counter()]
    builder = StoreBuilder(store)
    groups = [
        builder.ensure_teacher(key, card, dtype="float16", shard_rows=shard_rows[key]) for key, card in cards.items()
    ]
    marks.append(perf_counter())
    tasks = [task for group in groups for task in pending(group)]
    marks.append(perf_counter())
    blocks = plan_blocks(tasks, WORKERS)
    marks.append(perf_counter())
    assert sum(map(len, blocks)) == len(tasks)
    opened, listed, divided = (b - a for a, b in pairwise(marks))
    return {"open s": opened, "list s": listed, "divide s": divided, "all s": marks[-1] - marks[0], "all MB": peak.mb()}


TASKS = {"list": list_shards}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
