"""DA-2K: which of two points is closer to the camera (arXiv 2406.09414), on float depth maps.

`annotations.json` maps an image's path to pairs of points:

    {"images/indoor/x.jpg": [{"point1": [120, 310], "point2": [40, 95], "closer_point": "point1"}], ...}

Points are (row, column) in pixels of the image. In the published file `point1` is always the closer one, so a scorer
that takes a tie for `point1` gives a constant map 100 %: here a tie is wrong. The public code of OLA-VLM rounds maps to
8 bits first, which makes ties, and names files by their basenames, which two scenes may share.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from olavlm.pipelines.cli import JobFailed

TURNS = (
    {"from": "human", "value": "<image>\nDescribe the image."},
    {"from": "gpt", "value": "n"},
)
"""What stands around each picture, in the public code; the answer is a dummy."""


@dataclass(frozen=True)
class Pair:
    """Two points (row, column) of an image, in pixels; `closer` is the closer one."""

    closer: tuple[float, float]
    farther: tuple[float, float]


def read_pairs(file: str | Path) -> dict[str, list[Pair]]:
    """Pairs by image path, from an `annotations.json`.

    Raises:
        JobFailed: not a file of that form, or an image without pairs; names the image.
    """
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as e:
        raise JobFailed(f"{file}: not JSON ({e}); give DA-2K's annotations.json") from None
    if not isinstance(entries, dict) or not entries:
        raise JobFailed(f"{file}: not an object of image paths; give DA-2K's annotations.json")
    return {image: _pairs(items, f"{file}: {image}") for image, items in entries.items()}


def _pairs(items: Any, where: str) -> list[Pair]:
    if not isinstance(items, list) or not items:
        raise JobFailed(
            f"{where}: {items!r} is no list of pairs of points, one at least; give DA-2K's annotations.json"
        )
    return [_pair(item, where) for item in items]


def _pair(item: Mapping[str, Any], where: str) -> Pair:
    names = ("point1", "point2")
    try:
        points = {name: tuple(map(float, item[name])) for name in names}
        closer = item["closer_point"]
        if closer not in names or any(len(point) != 2 for point in points.values()):
            raise ValueError(f"closer_point is {closer!r}")
    except (KeyError, TypeError, ValueError) as e:
        raise JobFailed(
            f"{where}: needs point1 and point2, [row, column], and closer_point, one of them ({e!r})"
        ) from e
    (farther,) = (name for name in names if name != closer)
    return Pair(points[closer], points[farther])


def value_at(depth: np.ndarray, point: tuple[float, float], size: tuple[int, int]) -> float:
    """The value at a pixel of an image of `size` (height, width), after resizing the map to it bilinearly.

    Only that pixel is computed. Pixels are areas: the centre of pixel i lies at i + 0.5 (no corner alignment).

    Raises:
        JobFailed: the point lies outside the image.
    """
    if not all(0 <= x < length for x, length in zip(point, size, strict=True)):
        raise JobFailed(f"point {point} lies outside an image of {size[0]} x {size[1]} pixels; its annotation is wrong")
    cells = []
    for x, length, cells_there in zip(point, size, depth.shape, strict=True):
        place = min(max((x + 0.5) * cells_there / length - 0.5, 0), cells_there - 1)
        low = int(place)
        cells.append((low, min(low + 1, cells_there - 1), place - low))
    (top, bottom, down), (left, right, across) = cells
    upper = depth[top, left] * (1 - across) + depth[top, right] * across
    lower = depth[bottom, left] * (1 - across) + depth[bottom, right] * across
    return float(upper * (1 - down) + lower * down)


def is_right(depth: np.ndarray, pair: Pair, size: tuple[int, int]) -> bool:
    """Whether the map is strictly larger at the closer point; false for a tie and for NaN."""
    return value_at(depth, pair.closer, size) > value_at(depth, pair.farther, size)


def scene_of(image: str) -> str:
    """The folder that the image lies in, such as `indoor`."""
    return PurePosixPath(image).parent.name


@dataclass
class Da2kScore:
    """Counts right answers, image by image."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def add(self, image: str, depth: np.ndarray, pairs: Sequence[Pair], size: tuple[int, int]) -> None:
        """Score a float map (rows, columns), larger is closer, of an image of `size` (height, width)."""
        depth = np.asarray(depth, np.float64)
        self.right[scene_of(image)] += [is_right(depth, pair, size) for pair in pairs]

    def result(self) -> dict[str, Any]:
        """`accuracy` over all pairs (0 to 1), their number, and both for each scene."""
        scenes = {name: _accuracy(answers) for name, answers in sorted(self.right.items())}
        return {**_accuracy([a for answers in self.right.values() for a in answers]), "scenes": scenes}

    @property
    def value(self) -> float:
        return self.result()["accuracy"]


def _accuracy(answers: Sequence[bool]) -> dict[str, Any]:
    return {"accuracy": sum(answers) / len(answers) if answers else float("nan"), "pairs": len(answers)}
