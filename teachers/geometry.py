"""From a picture to the pixels a network sees: frame, resize, crop. All resizing is Pillow's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from olavlm.teachers.errors import TeacherError

GEOMETRIES = ("reference", "square", "pad")

ResizeMode = Literal["short edge", "long edge", "squash"]
HalfPixel = Literal["down", "even"]
"""Where the centre lies when an odd number of pixels is cut: half of it rounded down, as the CLIP image processor does,
or to the even number, as torchvision does, and so timm."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST_SIDE = 8192
"""No picture is made longer than this on the way to its final size, or one that is a pixel wide would fill the memory.
"""


def frame(image: Image.Image, geometry: str, mean: tuple[float, float, float]) -> Image.Image:
    """The part of the picture a teacher is shown, before its own resize.

    Args:
        image: any size, of any mode but float; see `to_rgb`.
        geometry: `reference` leaves the picture as it is; `square` cuts the centre square of the shorter side;
            `pad` pastes it centred on a square of the longer side, shrunk first if that exceeds `LONGEST_SIDE`.
            With `square` or `pad` a teacher sees the frame that a base encoder with the same geometry sees, so that
            their grids are aligned.
        mean: the teacher's pixel mean in [0, 1]; `pad` fills with the integer part of 255 times it.

    Raises:
        TeacherError: an unknown geometry, or a picture of float samples.
    """
    check_geometry(geometry)
    image = to_rgb(image)
    width, height = image.size
    if geometry == "reference" or width == height:
        return image
    if geometry == "square":
        return centre_crop(image, min(width, height))
    if max(width, height) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
        width, height = image.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB, 8 bits a channel; of 16-bit samples the higher 8 bits, where Pillow would clip them to white.

    As a store decodes files. TeacherError for float samples, which have no defined white.
    """
    if image.mode == "F":
        raise TeacherError("picture of mode 'F': float samples have no defined white; scale them to 8 bits first")
    if image.mode.startswith("I"):
        samples = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def check_geometry(geometry: str) -> None:
    """Raises TeacherError for a geometry that is not in `GEOMETRIES`."""
    if geometry not in GEOMETRIES:
        raise TeacherError(f"geometry {geometry!r}: unknown; use one of {', '.join(GEOMETRIES)}")


def squash(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Resize to (side, side) without keeping the aspect ratio."""
    return image.resize((side, side), resample)


def short_edge_crop(
    image: Image.Image,
    side: int,
    *,
    edge: int | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    half: HalfPixel = "down",
) -> Image.Image:
    """Resize the shorter edge to `edge`, by default `side`, then cut the centre square of `side`: the CLIP transform.

    The longer edge is rounded down, half of what is cut as `half` says. Beyond `LONGEST_SIDE` only the part that is
    kept is resized, which differs at most in rounding.
    """
    edge = edge or side
    short, long = min(image.size), max(image.size)
    resized_long = int(edge * long / short)
    width, height = (edge, resized_long) if image.width <= image.height else (resized_long, edge)
    if resized_long <= LONGEST_SIDE:
        return centre_crop(image.resize((width, height), resample), side, half)
    left, top = _margin(width - side, half), _margin(height - side, half)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    return image.resize((side, side), resample, box=box)


def centre_crop(image: Image.Image, side: int, half: HalfPixel = "down") -> Image.Image:
    """The (side, side) square in the middle of a picture at least that large."""
    left, top = _margin(image.width - side, half), _margin(image.height - side, half)
    return image.crop((left, top, left + side, top + side))


def _margin(cut: int, half: HalfPixel) -> int:
    return cut // 2 if half == "down" else round(cut / 2)


def long_edge_fit(
    image: Image.Image,
    side: int,
    *,
    edge: int,
    resample: Image.Resampling,
    fill: tuple[int, int, int],
    half: HalfPixel = "down",
) -> Image.Image:
    """Resize the longer edge to `edge`, then cut, or fill up with the colour `fill`, to the centre square of `side`.

    Half of what is cut is rounded as `half` says, half of what is filled up is rounded down.
    """
    ratio = max(image.size) / edge
    image = image.resize((max(1, round(image.width / ratio)), max(1, round(image.height / ratio))), resample)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, tuple((side - x) // 2 if x < side else -_margin(x - side, half) for x in image.size))
    return canvas


@dataclass(frozen=True)
class Resizing:
    """How a network that is described by a configuration wants its pictures; `str` is the text for a card."""

    mode: ResizeMode
    side: int
    """Of the square input, in pixels."""
    edge: int
    """What `mode` says is resized to this; at least `side`, of which the centre is then cut."""
    resample: Image.Resampling
    fill: tuple[int, int, int] = (0, 0, 0)
    """Beside a picture whose longer edge was fitted."""
    half: HalfPixel = "down"
    """Of what is cut."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """A picture of any size, RGB, as (side, side)."""
        if self.mode == "short edge":
            return short_edge_crop(image, self.side, edge=self.edge, resample=self.resample, half=self.half)
        if self.mode == "long edge":
            return long_edge_fit(
                image, self.side, edge=self.edge, resample=self.resample, fill=self.fill, half=self.half
            )
        return centre_crop(squash(image, self.edge, self.resample), self.side, self.half)

    def __str__(self) -> str:
        text = f"{self.mode} to {self.edge} {self.resample.name.lower()}"
        if self.mode == "long edge":
            text = f"{text}, centred on {self.fill}"
        if self.edge == self.side and self.mode != "short edge":
            return text
        return f"{text}, centre crop {self.side}" + (" rounded to even" if self.half == "even" else "")

    def within(self, geometry: str) -> Resizing:
        """This resizing behind a `frame`: with `square` and `pad` all of the frame is kept, for grids to be aligned."""
        return self if geometry == "reference" else replace(self, mode="squash", edge=self.side)
