"""Scenes to pictures with their truth, ray by ray, in NumPy and many scenes at once.

One ray a pixel; solids (`solids`) on a patterned ground under a sky, one lamp far away, with shadows, in haze.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import MOST
from .scenes import SIDE, Scenes
from .solids import MEET, SHAPES

GROUND, SKY = MOST, MOST + 1
"""In the map of objects, beside 0 to MOST - 1."""
BACKGROUND = ("ground", "sky")
BATCH = 48

_PAINT = np.float32(  # red, green, blue, yellow, purple, black
    [
        [0.82, 0.13, 0.13],
        [0.12, 0.62, 0.20],
        [0.16, 0.30, 0.85],
        [0.90, 0.78, 0.12],
        [0.58, 0.18, 0.68],
        [0.10, 0.10, 0.11],
    ]
)


@dataclass
class Pictures:
    """Pictures with what is true of them."""

    rgb: np.ndarray
    """uint8 [B, SIDE, SIDE, 3]."""
    depth: np.ndarray
    """float32 [B, SIDE, SIDE]: metres along the camera's axis; infinite in the sky."""
    objects: np.ndarray
    """uint8 [B, SIDE, SIDE]: the object seen, or GROUND or SKY."""
    whole: np.ndarray
    """int64 [B, K]: pixels an object would cover if nothing stood before it."""


def render(scenes: Scenes) -> Pictures:
    """Pictures of scenes whose objects are all placed."""
    parts = [_render(scenes.take(np.arange(i, min(i + BATCH, len(scenes))))) for i in range(0, len(scenes), BATCH)]
    return Pictures(*(np.concatenate([getattr(p, name) for p in parts]) for name in Pictures.__annotations__))


def _render(scenes: Scenes) -> Pictures:
    num, pixels = len(scenes), SIDE * SIDE
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5 - SIDE / 2) / scenes.focal[:, None]
    x = np.broadcast_to(grid[:, None, :], (num, SIDE, SIDE)).reshape(num, pixels)
    y = np.broadcast_to(grid[:, :, None], (num, SIDE, SIDE)).reshape(num, pixels)
    up, frames = scenes.up, _frames(scenes)
    drop = -(up[:, 1:2] * y + up[:, 2:3])
    depth = np.where(drop > 1e-4, scenes.height[:, None] / np.maximum(drop, 1e-4), np.float32(np.inf))
    objects = np.where(np.isfinite(depth), GROUND, SKY).astype(np.uint8)
    normal = np.broadcast_to(up[:, None, :], (num, pixels, 3)).copy()
    whole = np.zeros((num, MOST), np.int64)
    length = 1 + x * x + y * y
    for slot in range(MOST):
        centre, radius = scenes.centre[:, slot], scenes.radius[:, slot]
        along = x * centre[:, :1] + y * centre[:, 1:2] + centre[:, 2:]
        reach = (centre**2).sum(1) - radius**2
        near = (along * along > length * reach[:, None]) & (slot < scenes.count)[:, None]
        scene, pixel = np.nonzero(near)
        ray = np.stack([x[scene, pixel], y[scene, pixel], np.ones(len(scene), np.float32)], axis=1)
        t, found = _meet(scenes, frames, slot, scene, np.zeros_like(ray), ray)
        hit = np.isfinite(t)
        whole[:, slot] = np.bincount(scene[hit], minlength=num)
        hit &= t < depth[scene, pixel]
        where = scene[hit], pixel[hit]
        depth[where], objects[where], normal[where] = t[hit], slot, found[hit]
    points = np.stack([x, y, np.ones_like(x)], axis=-1) * np.where(np.isfinite(depth), depth, 0)[..., None]
    lit = np.einsum("bpi,bi->bp", normal, scenes.light)
    lit = np.maximum(lit, 0) * ~_shadows(scenes, frames, points, normal, (lit > 0) & (objects != SKY))
    shade = scenes.ambient[:, None] + (1.05 - scenes.ambient[:, None]) * lit
    colour = np.clip(_paint(scenes, objects, points) * shade[..., None], 0, 1)
    clear = np.exp(-scenes.haze[:, None] * depth)[..., None]
    rgb = ((colour * clear + _sky(scenes, y) * (1 - clear)) * 255 + 0.5).astype(np.uint8)
    shape = (num, SIDE, SIDE)
    return Pictures(rgb.reshape(*shape, 3), depth.reshape(shape), objects.reshape(shape), whole)


def _frames(scenes: Scenes) -> np.ndarray:
    """Axes of the objects as rows, [B, K, 3, 3]: the last is up."""
    up = np.broadcast_to(scenes.up[:, None], (len(scenes), MOST, 3))
    right = np.broadcast_to(np.float32([1, 0, 0]), up.shape)
    forward = np.cross(up, right)
    cos, sin = np.cos(scenes.yaw)[..., None], np.sin(scenes.yaw)[..., None]
    return np.stack([cos * right + sin * forward, cos * forward - sin * right, up], axis=2).astype(np.float32)


def _meet(scenes: Scenes, frames: np.ndarray, slot: int, scene: np.ndarray, o: np.ndarray, d: np.ndarray):
    """Where rays [R, 3], each of the `scene` [R], meet that scene's object in `slot`: t [R], normals [R, 3]."""
    t, normal = np.full(len(scene), np.inf, np.float32), np.zeros_like(d)
    shape = scenes.kind[scene, slot] % len(SHAPES)
    for index, meet in enumerate(MEET):
        rays = np.nonzero(shape == index)[0]
        if not len(rays):
            continue
        axes = (frames[:, slot] / scenes.radius[:, slot, None, None])[scene[rays]]
        start = o[rays] - scenes.centre[scene[rays], slot]
        t[rays], own = meet(_turn(axes, start), _turn(axes, d[rays]))
        back = frames[scene[rays], slot]
        normal[rays] = own[:, :1] * back[:, 0] + own[:, 1:2] * back[:, 1] + own[:, 2:] * back[:, 2]
    return t, normal


def _turn(axes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum("rij,rj->ri", axes, vectors)


def _shadows(scenes: Scenes, frames: np.ndarray, points: np.ndarray, normal: np.ndarray, asked: np.ndarray):
    """bool [B, pixels]: whether something stands between the point and the lamp."""
    dark = np.zeros(asked.shape, bool)
    light = scenes.light
    height = np.einsum("bpi,bi->bp", points, light)
    for slot in range(MOST):
        centre, radius = scenes.centre[:, slot], scenes.radius[:, slot]
        ahead = np.einsum("bi,bi->b", centre, light)[:, None] - height
        apart = [centre[:, None, i] - points[..., i] for i in range(3)]
        near = apart[0] ** 2 + apart[1] ** 2 + apart[2] ** 2 - ahead * ahead < (radius**2)[:, None]
        near &= asked & ~dark & (ahead > -radius[:, None]) & (slot < scenes.count)[:, None]
        scene, pixel = np.nonzero(near)
        start = points[scene, pixel] + 1e-3 * normal[scene, pixel]
        t, _ = _meet(scenes, frames, slot, scene, start, np.ascontiguousarray(light[scene]))
        dark[scene, pixel] = np.isfinite(t)
    return dark


def _paint(scenes: Scenes, objects: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Colours before light, float32 [B, pixels, 3]; of no meaning in the sky."""
    palette = np.concatenate([_PAINT[scenes.kind // len(SHAPES)], np.zeros((len(scenes), 2, 3), np.float32)], axis=1)
    palette = palette * (0.9 + 0.2 * scenes.look[:, :1, None])
    colour = np.take_along_axis(palette, objects.astype(np.int64)[..., None], axis=1)
    ground = objects == GROUND
    colour[ground] = _ground(scenes, points)[ground]
    return colour


def _sky(scenes: Scenes, y: np.ndarray) -> np.ndarray:
    """Nearly grey, in another tint below than above; what is far away fades into it."""
    look = scenes.look
    high = 0.65 + 0.25 * look[:, 1:2] + 0.1 * look[:, 2:5]
    low = np.clip(high + 0.1 * (look[:, 4:7] - 0.5), 0, 1)
    fade = np.clip(y * 2 + 1, 0, 1)[..., None]
    return high[:, None] * (1 - fade) + low[:, None] * fade


def _ground(scenes: Scenes, points: np.ndarray) -> np.ndarray:
    """Two earthy colours in a pattern that goes from waves to tiles, fading where it is finer than a pixel."""
    look = scenes.look[:, 7:]
    forward = np.cross(scenes.up, np.float32([1, 0, 0])).astype(np.float32)
    east, north = points[..., 0], np.einsum("bpi,bi->bp", points, forward)
    angle, waves = np.pi * look[:, :1], 1.5 + 4 * look[:, 1:2] ** 2
    u = waves * (np.cos(angle) * east + np.sin(angle) * north) + 6 * look[:, 2:3]
    v = waves * (0.5 + look[:, 3:4]) * (np.cos(angle) * north - np.sin(angle) * east) + 6 * look[:, 4:5]
    sharp = 0.5 + 8 * look[:, 5:6]
    fine = np.clip(1.5 - np.abs(points[..., 2]) * waves / scenes.focal[:, None] / 0.6, 0, 1)
    wave = np.sin(u) * np.where(look[:, 6:7] < 0.6, np.sin(v), np.float32(1))
    mix = 0.5 + 0.5 * fine * np.tanh(sharp * wave)
    grey = 0.3 + 0.35 * look[:, 7:8]
    one = grey + 0.12 * (look[:, 8:11] - 0.5)
    two = np.clip(one + np.where(look[:, 11:12] < 0.5, -0.16, 0.16), 0, 1)
    return one[:, None] * (1 - mix[..., None]) + two[:, None] * mix[..., None]
