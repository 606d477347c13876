"""Teacher features as an int8 store keeps them, on the device: they are widened where they are used, in small parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScaledFeatures:
    """`values * scales`, one scale a token; indexed by rows as a tensor is."""

    values: torch.Tensor
    """int8 (..., n, D)."""
    scales: torch.Tensor
    """float32 (..., n)."""

    def __post_init__(self) -> None:
        if self.values.shape[:-1] != self.scales.shape:
            raise ValueError(
                f"values {tuple(self.values.shape)} and scales {tuple(self.scales.shape)}: one scale a token is wanted"
            )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: int | slice | torch.Tensor) -> ScaledFeatures:
        return ScaledFeatures(self.values[rows], self.scales[rows])

    def float(self) -> torch.Tensor:
        """float32 (..., n, D)."""
        return self.values.float() * self.scales[..., None]


Features = torch.Tensor | ScaledFeatures
"""Rows of teacher features (b, n, D): a tensor of any float dtype, or int8 with scales."""


def joined(parts: Sequence[Features], gather: Callable[[torch.Tensor], torch.Tensor]) -> Features:
    """The rows of all `parts`, in order, of all processes; nothing is widened, and one part alone is not copied.

    Args:
        parts: of one kind and dtype.
        gather: a tensor of this process to that of all, along the first axis.
    """

    def whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return gather(tensors[0] if len(tensors) == 1 else torch.cat(tensors))

    if isinstance(parts[0], ScaledFeatures):
        return ScaledFeatures(whole([part.values for part in parts]), whole([part.scales for part in parts]))
    return whole(parts)
