"""Which shards a worker is given together: those of several teachers over the same rows, so that every image is read
and decoded once for all of them.

The teacher with the largest shards leads: a gen shard of 4096 rows takes the 32 depth and 32 seg shards of its rows
along. That is the cheapest division, and on a small job too coarse to be shared evenly; then the teachers with the
largest shards go on their own, and the others join by the next shard size.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence

from olavlm.cache import ShardTask

BLOCKS_A_WORKER = 4  # with fewer, the last worker to finish keeps the others waiting

Block = tuple[ShardTask, ...]
"""Shards that are extracted together."""


def plan_blocks(tasks: Sequence[ShardTask], num_workers: int) -> list[Block]:
    """Divide `tasks` into blocks for `num_workers` (1 or more): every task once, those with most rows first.

    As few blocks as there are with every worker getting `BLOCKS_A_WORKER`; when no division gives so many, the finest
    that still joins shards of one size, or, when that leaves a worker with nothing, a block a shard.
    """
    rows: dict[str, int] = {}
    for task in tasks:
        rows[task.key] = max(rows.get(task.key, 0), task.num_rows)
    blocks: list[Block] = []
    for largest_joined in sorted(set(rows.values()), reverse=True):
        alone = [(task,) for task in tasks if rows[task.key] > largest_joined]
        blocks = alone + _joined((task for task in tasks if rows[task.key] <= largest_joined), rows)
        if len(blocks) >= BLOCKS_A_WORKER * num_workers:
            break
    if len(blocks) < num_workers:
        blocks = [(task,) for task in tasks]
    return sorted(blocks, key=lambda block: _order(block[0], rows))


def _joined(tasks: Iterable[ShardTask], rows: Mapping[str, int]) -> list[Block]:
    """Every task with the one of larger shards, or of another teacher with as large ones, that holds its first row."""
    starts: list[int] = []
    blocks: dict[int, list[ShardTask]] = {}
    for task in sorted(tasks, key=lambda task: _order(task, rows)):
        at = bisect_right(starts, task.start) - 1
        if at >= 0 and task.start < blocks[starts[at]][0].stop:
            blocks[starts[at]].append(task)
        else:
            insort(starts, task.start)
            blocks[task.start] = [task]
    return [tuple(block) for block in blocks.values()]


def _order(task: ShardTask, rows: Mapping[str, int]) -> tuple:
    return -rows[task.key], task.start, task.key
