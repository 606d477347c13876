"""What is compared: the formulas with PyTorch's own functions, in float32, and the project's losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from olavlm.student.losses.embedding import MAX_SCALE, embedding_loss_sums
from olavlm.student.losses.scaled_features import Features, ScaledFeatures

from .sizes import Case

CONTRASTIVE_WEIGHT = 0.3
PLAIN, SHARED, FUSED, TRITON = "plain", "plain, targets normalised once", "fused", "fused, Triton"

Losses = tuple[torch.Tensor, torch.Tensor]
"""Smooth-L1 and contrastive, (layers,) each."""


@dataclass
class Inputs:
    """Of one micro-batch, on a device; every row has a target."""

    sources: list[torch.Tensor]
    targets: Features
    labels: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> Inputs:
        """Random, the same for the same case: targets with a few large channels, as teachers have them."""
        generator = torch.Generator(device).manual_seed(17)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        targets = normal(case.negatives, case.tokens, case.dim).mul_(1 + 4 * (normal(case.dim) > 2))
        sources = [normal(case.rows, case.tokens, case.dim).requires_grad_() for _ in range(case.layers)]
        if case.dtype == "int8":
            scales = targets.abs().amax(dim=-1) / 127
            targets = ScaledFeatures(targets.div_(scales[..., None]).round_().to(torch.int8), scales)
        else:
            targets = targets.to(getattr(torch, case.dtype))
        labels = torch.arange(case.rows, device=device) + (case.negatives - case.rows) // 2
        return cls(sources, targets, labels, torch.tensor(2.0, device=device, requires_grad=True))

    def in_float64(self) -> Inputs:
        """The same values, for a reference."""
        sources = [source.detach().double().requires_grad_() for source in self.sources]
        return Inputs(sources, self.targets, self.labels, self.scale.detach().double().requires_grad_())

    def predictions(self) -> list[torch.Tensor]:
        """Fresh ones that are part of a graph, as a model's are."""
        return [source * 1 for source in self.sources]


def arms(device: str) -> dict[str, Callable[[Inputs, Sequence[torch.Tensor]], Losses]]:
    """By name; the last is what training runs on the device."""
    found = {PLAIN: partial(plain, share=False), SHARED: partial(plain, share=True), FUSED: partial(fused, "eager")}
    if device == "cuda" and find_spec("triton") is not None:
        found[TRITON] = partial(fused, "triton")
    return found


def fused(kernels: str, inputs: Inputs, predictions: Sequence[torch.Tensor]) -> Losses:
    targets = inputs.targets
    valid = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    rows = valid[: len(inputs.labels)]
    sums = embedding_loss_sums(
        predictions, targets, inputs.labels, rows, valid, inputs.scale, kernels=kernels, overwrite=True
    )
    return tuple(s / len(inputs.labels) for s in sums)


def plain(inputs: Inputs, predictions: Sequence[torch.Tensor], *, share: bool) -> Losses:
    """As one would write it, and as the public code has it: each layer's loss widens and normalises the targets.

    Args:
        share: once for all layers.
    """
    dtype = predictions[0].dtype
    negatives = _normalised(inputs.targets, dtype) if share else None
    own = inputs.targets[inputs.labels].float().to(dtype)
    smooth_l1, contrastive = [], []
    for prediction in predictions:
        smooth_l1.append(F.smooth_l1_loss(prediction, own))
        others = _normalised(inputs.targets, dtype) if negatives is None else negatives
        cosines = F.normalize(prediction.flatten(1), dim=1) @ others.T
        logits = cosines * inputs.scale.exp().clamp(max=MAX_SCALE)
        contrastive.append(F.cross_entropy(logits, inputs.labels))
    return torch.stack(smooth_l1), torch.stack(contrastive)


def _normalised(targets: Features, dtype: torch.dtype) -> torch.Tensor:
    return F.normalize(targets.float().to(dtype).flatten(1), dim=1)


def total(losses: Losses) -> torch.Tensor:
    smooth_l1, contrastive = losses
    return (smooth_l1 + CONTRASTIVE_WEIGHT * contrastive).sum()
