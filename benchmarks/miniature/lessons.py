"""What small vision models are taught: pictures of the world, rendered into memory, with what is true of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from .plan import KINDS, MOST, placement_uniforms, plan_of
from .questions import TASKS, Question
from .render import BACKGROUND, GROUND, render
from .scenes import NEAREST, SIDE, UNIFORMS, place
from .world import Picture, stream

CLASSES = (*KINDS, *BACKGROUND)
"""By class of a pixel."""
THIRDS = 3
GRID = 8
"""Patches in a row or a column of all networks that see."""
PIECE = 4


@dataclass
class Lessons:
    """N pictures, side by side."""

    rgb: np.ndarray
    """uint8 [N, 3, SIDE, SIDE]."""
    closeness: np.ndarray
    """float16 [N, SIDE, SIDE]: `NEAREST` over the depth in metres, so that 1 is where objects begin; 0 in the sky."""
    classes: np.ndarray
    """uint8 [N, SIDE, SIDE], indices into `CLASSES`."""
    present: np.ndarray
    """bool [N, kinds]."""
    said: np.ndarray
    """int64 [N, MOST]: 1 + kind * THIRDS + third of the picture, from left to right, of each object; 0 for none."""
    objects: np.ndarray
    """uint8 [N, SIDE, SIDE], see `render`."""
    depth_questions: list[Question]

    def __len__(self) -> int:
        return len(self.rgb)

    def first(self, count: int) -> Lessons:
        return Lessons(*(getattr(self, field.name)[:count] for field in fields(self)))


def lessons(seed: int, start: int, count: int, processes: int | None = None) -> Lessons:
    """Lessons of the pictures `start` to `start + count` of a world."""
    return gathered(list(stream(seed, start, count, processes)))


@dataclass
class Alone:
    """N pictures of one object each."""

    rgb: np.ndarray
    """uint8 [N, 3, SIDE, SIDE]."""
    present: np.ndarray
    """bool [N, kinds]."""
    patches: np.ndarray
    """int64 [N, PIECE * PIECE]: those around the object, of `GRID` x `GRID`."""


def objects_alone(seed: int, start: int, count: int) -> Alone:
    """Pictures that show the first object of each of these plans and nothing else."""
    plans = [plan_of(seed, index) for index in range(start, start + count)]
    plans = [replace(plan, kinds=plan.kinds[:1]) for plan in plans]
    uniforms = np.stack([placement_uniforms(seed, index, 0, UNIFORMS) for index in range(start, start + count)])
    scenes = place(plans, uniforms)
    rows = np.flatnonzero(scenes.placed)  # all but a few
    scenes = scenes.take(rows)
    first = [np.round(at[:, 0] * GRID / SIDE - PIECE / 2) for at in (scenes.row, scenes.column)]
    first = [np.clip(at, 0, GRID - PIECE).astype(np.int64) for at in first]
    down, across = (at[:, None] + np.arange(PIECE) for at in first)
    return Alone(
        rgb=render(scenes).rgb.transpose(0, 3, 1, 2),
        present=np.stack([np.isin(np.arange(len(KINDS)), plans[row].kinds) for row in rows]),
        patches=(down[:, :, None] * GRID + across[:, None]).reshape(len(rows), -1),
    )


def gathered(pictures: Sequence[Picture]) -> Lessons:
    return Lessons(
        rgb=np.stack([p.rgb.transpose(2, 0, 1) for p in pictures]),
        closeness=np.stack([NEAREST / p.depth for p in pictures]).astype(np.float16),
        classes=np.stack([_classes(p) for p in pictures]),
        present=np.stack([np.isin(np.arange(len(KINDS)), p.kinds) for p in pictures]),
        said=np.array([_said(p) for p in pictures]),
        objects=np.stack([p.objects for p in pictures]),
        depth_questions=[p.questions[TASKS.index("Depth")] for p in pictures],
    )


def _classes(picture: Picture) -> np.ndarray:
    table = np.zeros(MOST + 2, np.uint8)
    table[: len(picture.kinds)] = picture.kinds
    table[GROUND:] = len(KINDS), len(KINDS) + 1
    return table[picture.objects]


def _said(picture: Picture) -> list[int]:
    thirds = np.clip(picture.facts.column * THIRDS / SIDE, 0, THIRDS - 1).astype(int)
    words = [1 + kind * THIRDS + int(third) for kind, third in zip(picture.kinds, thirds, strict=True)]
    return words + [0] * (MOST - len(words))
