"""Decoded maps in colours: depth by a colour map, classes by a palette with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = 0.618033988749895  # of the hue circle from one class to the next: neighbours in the list are far apart
_INK, _PAPER = (34, 34, 34), (255, 255, 255)


def depth_picture(depth: np.ndarray) -> Image.Image:
    """A map (rows, columns) in Spectral_r, from its least value, blue, to its largest, red; RGB.

    A constant map is all of the least colour.
    """
    depth = np.asarray(depth, np.float64)
    low, high = float(depth.min()), float(depth.max())
    share = (depth - low) / (high - low) if high > low else np.zeros_like(depth)
    return Image.fromarray(matplotlib.colormaps["Spectral_r"](share, bytes=True)[..., :3])


def depth_legend(width: int) -> Image.Image:
    """The colours of `depth_picture` from far to close, with these words, RGB."""
    font, bar, line = _font(), 14, 18
    sheet = Image.new("RGB", (width, bar + line), _PAPER)
    sheet.paste(depth_picture(np.linspace(0, 1, width)[None]).resize((width, bar), Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(sheet)
    draw.text((0, bar + 2), "far", _INK, font)
    draw.text((width - font.getlength("close"), bar + 2), "close", _INK, font)
    return sheet


def class_colours(count: int) -> np.ndarray:
    """uint8 (count, 3): a colour a class, the same for the same class whatever the count."""
    colours = [
        colorsys.hsv_to_rgb((i * _GOLDEN) % 1, (0.65, 0.45, 0.85)[i % 3], (0.95, 0.75, 0.6)[i // 3 % 3])
        for i in range(count)
    ]
    return np.round(np.array(colours).reshape(count, 3) * 255).astype(np.uint8)


def class_picture(classes: np.ndarray, count: int) -> Image.Image:
    """Class ids (height, width) from 0 to `count` - 1 in their colours, RGB; any other id is white."""
    palette = np.vstack([class_colours(count), np.array([_PAPER], np.uint8)])
    known = (classes >= 0) & (classes < count)
    return Image.fromarray(palette[np.where(known, classes, count)])


def largest_classes(maps: Sequence[np.ndarray], count: int, most: int) -> list[int]:
    """The ids that take most of some maps of classes, the largest first; each map weighs the same, however large."""
    shares = np.zeros(count)
    for classes in maps:
        known = classes[(classes >= 0) & (classes < count)]
        shares += np.bincount(known, minlength=count) / max(1, classes.size)
    ranked = np.argsort(-shares, kind="stable")[:most]
    return [int(i) for i in ranked if shares[i] > 0]


def class_legend(ids: Sequence[int], names: Sequence[str], width: int) -> Image.Image:
    """The colours of some classes with their names, in lines no wider than `width` pixels, RGB."""
    colours, font, line, box = class_colours(len(names)), _font(), 18, 12
    entries = [(i, names[i], box + 5 + font.getlength(names[i]) + 14) for i in ids]
    places, x, y = [], 0.0, 0
    for i, name, length in entries:
        if x and x + length > width:
            x, y = 0.0, y + line
        places.append((i, name, x, y))
        x += length
    sheet = Image.new("RGB", (width, y + line if places else 1), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, name, left, top in places:
        draw.rectangle((left, top + 3, left + box, top + 3 + box), fill=tuple(colours[i].tolist()))
        draw.text((left + box + 5, top + 1), name, _INK, font)
    return sheet


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 12)
