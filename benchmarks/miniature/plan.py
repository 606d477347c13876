"""What a picture is to show and to ask, before anything is placed: dealt in blocks, so that answers are balanced.

A block of `BLOCK` pictures holds each combination of a question's answer, its letter and what a shortcut would say
equally often, in an order drawn from (seed, block): the plan of picture i is a function of (seed, i) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .solids import SHAPES

BLOCK = 48
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Names of objects, by kind = colour * len(SHAPES) + shape."""
FEWEST, MOST = 3, 6

_KIND, _COUNT, _RELATION, _DEPTH, _DISTANCE, _PLACE = range(6)
"""Streams of random numbers of a seed."""


@dataclass(frozen=True)
class Plan:
    """Of one picture. A letter is the index of the right option."""

    kinds: tuple[int, ...]
    """Distinct, one an object."""
    counted: str
    """What is counted: `objects`, or a shape or a colour."""
    options: tuple[int, ...]
    """Numbers offered, in their order."""
    count_letter: int
    vertical: bool
    """Whether the relation is above or below, not left or right."""
    before: bool
    """Whether the object asked about is on the left, or above."""
    relation_letter: int
    near_is_larger: bool
    near_is_lower: bool
    depth_letter: int
    near_in_picture: bool
    """Whether the object nearer in the world is the one nearer in the picture, too."""
    distance_letter: int

    @property
    def count(self) -> int:
        return self.options[self.count_letter]


def plan_of(seed: int, index: int) -> Plan:
    """The plan of picture `index` of the world `seed`."""
    block, place = divmod(index, BLOCK)

    def dealt(stream: int, combinations: int) -> int:
        return int(_deal(seed, block, stream)[place]) % combinations

    rng = np.random.default_rng([seed, index, _KIND])
    asked = dealt(_COUNT, BLOCK)  # 3 kinds of question x 4 numbers x 4 letters
    what, number, letter = asked % 3, asked // 3 % 4, asked // 12
    fewest = FEWEST if what == 0 else 1
    others = [n for n in range(fewest, fewest + 4) if n != fewest + number]
    others = [others[i] for i in rng.permutation(3)]
    options = (*others[:letter], fewest + number, *others[letter:])
    counted, kinds = _kinds(what, fewest + number, rng)
    relation, depth, distance = dealt(_RELATION, 8), dealt(_DEPTH, 8), dealt(_DISTANCE, 4)
    return Plan(
        kinds=kinds,
        counted=counted,
        options=options,
        count_letter=letter,
        vertical=bool(relation & 1),
        before=bool(relation & 2),
        relation_letter=relation >> 2,
        near_is_larger=bool(depth & 1),
        near_is_lower=bool(depth & 2),
        depth_letter=depth >> 2,
        near_in_picture=bool(distance & 1),
        distance_letter=distance >> 1,
    )


def another(kinds: tuple[int, ...], rng: np.random.Generator) -> Plan | None:
    """What else might be asked of objects of these kinds, every answer drawn evenly; None where the count of what is
    drawn is not among the four numbers that are offered."""
    chosen = kinds[rng.integers(len(kinds))]
    shape, colour = chosen % len(SHAPES), chosen // len(SHAPES)
    counted, count, fewest = (
        ("objects", len(kinds), FEWEST),
        (SHAPES[shape], sum(kind % len(SHAPES) == shape for kind in kinds), 1),
        (COLOURS[colour], sum(kind // len(SHAPES) == colour for kind in kinds), 1),
    )[rng.integers(3)]
    options = tuple(int(number) for number in fewest + rng.permutation(4))
    drawn = rng.integers(2, size=8).tolist()
    vertical, before, near_is_larger, near_is_lower, near_in_picture = map(bool, drawn[:5])
    if count not in options:
        return None
    return Plan(
        kinds=kinds,
        counted=counted,
        options=options,
        count_letter=options.index(count),
        vertical=vertical,
        before=before,
        relation_letter=drawn[5],
        near_is_larger=near_is_larger,
        near_is_lower=near_is_lower,
        depth_letter=drawn[6],
        near_in_picture=near_in_picture,
        distance_letter=drawn[7],
    )


def _kinds(what: int, count: int, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """What is counted, and kinds of which exactly `count` are of it."""
    order = rng.permutation(len(KINDS))
    if what == 0:
        return "objects", tuple(int(kind) for kind in order[:count])
    total = int(rng.integers(max(FEWEST, count), MOST + 1))
    if what == 1:
        chosen = int(rng.integers(len(SHAPES)))
        name, matching = SHAPES[chosen], order % len(SHAPES) == chosen
    else:
        chosen = int(rng.integers(len(COLOURS)))
        name, matching = COLOURS[chosen], order // len(SHAPES) == chosen
    kinds = np.concatenate([order[matching][:count], order[~matching][: total - count]])
    return name, tuple(int(kind) for kind in rng.permutation(kinds))


@lru_cache(maxsize=64)
def _deal(seed: int, block: int, stream: int) -> np.ndarray:
    return np.random.default_rng([seed, block, stream, BLOCK]).permutation(BLOCK)


def placement_uniforms(seed: int, index: int, attempt: int, size: int) -> np.ndarray:
    """Random numbers of [0, 1) for an attempt at placing what the plan names, float64 [size]."""
    return np.random.default_rng([seed, index, _PLACE, attempt]).random(size)
