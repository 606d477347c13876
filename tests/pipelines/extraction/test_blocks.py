"""The division of an extraction into blocks, by hand-made cases."""

import random

import pytest

from olavlm.cache import ShardTask
from olavlm.pipelines.extraction.blocks import plan_blocks

SIZES = {"gen": 4096, "depth": 128, "seg": 128}


def tasks(rows: int, sizes: dict[str, int] = SIZES) -> list[ShardTask]:
    """Every shard of every teacher over so many rows."""
    return [
        ShardTask(key, start // size, start, min(start + size, rows), "plan")
        for key, size in sizes.items()
        for start in range(0, rows, size)
    ]


def names(blocks) -> list[list[str]]:
    return [[f"{t.key}{t.shard}" for t in block] for block in blocks]


def test_a_large_shard_takes_along_those_of_its_rows():
    blocks = plan_blocks(tasks(4096 * 8), 2)  # 8 blocks are 4 a worker
    assert [len(block) for block in blocks] == [1 + 32 + 32] * 8
    for number, block in enumerate(blocks):
        assert block[0].key == "gen"
        assert {t.start // 4096 for t in block} == {number}


def test_too_few_blocks_for_the_workers_and_the_large_shards_go_on_their_own():
    blocks = plan_blocks(tasks(4096 * 8), 3)  # 8 blocks would be less than 4 a worker
    assert [len(block) for block in blocks] == [1] * 8 + [2] * 256
    assert {block[0].key for block in blocks[:8]} == {"gen"}
    assert all([t.key for t in block] == ["depth", "seg"] and block[0].start == block[1].start for block in blocks[8:])


def test_three_sizes_are_divided_no_further_than_need_be():
    sizes = {"a": 16, "b": 8, "c": 4}
    assert names(plan_blocks(tasks(32, sizes), 1)) == [["a0"], ["a1"], ["b0", "c0", "c1"], ["b1", "c2", "c3"],
                                                       ["b2", "c4", "c5"], ["b3", "c6", "c7"]]  # fmt: skip
    assert len(plan_blocks(tasks(64, sizes), 1)) == 4
    assert [len(b) for b in plan_blocks(tasks(32, sizes), 3)] == [1] * (2 + 4 + 8)


def test_where_the_finest_division_leaves_a_worker_idle_every_shard_goes_alone():
    two = tasks(10, {"depth": 128, "seg": 128})
    assert names(plan_blocks(two, 1)) == [["depth0", "seg0"]]
    assert names(plan_blocks(two, 2)) == [["depth0"], ["seg0"]]


def test_what_is_left_of_a_half_done_job():
    """The gen shard of the first rows is committed: depth and seg of these rows lead each other."""
    left = [t for t in tasks(4096 * 9) if t.key != "gen" or t.shard]
    blocks = plan_blocks(left, 2)
    assert [len(block) for block in blocks] == [65] * 8 + [2] * 32
    only_the_short_last_one = [t for t in tasks(4096 + 30) if t.start == 4096]
    assert names(plan_blocks(only_the_short_last_one, 1)) == [["depth32", "gen1", "seg32"]]


def test_shards_that_do_not_divide_each_other():
    blocks = plan_blocks(tasks(1200, {"a": 100, "b": 30}), 1)
    assert len(blocks) == 12
    assert names(blocks)[:2] == [["a0", "b0", "b1", "b2", "b3"], ["a1", "b4", "b5", "b6"]]


@pytest.mark.parametrize("num_workers", [1, 7, 1000])
def test_every_task_once_whatever_the_order(num_workers):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    sizes = {key: draw.choice([1, 3, 8, 64, 128, 4096]) for key in "abcd"}
    given = draw.sample(every := tasks(5000, sizes), len(every) * 2 // 3)
    blocks = plan_blocks(given, num_workers)
    assert sorted((t for block in blocks for t in block), key=str) == sorted(given, key=str)
    assert plan_blocks(draw.sample(given, len(given)), num_workers) == blocks
    assert len(blocks) >= min(num_workers, len(given))


def test_nothing():
    assert plan_blocks([], 3) == []
