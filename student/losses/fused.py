"""Smooth-L1 and cosines of predictions with targets as one autograd function: one pass forward, one backward.

The backward needs the softmax over all cosines, and they are known only when all features have been read: so two
passes are the least. Beside small sums nothing is kept between them, and the gradient may be written over the
prediction, so that the losses allocate no tensor of the size of predictions or targets, whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import get_args

import torch
from torch.autograd.function import once_differentiable

from olavlm.student.choices import Kernels

from . import eager
from .eager import compute_dtype
from .scaled_features import Features, ScaledFeatures

_NORM_EPS = 1e-12


def smooth_l1_and_cosines(
    predictions: Sequence[torch.Tensor],
    targets: Features,
    labels: torch.Tensor,
    valid_rows: torch.Tensor,
    valid_targets: torch.Tensor,
    *,
    kernels: Kernels = "eager",
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean smooth-L1 (beta 1) of each prediction with its own target, and its cosine with every target.

    Args:
        predictions: k tensors (b, n, D) of one float dtype, compared with the same targets.
        targets: (m, n, D).
        labels: long (b,), the row of `targets` that belongs to each prediction.
        valid_rows: bool (b,). Others give 0 and get a gradient of 0.
        valid_targets: bool (m,). Others have cosine 0, and may hold anything, NaN included.
        kernels: what runs the two passes: plain PyTorch, or Triton on CUDA.
        overwrite: the backward writes the gradient into the memory of contiguous predictions. Whoever has kept one for
            a later backward gets PyTorch's error of a tensor modified in place; other readers find the gradient there.

    Returns:
        (k, b) and (k, b, m) in float32, or float64 for float64 predictions, with a graph to `predictions`.
    """
    if overwrite and any(prediction.is_leaf and prediction.requires_grad for prediction in predictions):
        raise ValueError("a leaf cannot be overwritten by its gradient; pass overwrite=False")
    passes = choose(kernels, predictions[0])
    scales = targets.scales if isinstance(targets, ScaledFeatures) else None
    values = targets.values if isinstance(targets, ScaledFeatures) else targets.detach()
    return _SmoothL1AndCosines.apply(passes, overwrite, values, scales, labels, valid_rows, valid_targets, *predictions)


def choose(kernels: Kernels, prediction: torch.Tensor) -> ModuleType:
    """The module with `forward_pass` and `backward_pass`. ValueError for kernels that cannot run on the prediction."""
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels are {kernels!r}; use {', '.join(get_args(Kernels))}")
    if kernels == "eager":
        return eager
    if find_spec("triton") is None:
        raise ValueError("kernels are triton, which is not installed; use eager")
    from . import triton_kernels

    single = compute_dtype(prediction) == torch.float32
    if not single or not (prediction.is_cuda or triton_kernels.INTERPRETED):
        raise ValueError(
            f"the Triton kernels take no {prediction.dtype} prediction on {prediction.device}: they compute in float32 "
            "on CUDA (elsewhere with TRITON_INTERPRET=1, slowly); use eager"
        )
    return triton_kernels


class _SmoothL1AndCosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, overwrite, values, scales, labels, valid_rows, valid_targets, *predictions):
        targets = values if scales is None else ScaledFeatures(values, scales)
        with torch.autocast(values.device.type, enabled=False):
            smooth_l1, dots, p_square, t_square = passes.forward_pass(
                predictions, targets, labels, valid_rows, valid_targets
            )
        features = predictions[0][0].numel()
        p_norm, t_norm = (square.sqrt().clamp_(min=_NORM_EPS) for square in (p_square, t_square))
        cosines = dots.div_(p_norm[..., None] * t_norm)
        ctx.save_for_backward(values, scales, labels, valid_rows, valid_targets, cosines, p_norm, t_norm, *predictions)
        ctx.passes, ctx.overwrite, ctx.features = passes, overwrite, features
        return torch.where(valid_rows, smooth_l1 / features, 0.0), cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_smooth_l1, grad_cosines):
        values, scales, labels, valid_rows, valid_targets, cosines, p_norm, t_norm, *predictions = ctx.saved_tensors
        targets = values if scales is None else ScaledFeatures(values, scales)
        # d cos / d p = target / (|p| |target|) - cos p / |p|^2
        weights = torch.where(valid_rows[:, None] & valid_targets, grad_cosines / p_norm[..., None], 0.0)  # [k, b, m]
        along_itself = (weights * cosines).sum(dim=-1) / p_norm
        along_itself = torch.where(p_norm > _NORM_EPS, along_itself, 0.0)
        along_error = torch.where(valid_rows, grad_smooth_l1 / ctx.features, 0.0)
        gradients = [p if ctx.overwrite and p.is_contiguous() else torch.empty_like(p) for p in predictions]
        with torch.autocast(values.device.type, enabled=False):
            ctx.passes.backward_pass(
                predictions, targets, labels, valid_rows, valid_targets, along_error, weights / t_norm, along_itself,
                gradients,
            )  # fmt: skip
        return None, None, None, None, None, None, None, *(gradient.detach() for gradient in gradients)
