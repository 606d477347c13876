"""How much is measured: `full` for figures to commit, `small` for a look, `toy` for the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Rows of `(tokens, dim)` float16, `shard_rows` to a shard file."""

    key: str
    tokens: int
    dim: int
    shard_rows: int

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.dim * 2

    def __str__(self) -> str:
        return f"{self.key} {self.tokens} x {self.dim} float16, {self.shard_rows} rows a shard"


@dataclass(frozen=True)
class Work:
    """What is done with one shape. Reading is of a store of `stored` shards."""

    shape: Shape
    committed: int  # shards a round
    stored: int  # shards
    read: int  # rows a round, warm
    read_cold: int
    formats: int  # shards that every format writes and reads
    formats_read: int  # rows a round

    def __post_init__(self) -> None:
        assert max(self.read, self.read_cold) <= self.stored * self.shape.shard_rows
        assert self.formats_read <= self.formats * self.shape.shard_rows


@dataclass(frozen=True)
class Size:
    depth: Work
    gen: Work
    rounds: int
    fresh_rounds: int  # fresh processes
    memory_rows: int  # read at random
    batch: int
    open_rows: int
    open_shard_rows: dict[str, int]
    growth_rows: tuple[int, ...]
    growth_shard_rows: tuple[int, int]  # for all sizes, and for the smallest once more

    @property
    def works(self) -> tuple[Work, Work]:
        return self.depth, self.gen


_DEPTH, _GEN = Shape("depth", 576, 1024, 128), Shape("gen", 1, 1024, 4096)
_THREE = {"depth": 128, "seg": 128, "gen": 4096}

SIZES = {
    "toy": Size(
        depth=Work(Shape("depth", 16, 64, 8), 2, 4, 32, 16, 2, 16),
        gen=Work(Shape("gen", 1, 64, 32), 2, 4, 96, 32, 2, 64),
        rounds=2,
        fresh_rounds=1,
        memory_rows=40,
        batch=8,
        open_rows=600,
        open_shard_rows={"depth": 16, "seg": 16, "gen": 256},
        growth_rows=(200, 400),
        growth_shard_rows=(64, 8),
    ),
    "small": Size(
        depth=Work(_DEPTH, 1, 2, 256, 128, 1, 128),
        gen=Work(_GEN, 2, 4, 8192, 1024, 2, 1024),
        rounds=5,
        fresh_rounds=3,
        memory_rows=1000,
        batch=32,
        open_rows=50_000,
        open_shard_rows=_THREE,
        growth_rows=(50_000, 100_000, 200_000),
        growth_shard_rows=(4096, 128),
    ),
    "full": Size(
        depth=Work(_DEPTH, 2, 8, 1024, 512, 2, 256),
        gen=Work(_GEN, 8, 16, 32768, 4096, 4, 4096),
        rounds=7,
        fresh_rounds=5,
        memory_rows=1000,
        batch=32,
        open_rows=558_128,
        open_shard_rows=_THREE,
        growth_rows=(1_000_000, 3_000_000, 10_000_000),
        growth_shard_rows=(4096, 128),
    ),
}
