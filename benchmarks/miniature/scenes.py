"""Where things stand: camera, light, ground, and objects that are placed in the picture first and in depth after.

Coordinates are the camera's: x to the right, y down, z forward, in metres; the camera looks down at a flat ground. An
object is drawn as a place in the picture, an apparent size and a depth, each for itself, and floats wherever that puts
it; one in three stands on the ground instead, where its place says its depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from .plan import MOST, Plan
from .solids import LOWEST, SHAPES

SIDE = 96
"""Of a picture, in pixels."""
NEAREST, FARTHEST = 2.5, 10.0
SMALLEST, LARGEST = 8.0, 17.0
"""Apparent radius of an object's ball, in pixels."""
HAZE = 0.08, 0.16
_TRIES, _EACH = 48, 5
_SCENE = 32
UNIFORMS = _SCENE + MOST * (2 + _TRIES * _EACH)
"""Random numbers that a scene takes."""


@dataclass
class Scenes:
    """Scenes side by side, [B]; K = `MOST` places for objects, of which the first `count` are taken. float32."""

    placed: np.ndarray
    """bool [B]: whether all its objects found a place; nothing else is of meaning where not."""
    count: np.ndarray
    """int64 [B]."""
    kind: np.ndarray
    """int64 [B, K]."""
    centre: np.ndarray
    """[B, K, 3]."""
    radius: np.ndarray
    """[B, K], of the ball around it."""
    yaw: np.ndarray
    """[B, K]."""
    focal: np.ndarray
    """[B], pixels."""
    height: np.ndarray
    """[B], of the camera above the ground."""
    pitch: np.ndarray
    """[B], radians down."""
    light: np.ndarray
    """[B, 3], unit, towards it."""
    ambient: np.ndarray
    """[B]."""
    haze: np.ndarray
    """[B]: what a metre of air takes of what is behind it (the attenuation coefficient)."""
    look: np.ndarray
    """[B, 20]: uniform numbers that colours and the ground's pattern are made of."""

    def __len__(self) -> int:
        return len(self.count)

    def take(self, rows: np.ndarray) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def up(self) -> np.ndarray:
        """[B, 3], away from the ground."""
        return np.stack([np.zeros_like(self.pitch), -np.cos(self.pitch), -np.sin(self.pitch)], axis=1)

    @property
    def column(self) -> np.ndarray:
        """[B, K]: where centres are in the picture, in pixels."""
        return SIDE / 2 + self.focal[:, None] * self.centre[..., 0] / self.centre[..., 2]

    @property
    def row(self) -> np.ndarray:
        return SIDE / 2 + self.focal[:, None] * self.centre[..., 1] / self.centre[..., 2]


def place(plans: Sequence[Plan], uniforms: np.ndarray) -> Scenes:
    """Scenes of what the plans name.

    Args:
        uniforms: [B, UNIFORMS], in [0, 1).
    """
    u = uniforms[:, :_SCENE].astype(np.float32)
    focal = _between(u[:, 0], 80, 120)
    height, pitch = _between(u[:, 1], 2.5, 5.0), np.radians(_between(u[:, 2], 12, 32))
    azimuth, elevation = _between(u[:, 3], 0, 2 * np.pi), np.radians(_between(u[:, 4], 40, 75))
    kind = np.zeros((len(plans), MOST), np.int64)
    for row, plan in enumerate(plans):
        kind[row, : len(plan.kinds)] = plan.kinds
    own = uniforms[:, _SCENE:].astype(np.float32).reshape(len(plans), MOST, -1)
    scenes = Scenes(
        placed=np.ones(len(plans), bool),
        count=np.array([len(plan.kinds) for plan in plans]),
        kind=kind,
        centre=np.ones((len(plans), MOST, 3), np.float32),
        radius=np.ones((len(plans), MOST), np.float32),
        yaw=_between(own[:, :, 0], 0, np.pi / 2),
        focal=focal,
        height=height,
        pitch=pitch.astype(np.float32),
        light=np.zeros((len(plans), 3), np.float32),
        ambient=_between(u[:, 5], 0.3, 0.5),
        haze=_between(u[:, 6], *HAZE),
        look=u[:, 8:28],
    )
    right, forward = np.float32([1, 0, 0]), np.cross(scenes.up, np.float32([1, 0, 0]))
    level = np.cos(azimuth)[:, None] * right + np.sin(azimuth)[:, None] * forward
    light = np.cos(elevation)[:, None] * level + np.sin(elevation)[:, None] * scenes.up
    scenes.light = light.astype(np.float32)
    for slot in range(MOST):
        _place_one(scenes, slot, own[:, slot, 1] < 1 / 3, own[:, slot, 2:].reshape(len(plans), _TRIES, _EACH))
    return scenes


def _place_one(scenes: Scenes, slot: int, grounded: np.ndarray, tries: np.ndarray) -> None:
    """The first of the tries [B, _TRIES, 5] that suits, for the objects in one slot."""
    size = _between(tries[..., 2], SMALLEST, LARGEST)
    column = size + tries[..., 0] * (SIDE - 2 * size)
    row = size + tries[..., 1] * (SIDE - 2 * size)
    focal, up = scenes.focal[:, None], scenes.up
    ray = np.stack([(column - SIDE / 2) / focal, (row - SIDE / 2) / focal, np.ones_like(row)], axis=-1)
    drop = -(ray @ up[:, :, None])[..., 0]
    """How far a point of the ray sinks for each metre of depth."""
    lowest = LOWEST[scenes.kind[:, slot] % len(SHAPES)][:, None]
    depth = NEAREST * (FARTHEST / NEAREST) ** tries[..., 3]
    standing = scenes.height[:, None] / np.maximum(drop + lowest * size / focal, 1e-3)
    depth = np.where(grounded[:, None], standing, depth)
    radius, centre = size * depth / focal, ray * depth[..., None]
    above = scenes.height[:, None] - drop * depth
    suits = (depth >= NEAREST) & (depth <= FARTHEST) & (above >= lowest * radius * 0.999)
    for other in range(slot):
        taken = other < scenes.count
        gap = centre - scenes.centre[:, None, other]
        apart = (gap**2).sum(-1) > (radius + scenes.radius[:, None, other]) ** 2
        between = np.hypot(column - scenes.column[:, None, other], row - scenes.row[:, None, other])
        other_size = focal * (scenes.radius[:, other] / scenes.centre[:, other, 2])[:, None]
        suits &= ~taken[:, None] | (apart & (between > 0.8 * (size + other_size)))
    first = suits.argmax(axis=1)
    rows = np.arange(len(scenes))
    scenes.placed &= suits.any(axis=1) | (slot >= scenes.count)
    scenes.centre[:, slot] = centre[rows, first]
    scenes.radius[:, slot] = radius[rows, first]


def _between(uniform: np.ndarray, low: float, high: float) -> np.ndarray:
    return (low + (high - low) * uniform).astype(np.float32)
