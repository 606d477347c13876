"""The four solids as rays meet them: each inside the unit ball of its own frame, upright along the third axis.

Rays come flat: origins and directions [R, 3], float32, in the solid's frame. A hit is the smallest parameter t > 0 at
which origin + t * direction lies on the surface, with the outward normal there; t is infinite for a miss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Hit = tuple[np.ndarray, np.ndarray]
"""t [R] float32, normals [R, 3] float32 (of no meaning at a miss)."""

SHAPES = ("sphere", "cube", "cylinder", "cone")
BALL = 0.8
CUBE = 1 / np.sqrt(3.0).astype(np.float32)
TUBE, TUBE_HALF = 0.6, 0.8
CONE, CONE_TOP, CONE_BASE = 0.7, 0.9, -0.7

LOWEST = np.array([BALL, CUBE, TUBE_HALF, -CONE_BASE], np.float32)
"""By shape: how far its lowest point lies below the centre of its frame, so that it can stand on the ground."""

_EPSILON = 1e-4
_INFINITE = np.float32(np.inf)


def sphere(o: np.ndarray, d: np.ndarray) -> Hit:
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - BALL**2
    t = _first_root(a, b, c)
    return t, (o + _finite(t)[:, None] * d) / BALL


def cube(o: np.ndarray, d: np.ndarray) -> Hit:
    d = np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
    one, two = (-CUBE - o) / d, (CUBE - o) / d
    near, far = np.minimum(one, two), np.maximum(one, two)
    axis = near.argmax(axis=1)
    enter, leave = near.max(axis=1), far.min(axis=1)
    t = np.where((enter <= leave) & (enter > _EPSILON), enter, _INFINITE)
    normal = np.zeros_like(o)
    rows = np.arange(len(o))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return t, normal


def cylinder(o: np.ndarray, d: np.ndarray) -> Hit:
    a, b = d[:, 0] ** 2 + d[:, 1] ** 2, o[:, 0] * d[:, 0] + o[:, 1] * d[:, 1]
    side = _first_root(a, b, o[:, 0] ** 2 + o[:, 1] ** 2 - TUBE**2)
    side = np.where(np.abs(o[:, 2] + _finite(side) * d[:, 2]) <= TUBE_HALF, side, _INFINITE)
    top = _disc(o, d, TUBE_HALF, TUBE)
    bottom = _disc(o, d, -TUBE_HALF, TUBE)
    t = np.minimum(side, np.minimum(top, bottom))
    normal = (o + _finite(t)[:, None] * d) * np.float32([1 / TUBE, 1 / TUBE, 0])
    return t, _capped(normal, ((top, 1.0), (bottom, -1.0)), t)


def cone(o: np.ndarray, d: np.ndarray) -> Hit:
    slope = CONE / (CONE_TOP - CONE_BASE)
    z, k = CONE_TOP - o[:, 2], slope**2
    a = d[:, 0] ** 2 + d[:, 1] ** 2 - k * d[:, 2] ** 2
    b = o[:, 0] * d[:, 0] + o[:, 1] * d[:, 1] + k * z * d[:, 2]
    c = o[:, 0] ** 2 + o[:, 1] ** 2 - k * z**2
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    a = np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    side = np.full(len(o), _INFINITE, np.float32)
    for t in ((-b - root) / a, (-b + root) / a):  # the mirrored cone above the top is met too, and is no hit
        height = o[:, 2] + t * d[:, 2]
        on = (b * b >= a * c) & (height <= CONE_TOP) & (height >= CONE_BASE) & (t > _EPSILON)
        side = np.where(on & (t < side), t, side)
    base = _disc(o, d, CONE_BASE, CONE)
    t = np.minimum(side, base)
    normal = o + _finite(t)[:, None] * d
    normal[:, 2] = slope * np.hypot(normal[:, 0], normal[:, 1])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    return t, _capped(normal, ((base, -1.0),), t)


MEET: tuple[Callable[[np.ndarray, np.ndarray], Hit], ...] = (sphere, cube, cylinder, cone)
"""In the order of `SHAPES`."""


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one[:, 0] * other[:, 0] + one[:, 1] * other[:, 1] + one[:, 2] * other[:, 2]


def _finite(t: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(t), t, np.float32(0))


def _first_root(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Where a t^2 + 2 b t + c first vanishes; rays start outside."""
    inside = b * b - a * c
    t = (-b - np.sqrt(np.maximum(inside, 0))) / np.maximum(a, np.float32(1e-12))
    return np.where((inside >= 0) & (t > _EPSILON), t, _INFINITE)


def _disc(o: np.ndarray, d: np.ndarray, height: float, radius: float) -> np.ndarray:
    down = np.where(np.abs(d[:, 2]) < 1e-9, np.float32(1e-9), d[:, 2])
    t = (height - o[:, 2]) / down
    x, y = o[:, 0] + t * d[:, 0], o[:, 1] + t * d[:, 1]
    return np.where((x * x + y * y <= radius**2) & (t > _EPSILON), t, _INFINITE)


def _capped(normal: np.ndarray, caps: tuple[tuple[np.ndarray, float], ...], t: np.ndarray) -> np.ndarray:
    """The normals with those of flat ends put in where an end is what was met first."""
    for cap, direction in caps:
        met = np.isfinite(cap) & (cap == t)
        normal[met] = (0, 0, direction)
    return normal
