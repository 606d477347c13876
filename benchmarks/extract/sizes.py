"""How much is measured: `full` for figures to commit, `small` for a look, `toy` for the tests; and on which device.

A picture costs a core of a CPU 7 s (DINOv2-L), 6 s (ViT-H) or 20 s (Swin-L), so few are enough there; a GPU has to be
kept busy for some seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from ..cache.sizes import Shape


@dataclass(frozen=True)
class Pass:
    """One network and the rows that it sees in a round."""

    architecture: str
    batch: int
    rows: int
    shard_rows: int

    def __post_init__(self) -> None:
        assert not self.rows % self.shard_rows
        assert not self.shard_rows % self.batch  # the last batch is padded: work that the floor has not


@dataclass(frozen=True)
class Free:
    """Shards a round of a teacher that costs nothing."""

    shape: Shape
    shards: int


@dataclass(frozen=True)
class Together:
    """Three teachers over the same rows, one shard of each a block."""

    architectures: tuple[str, str, str]
    batch: int
    rows: int
    shard_rows: int


@dataclass(frozen=True)
class Same:
    """Features of one network got in different ways."""

    architecture: str
    rows: int
    shard_rows: int
    batches: tuple[int, ...]
    """The first is what the others are compared with."""
    workers: tuple[int, ...] = ()
    """For each, an extraction at the first batch size by so many workers, each with so many threads."""


@dataclass(frozen=True)
class Size:
    forwards: tuple[Pass, ...]
    rounds: int
    frees: tuple[Free, ...]
    free_rounds: int
    photographs: int
    publics: tuple[Together, ...]
    sames: tuple[Same, ...]
    driver_rows: tuple[int, ...]
    device: str = "cpu"
    compute_dtype: str = "float32"

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def threads(self) -> int:
        """That prepare images: the cores that the forward leaves, or all of them beside a GPU."""
        return self.cores if self.device == "cuda" else max(1, self.cores - 1)


_DEPTH, _SEG, _GEN = Shape("depth", 576, 1024, 128), Shape("seg", 576, 1536, 128), Shape("gen", 1, 1024, 4096)
_TINY = ("depth-tiny", "seg-tiny", "gen-tiny")
_SMALL = ("depth-small", "seg-small", "gen-small")
_LARGE = ("depth-large", "seg-large", "gen-large")
_EQUAL = tuple(Same(name, 24, 4, (4, 1, 16), (1, 2, 3)) for name in _TINY)

_CPU = {
    "toy": Size(
        forwards=tuple(Pass(name, 2, 4, 2) for name in _TINY),
        rounds=2,
        frees=(Free(Shape("depth", 16, 64, 8), 2), Free(Shape("gen", 1, 64, 32), 2)),
        free_rounds=2,
        photographs=2,
        publics=(Together(_TINY, 2, 4, 2),),
        sames=tuple(Same(name, 6, 2, (2, 1, 4), (1, 2)) for name in _TINY),
        driver_rows=(500, 1000),
    ),
    "small": Size(
        forwards=tuple(Pass(name, 2, 4, 4) for name in _SMALL),
        rounds=3,
        frees=(Free(_DEPTH, 2), Free(_SEG, 2), Free(_GEN, 2)),
        free_rounds=5,
        photographs=16,
        publics=(Together(_SMALL, 2, 4, 4),),
        sames=_EQUAL,
        driver_rows=(50_000, 100_000),
    ),
    "full": Size(
        forwards=(
            Pass("depth-large", 1, 3, 3),
            Pass("seg-large", 1, 2, 2),
            Pass("gen-large", 1, 3, 3),
            Pass("depth-small", 2, 16, 8),
            Pass("seg-small", 2, 8, 4),
            Pass("gen-small", 2, 16, 8),
        ),
        rounds=3,
        frees=(Free(_DEPTH, 4), Free(_SEG, 4), Free(_GEN, 8)),
        free_rounds=7,
        photographs=64,
        publics=(Together(_SMALL, 4, 8, 4), Together(_LARGE, 1, 1, 1)),
        sames=(*_EQUAL, *(Same(name, 2, 2, (2, 1, 4)) for name in _LARGE)),
        driver_rows=(558_128, 3_000_000),
    ),
}

_CUDA = {
    "toy": _CPU["toy"],
    "small": replace(
        _CPU["small"],
        forwards=tuple(Pass(name, 64, 512, 128) for name in _SMALL),
        publics=(Together(_SMALL, 32, 256, 128),),
    ),
    "full": replace(
        _CPU["full"],
        forwards=(
            Pass("depth-large", 64, 1024, 128),
            Pass("seg-large", 32, 512, 128),
            Pass("gen-large", 128, 2048, 512),
            Pass("depth-small", 64, 1024, 128),
            Pass("seg-small", 32, 512, 128),
            Pass("gen-small", 128, 2048, 512),
        ),
        rounds=5,
        publics=(Together(_SMALL, 32, 256, 128), Together(_LARGE, 32, 256, 128)),
        sames=(*_EQUAL, *(Same(name, 4, 2, (2, 1, 16), (1, 2)) for name in _LARGE)),
    ),
}

NAMES = tuple(_CPU)


def size_of(name: str, device: str) -> Size:
    """`device` is cpu or cuda."""
    if device == "cpu":
        return _CPU[name]
    return replace(_CUDA[name], device=device, compute_dtype="bfloat16")
