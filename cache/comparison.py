"""Two rows beside each other: how much alike each teacher finds two images.

    >>> FeatureStore("features").compare("coco/000001.jpg", "coco/000002.jpg")["depth"].cosine
    0.8312

A row that is quarantined, missing or damaged is said to be, and the other teachers are compared all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import CacheError
from .preview import row_and_image, why
from .wording import printable

if TYPE_CHECKING:
    from .features import TeacherFeatures
    from .store import FeatureStore


@dataclass(frozen=True, eq=False)
class Agreement:
    """What one teacher says of two images, A and B. A number is NaN where it has no meaning: no features, or zeros."""

    key: str
    problems: tuple[str | None, str | None]
    """Why A and why B has no features to compare, None where it has."""
    tokens: tuple[np.ndarray | None, np.ndarray | None] = field(repr=False)
    """(tokens, dim) float32 of A and of B, None where there is a problem."""
    grid: Sequence[int] | None = field(repr=False)
    cosine: float = math.nan
    """Of the whole rows, all tokens as one vector."""
    token_cosine: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    """(tokens,) float64: each token of A with the token of B at the same place."""
    relative_difference: float = math.nan
    """L2 norm of B - A over that of A."""
    norms: tuple[float, float] = (math.nan, math.nan)
    """L2 norms of the whole rows."""

    @property
    def problem(self) -> str | None:
        """Both problems in one line; None if there is none."""
        a, b = self.problems
        if a == b:
            return a
        return "; ".join(f"{letter} {problem}" for letter, problem in (("A", a), ("B", b)) if problem)

    @property
    def mean(self) -> float:
        """The mean cosine of a token, over those that are not zero in A or B."""
        known = self.token_cosine[~np.isnan(self.token_cosine)]
        return float(known.mean()) if len(known) else math.nan

    @property
    def worst(self) -> float:
        """The lowest cosine of a token."""
        return math.nan if self.worst_token is None else float(self.token_cosine[self.worst_token])

    @property
    def worst_token(self) -> int | None:
        known = ~np.isnan(self.token_cosine)
        return int(np.nanargmin(self.token_cosine)) if known.any() else None

    @classmethod
    def of(cls, store: FeatureStore, key: str, rows: Sequence[int]) -> Agreement:
        """Never raises for what is quarantined, missing or damaged: `problems` says it."""
        try:
            features = store[key]
            grid = features.card.get("grid")
        except (CacheError, OSError) as e:
            return cls(key, (why(e), why(e)), (None, None), None)
        (a, problem_a), (b, problem_b) = (_read(features, row) for row in rows)
        norms = tuple(math.nan if x is None else float(np.linalg.norm(x.astype(np.float64))) for x in (a, b))
        if a is None or b is None:
            return cls(key, (problem_a, problem_b), (a, b), grid, norms=norms)
        x, y = a.astype(np.float64), b.astype(np.float64)
        products = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        return cls(
            key,
            (None, None),
            (a, b),
            grid,
            cosine=_cosine(float(np.vdot(x, y)), norms[0] * norms[1]),
            token_cosine=np.array([_cosine(*pair) for pair in zip((x * y).sum(axis=1), products, strict=True)]),
            relative_difference=float(np.linalg.norm(y - x)) / norms[0] if norms[0] else math.nan,
            norms=norms,
        )

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return ", ".join(f"{name} {value}" for name, value in self.figures())

    def figures(self) -> list[tuple[str, str]]:
        """The numbers, named and rounded, to be shown."""
        figures = [("cosine", f"{self.cosine:.4f}")]
        if self.worst_token is not None and len(self.token_cosine) > 1:
            figures += [
                ("tokens' mean", f"{self.mean:.4f}"),
                (f"worst (token {self.worst_token})", f"{self.worst:.4f}"),
            ]
        figures += [("relative L2 difference", f"{self.relative_difference:.4f}")]
        return figures + [(f"norm of {letter}", f"{norm:.5g}") for letter, norm in zip("AB", self.norms, strict=True)]


def _read(features: TeacherFeatures, row: int) -> tuple[np.ndarray | None, str | None]:
    try:
        return features[row], None
    except (CacheError, OSError) as e:
        return None, why(e)


def _cosine(product: float, norms: float) -> float:
    return min(1.0, max(-1.0, product / norms)) if norms else math.nan


@dataclass(frozen=True, eq=False)
class Comparison(Mapping[str, Agreement]):
    """Two plan rows, A and B, by teacher: `comparison["depth"].cosine`. In a notebook it shows itself."""

    store: FeatureStore = field(repr=False)
    rows: tuple[int, int]
    images: tuple[str, str]
    teachers: dict[str, Agreement]

    def __getitem__(self, key: str) -> Agreement:
        return self.teachers[key]

    def __iter__(self):
        return iter(self.teachers)

    def __len__(self) -> int:
        return len(self.teachers)

    def __repr__(self) -> str:
        a, b = (f"row {row} ({printable(image)})" for row, image in zip(self.rows, self.images, strict=True))
        lines = [f"  {key}: {printable(str(agreement))}" for key, agreement in self.items()]
        return "\n".join([f"Comparison of A, {a}, with B, {b}", *(lines or ["  the store has no teachers"])])

    def _repr_html_(self) -> str:
        from .display import comparison_html

        return comparison_html(self)


def compare(store: FeatureStore, row_a: str | int, row_b: str | int) -> Comparison:
    """How each teacher's features of two rows or image paths agree; MissingFeatures if one is not in the plan."""
    (a, name_a), (b, name_b) = row_and_image(store, row_a), row_and_image(store, row_b)
    agreements = {key: Agreement.of(store, key, (a, b)) for key in store.teachers}
    return Comparison(store, (a, b), (name_a, name_b), agreements)
