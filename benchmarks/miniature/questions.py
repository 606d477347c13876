"""Questions that a scene answers beyond doubt: of what a plan asks for, pairs of objects that differ by a margin.

Margins: a relation needs `APART` pixels between the centres of what is seen of two objects, on the axis asked about;
`DEPTH_RATIO` is between the distances of two objects' centres along the camera's axis, `DISTANCE_RATIO` between those
of two objects from a third. Which pair is asked about is drawn among those for which the shortcuts (the larger, the
lower in the picture, the nearer in the picture) say what the plan wants them to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import KINDS, Plan, another

APART = 12.0
DEPTH_RATIO = 1.3
DISTANCE_RATIO = 1.4
TASKS = ("Count", "Relation", "Depth", "Distance")
"""As CV-Bench calls them."""


@dataclass(frozen=True)
class Facts:
    """Of the objects of one scene, in arrays of one length."""

    names: tuple[str, ...]
    column: np.ndarray
    """Of the middle of what is seen, in pixels; so is `row`."""
    row: np.ndarray
    area: np.ndarray
    """Seen, in pixels."""
    centre: np.ndarray
    """[n, 3], metres, in the camera's frame: the last is the depth."""

    @property
    def left_to_right(self) -> list[int]:
        return [int(i) for i in np.argsort(self.column)]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    task: str
    """One of `TASKS`."""
    text: str
    options: tuple[str, ...]
    letter: int
    """Index of the right option."""
    about: tuple[int, ...]
    """The objects it names, in its order; for a distance, the object that the others are compared by comes first."""


def ask(plan: Plan, facts: Facts, rng: np.random.Generator) -> tuple[Question, ...] | None:
    """One question of each task, or None for a scene in which one of them cannot be asked."""
    relation, depth, distance = _relation(plan, facts, rng), _depth(plan, facts, rng), _distance(plan, facts, rng)
    if relation is None or depth is None or distance is None:
        return None
    return _count(plan), relation, depth, distance


def ask_another(task: str, facts: Facts, rng: np.random.Generator) -> Question | None:
    """A question of a task that no plan foresaw, its answer and what shortcuts say drawn; None where it has none."""
    plan = another(tuple(KINDS.index(name) for name in facts.names), rng)
    if plan is None:
        return None
    if task == "Count":
        return _count(plan)
    return {"Relation": _relation, "Depth": _depth, "Distance": _distance}[task](plan, facts, rng)


def _count(plan: Plan) -> Question:
    counted = plan.counted if plan.counted == "objects" else _plural(plan.counted)
    text = f"How many {counted} are in the image?"
    return Question("Count", text, tuple(map(str, plan.options)), plan.count_letter, ())


def _plural(counted: str) -> str:
    return f"{counted}s" if any(name.endswith(counted) for name in KINDS) else f"{counted} objects"


def _relation(plan: Plan, facts: Facts, rng: np.random.Generator) -> Question | None:
    place = facts.row if plan.vertical else facts.column
    gap = place[None] - place[:, None]  # of the second behind the first
    pair = _drawn(gap >= APART if plan.before else gap <= -APART, rng)
    if pair is None:
        return None
    one, other = (facts.names[i] for i in pair)
    text = (
        f"Considering the relative positions of the {one} and the {other} in the image provided, "
        f"where is the {one} located with respect to the {other}?"
    )
    words = ("above", "below") if plan.vertical else ("left", "right")
    right, wrong = words if plan.before else words[::-1]
    return Question("Relation", text, _lettered(right, wrong, plan.relation_letter), plan.relation_letter, pair)


def _depth(plan: Plan, facts: Facts, rng: np.random.Generator) -> Question | None:
    depth = facts.centre[:, 2]
    fits = depth[None] >= DEPTH_RATIO * depth[:, None]  # the first of the pair is the near one
    fits &= (facts.area[:, None] > facts.area[None]) == plan.near_is_larger
    fits &= (facts.row[:, None] > facts.row[None]) == plan.near_is_lower
    pair = _drawn(fits, rng)
    if pair is None:
        return None
    about = _lettered(*pair, plan.depth_letter)
    one, other = (facts.names[i] for i in about)
    text = f"Which object is closer to the camera taking this photo, the {one} or the {other}?"
    return Question("Depth", text, (one, other), plan.depth_letter, about)


def _distance(plan: Plan, facts: Facts, rng: np.random.Generator) -> Question | None:
    """Triples [n, n, n]: what is compared with, the near one, the far one."""
    between = facts.centre[:, None] - facts.centre[None]
    world = np.sqrt((between**2).sum(-1))
    picture = np.hypot(facts.column[:, None] - facts.column[None], facts.row[:, None] - facts.row[None])
    fits = world[:, None, :] >= DISTANCE_RATIO * world[:, :, None]
    fits &= (picture[:, :, None] < picture[:, None, :]) == plan.near_in_picture
    itself = np.eye(len(facts.names), dtype=bool)
    fits &= ~(itself[:, :, None] | itself[:, None, :] | itself[None])
    triple = _drawn(fits, rng)
    if triple is None:
        return None
    about = (triple[0], *_lettered(triple[1], triple[2], plan.distance_letter))
    reference, one, other = (facts.names[i] for i in about)
    text = (
        "Estimate the real-world distances between objects in this image. "
        f"Which object is closer to the {reference}, the {one} or the {other}?"
    )
    return Question("Distance", text, (one, other), plan.distance_letter, about)


def _drawn(fits: np.ndarray, rng: np.random.Generator) -> tuple[int, ...] | None:
    """The index of one of the true entries; a number is drawn even where there is none."""
    draw, places = rng.random(), np.argwhere(fits)
    return tuple(int(i) for i in places[int(draw * len(places))]) if len(places) else None


def _lettered(right, wrong, letter: int) -> tuple:
    return (wrong, right) if letter else (right, wrong)
