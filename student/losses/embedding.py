"""The losses as pure functions: sums over rows, which the caller divides by whole-batch counts.

A sum divided by a count that spans ranks and accumulation steps makes any split of a batch give the same gradients.
Arithmetic is in float32 (float64 for float64 inputs), whatever the dtype of predictions and targets and also under
autocast.

Source: arXiv 2412.09585, predictive embedding losses.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from olavlm.student.choices import Kernels

from .eager import compute_dtype
from .fused import smooth_l1_and_cosines
from .scaled_features import Features

MAX_SCALE = 100.0
"""Upper bound of exp(logit_scale), as in CLIP."""


def embedding_loss_sums(
    predictions: Sequence[torch.Tensor],
    targets: Features,
    labels: torch.Tensor,
    valid_rows: torch.Tensor,
    valid_targets: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    kernels: Kernels = "eager",
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over valid rows of the smooth-L1 and of the contrastive loss of several layers' predictions.

    Smooth-L1 (beta 1) is a row's mean. The contrastive loss is the cross-entropy that picks a prediction's own target
    among all targets by the cosine of whole flattened samples, multiplied by min(exp(logit_scale), 100).

    Args:
        predictions: k tensors (b, n, D) of one float dtype: those of a task's layers, which share their targets.
        targets: (m, n, D), any float dtype, or int8 with scales: those of the whole batch, which may be larger than b.
        labels: long (b,), the row of `targets` that belongs to each prediction.
        valid_rows: bool (b,). Other rows do not count.
        valid_targets: bool (m,). Other targets are no negatives, and may hold anything, NaN included; a row whose own
            target is not valid does not count.
        logit_scale: scalar parameter s.
        kernels: what computes it, see `fused.smooth_l1_and_cosines`.
        overwrite: the gradient takes the place of the predictions, as told there.

    Returns:
        smooth-L1 and contrastive, each (k,), float32, with a graph to `predictions` and, the second, to `logit_scale`;
        exactly 0 without a valid row.

    Raises:
        ValueError: shapes that differ, a leaf that is to be overwritten, or kernels that cannot run here.
    """
    for prediction in predictions:
        if prediction.shape[1:] != targets.shape[1:] or prediction.shape != predictions[0].shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and targets {tuple(targets.shape)} differ in shape")
    valid_rows = valid_rows & valid_targets[labels]
    smooth_l1, cosines = smooth_l1_and_cosines(
        predictions, targets, labels, valid_rows, valid_targets, kernels=kernels, overwrite=overwrite
    )
    logits = cosines * logit_scale.to(cosines.dtype).exp().clamp(max=MAX_SCALE)  # [k, b, m]
    logits = logits.masked_fill(~valid_targets, -torch.inf)
    # A row that does not count becomes zeros, which keep its cross-entropy, and so its gradient, finite.
    logits = torch.where(valid_rows[:, None], logits, 0.0)
    wanted = labels.expand(len(predictions), -1)
    per_row = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(smooth_l1)
    return smooth_l1.sum(dim=1), torch.where(valid_rows, per_row, 0.0).sum(dim=1)


def text_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of next-token cross-entropies over labelled positions, already shifted and gathered.

    Args:
        logits: (positions, vocabulary), any float dtype.
        labels: long (positions,).

    Returns:
        float32 scalar; exactly 0, with a graph, without a position.
    """
    return F.cross_entropy(logits.to(compute_dtype(logits)), labels, reduction="sum")
