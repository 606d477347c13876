"""How much is measured: `full` are the paper's shapes, `small` is for a look, `toy` for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Case:
    """A micro-batch of one task."""

    task: str
    tokens: int
    dim: int
    layers: int
    rows: int
    negatives: int
    """Targets of the whole batch, the rows' own among them."""
    dtype: str

    def __str__(self) -> str:
        return f"{self.task} {self.tokens} x {self.dim}, {self.dtype} targets"

    @property
    def prediction_bytes(self) -> int:
        return self.layers * self.rows * self.tokens * self.dim * 4

    @property
    def target_bytes(self) -> int:
        item = {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        return self.negatives * self.tokens * (self.dim * item + 4 * (self.dtype == "int8"))

    @property
    def bytes(self) -> int:
        return self.prediction_bytes + self.target_bytes


@dataclass(frozen=True)
class Size:
    shapes: dict[str, tuple[int, int]]
    """Tokens and width by task."""
    rows: int
    negatives: int
    rounds: int
    fresh_rounds: int
    layers: int = 2
    """Of each task, as in the paper."""
    dtypes: tuple[str, ...] = ("float32", "float16", "int8")
    """Of the targets; predictions are float32, as a LayerNorm gives them under autocast."""

    @property
    def cases(self) -> list[Case]:
        found = product(self.shapes.items(), self.dtypes)
        return [Case(t, *shape, self.layers, self.rows, self.negatives, dtype) for (t, shape), dtype in found]


SIZES = {
    "full": Size({"gen": (1, 1024), "depth": (576, 1024), "seg": (576, 1536)}, 16, 256, rounds=5, fresh_rounds=1),
    "small": Size({"gen": (1, 1024), "depth": (64, 1024), "seg": (64, 1536)}, 16, 256, rounds=5, fresh_rounds=1),
    "toy": Size({"depth": (4, 16)}, 2, 4, rounds=1, fresh_rounds=1, dtypes=("int8",)),
}
