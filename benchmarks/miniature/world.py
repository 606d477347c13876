"""The pictures of a world: scenes tried until they show enough of every object and answer what their plan asks.

Picture i of the world `seed` is a function of (seed, i) alone, whatever is made beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from .plan import KINDS, MOST, Plan, placement_uniforms, plan_of
from .questions import Facts, Question, ask
from .render import BATCH, Pictures, render
from .scenes import UNIFORMS, Scenes, place

LEAST_PIXELS, LEAST_SHARE = 36, 0.5
"""Of an object that are seen; the share is of what would be if nothing stood before it."""
_ATTEMPTS = 400
_ASK = 99


@dataclass(frozen=True)
class Picture:
    """One accepted scene with its picture."""

    index: int
    rgb: np.ndarray
    """uint8 [SIDE, SIDE, 3]."""
    depth: np.ndarray
    """float32 [SIDE, SIDE], metres along the camera's axis, infinite in the sky."""
    objects: np.ndarray
    """uint8 [SIDE, SIDE]: the object seen, or `render.GROUND` or `render.SKY`."""
    kinds: tuple[int, ...]
    facts: Facts
    questions: tuple[Question, ...]
    """One of each of `questions.TASKS`, in that order."""


def pictures(seed: int, indices: Sequence[int]) -> list[Picture]:
    """The pictures of these indices, in their order. RuntimeError if one finds no scene, which none is known to."""
    return _attempts(seed, indices, _seen)


def described_scenes(seed: int, indices: Sequence[int]) -> list[tuple[Facts, tuple[Question, ...]]]:
    """Facts and questions of scenes that nobody sees, by the same plans: what text alone is made of."""
    return _attempts(seed, indices, lambda seed, tried: {one.index: (one.facts, one.questions) for one in tried})


@dataclass(frozen=True)
class _Tried:
    """A scene that is placed, and answers its plan by what is known before it is seen."""

    index: int
    attempt: int
    plan: Plan
    scenes: Scenes
    row: int
    facts: Facts
    questions: tuple[Question, ...]


def _attempts(seed: int, indices: Sequence[int], accept: Callable[[int, list[_Tried]], dict[int, Any]]) -> list:
    """What `accept` makes of each index, which is tried again until it does."""
    plans, accepted = {index: plan_of(seed, index) for index in indices}, {}
    for attempt in range(_ATTEMPTS):
        pending = [index for index in plans if index not in accepted]
        if not pending:
            return [accepted[index] for index in indices]
        for first in range(0, len(pending), BATCH):
            tried = _try(seed, {index: plans[index] for index in pending[first : first + BATCH]}, attempt)
            accepted.update(accept(seed, tried) if tried else {})
    raise RuntimeError(f"picture {pending[0]} of world {seed}: no scene in {_ATTEMPTS} attempts answers its plan")


def _try(seed: int, plans: dict[int, Plan], attempt: int) -> list[_Tried]:
    uniforms = np.stack([placement_uniforms(seed, index, attempt, UNIFORMS) for index in plans])
    scenes, tried = place(list(plans.values()), uniforms), []
    for row, (index, plan) in enumerate(plans.items()):
        if scenes.placed[row]:
            facts = _described(scenes, row)
            if (asked := ask(plan, facts, _rng(seed, index, attempt))) is not None:
                tried.append(_Tried(index, attempt, plan, scenes, row, facts, asked))
    return tried


def _described(scenes: Scenes, row: int) -> Facts:
    """Facts of a scene that is not rendered: centres as they are projected, areas of the balls."""
    n = scenes.count[row]
    size = scenes.focal[row] * scenes.radius[row, :n] / scenes.centre[row, :n, 2]
    names = tuple(KINDS[kind] for kind in scenes.kind[row, :n])
    return Facts(names, scenes.column[row, :n], scenes.row[row, :n], size**2, scenes.centre[row, :n])


def _seen(seed: int, tried: list[_Tried]) -> dict[int, Picture]:
    rendered = render(tried[0].scenes.take(np.array([one.row for one in tried])))
    found = {one.index: _accept(seed, one, rendered, row) for row, one in enumerate(tried)}
    return {index: picture for index, picture in found.items() if picture is not None}


def stream(
    seed: int, start: int, count: int, processes: int | None = None, chunk: int = 4 * BATCH
) -> Iterator[Picture]:
    """Pictures `start` to `start + count` in order, made by several processes."""
    parts = [(seed, range(i, min(i + chunk, start + count))) for i in range(start, start + count, chunk)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(parts))
    if processes <= 1:
        for part in parts:
            yield from pictures(*part)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for made in pool.map(pictures, *zip(*parts, strict=True)):
            yield from made


def _accept(seed: int, tried: _Tried, seen: Pictures, row: int) -> Picture | None:
    """The picture, if it shows enough of every object and, by what is seen of them, answers its plan."""
    plan, objects, n = tried.plan, seen.objects[row], len(tried.plan.kinds)
    area = np.bincount(objects.ravel(), minlength=MOST + 2)[:n]
    if (area < LEAST_PIXELS).any() or (area < LEAST_SHARE * seen.whole[row, :n]).any():
        return None
    rows, columns = np.indices(objects.shape)
    middle = [np.bincount(objects.ravel(), weights=axis.ravel(), minlength=n)[:n] / area for axis in (columns, rows)]
    facts = Facts(tried.facts.names, *middle, area, tried.facts.centre)
    asked = ask(plan, facts, _rng(seed, tried.index, tried.attempt))
    if asked is None:
        return None
    return Picture(tried.index, seen.rgb[row], seen.depth[row], objects, plan.kinds, facts, asked)


def _rng(seed: int, index: int, attempt: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, attempt, _ASK])
