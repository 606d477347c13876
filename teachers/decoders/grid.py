"""Tokens as a square map."""

from __future__ import annotations

import math

import torch

from olavlm.teachers.errors import TeacherError


def square_grid(features: torch.Tensor, dim: int, name: str) -> int:
    """The side g of the square that tokens [B, g * g, dim], row-major, form.

    Raises:
        TeacherError: not such a tensor, of another width, or not finite.
    """
    if features.ndim != 3 or features.shape[-1] != dim:
        raise TeacherError(
            f"features of shape {tuple(features.shape)}: the decoder of {name} takes (B, tokens, {dim}); give it "
            "features of the same checkpoint"
        )
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1] or not side:
        raise TeacherError(f"{features.shape[1]} tokens form no square, which the decoder of {name} takes them for")
    if not torch.isfinite(features).all():
        raise TeacherError(f"features of {name} that are not finite cannot be decoded; leave that row out")
    return side
