"""Features of one photograph, of several layers, decoded to be put side by side (figures 6 to 8 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from olavlm.teachers.decoders import Decoder


@dataclass(frozen=True)
class Drawn:
    """Decoded features as pictures."""

    pictures: dict[str, Image.Image]
    """RGB, by the name of what gave the features; without what is not finite."""
    legend: Image.Image | None
    """What the colours mean."""


def draw(decoder: Decoder, features: Mapping[str, np.ndarray], photograph: Image.Image, *, side: int = 280) -> Drawn:
    """Decode features of one photograph, such as a target and what some layers predict.

    Each depth map spans the colours by itself; a class has the same colour everywhere.

    Args:
        features: by name, each (tokens, dim) float.
        photograph: what they are of; a decoder that reads it is given it no larger than `side` squared.
        side: of a picture, at most, in pixels.

    Raises:
        TeacherError: features that are not of the decoder's checkpoint.
    """
    small = photograph.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    finite = {name: np.asarray(values, np.float32) for name, values in features.items() if np.isfinite(values).all()}
    maps = {}
    if finite:
        stacked = torch.from_numpy(np.stack(list(finite.values())))
        maps = dict(zip(finite, decoder.decode(stacked, [small] * len(finite)), strict=True))
    pictures = {}
    for name, decoded in maps.items():
        picture = decoder.picture(decoded)
        if not decoder.needs_images:  # a square, of a photograph that was squashed or cropped to one
            picture = picture.resize((side, side), Image.Resampling.BILINEAR)
        pictures[name] = picture
    return Drawn(pictures, decoder.legend(list(maps.values()), side) if maps else None)
