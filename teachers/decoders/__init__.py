"""Features back to what can be looked at: a teacher's own decoder on its features, or on predictions of them.

    from olavlm.teachers.decoders import load_decoder

    decoder = load_decoder("depth", device="cuda")     # or seg, gen; model= a hub id or a local checkpoint
    maps = decoder.decode(features)                    # (B, tokens, dim) -> B float32 maps, larger is closer
    decoder.picture(maps[0]).save("depth.png")

A decoder is loaded from the same checkpoint as the teacher, apart from it and only when asked: no feature depends on
one. Importing this package imports no model library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from olavlm.teachers.errors import TeacherError
from olavlm.teachers.registry import TEACHERS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

__all__ = ["DECODERS", "Decoder", "load_decoder"]


class Decoder(Protocol):
    """Turns a teacher's features into maps, and maps into pictures."""

    name: str
    """Of the teacher, as in `DECODERS`."""
    dim: int
    """Width of the features it takes."""
    needs_images: bool
    """Whether `decode` reads the photographs beside the features."""
    weights_sha256: str
    """Of the files it was loaded from: with the same checkpoint, that of the teacher's card."""

    def decode(self, features: torch.Tensor, images: Sequence[Image.Image] | None = None) -> list[np.ndarray]:
        """Maps of features (B, tokens, dim), float, on any device; one a row.

        depth: float32 (rows, columns), larger is closer. seg: int64 (height, width) of the photograph, classes.
        gen: uint8 (height, width, 3).

        Raises:
            TeacherError: features of another width or number of tokens, or photographs missing.
        """
        ...

    def picture(self, decoded: np.ndarray) -> Image.Image:
        """One of those maps in colours, RGB, of its size."""
        ...

    def legend(self, decoded: Sequence[np.ndarray], width: int) -> Image.Image | None:
        """What the colours of some maps mean, RGB, no wider than `width` pixels; None for pictures."""
        ...


def _depth(**options) -> Decoder:
    from olavlm.teachers.decoders.depth import load_depth_decoder

    return load_depth_decoder(**options)


def _seg(**options) -> Decoder:
    from olavlm.teachers.decoders.seg import load_seg_decoder

    return load_seg_decoder(**options)


def _gen(**options) -> Decoder:
    from olavlm.teachers.decoders.gen import load_gen_decoder

    return load_gen_decoder(**options)


DECODERS: dict[str, Callable[..., Decoder]] = {"depth": _depth, "seg": _seg, "gen": _gen}


def load_decoder(
    name: str,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device = "auto",
    **options,
) -> Decoder:
    """Load the decoder of a teacher.

    Args:
        name: one of `DECODERS`.
        model: hub id or local checkpoint folder; the teacher's own by default.
        revision: branch, tag or commit of a hub repository.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        options: seg's `recipe` (which features it is given) and `context` (what it sees of the photograph).

    Raises:
        TeacherError: no such decoder, a checkpoint without one, or a library that it needs is not installed.
    """
    if name not in DECODERS:
        raise TeacherError(f"decoder {name!r}: unknown; use one of {', '.join(DECODERS)}")
    from olavlm.teachers.base import resolve_device

    chosen = TEACHERS[name].model if model is None else str(model)
    return DECODERS[name](name=name, model=chosen, revision=revision, device=resolve_device(device), **options)
