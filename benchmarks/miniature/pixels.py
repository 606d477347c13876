"""Pixels as networks are given them, a batch at a time; resizing is Pillow's but for rounding (at most one level)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def pixels(rgb: np.ndarray, side: int, mean: Sequence[float], std: Sequence[float], device: str) -> torch.Tensor:
    """uint8 [B, 3, s, s] to float32 [B, 3, side, side], normalised."""
    x = torch.from_numpy(np.ascontiguousarray(rgb)).to(device).float()
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).round_().clamp_(0, 255)
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
    return x.div_(255).sub_(mean).div_(std)


def mirrored(rng: np.random.Generator, *arrays: np.ndarray) -> list[np.ndarray]:
    """Each sample from left to right with a chance of one half, all arrays [B, ..., columns] alike."""
    turn = rng.random(len(arrays[0])) < 0.5
    return [np.where(turn.reshape(-1, *[1] * (a.ndim - 1)), a[..., ::-1], a) for a in arrays]
