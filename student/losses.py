"""The losses as pure functions: sums over rows, which the caller divides by whole-batch counts.

A sum divided by a count that spans ranks and accumulation steps makes any split of a batch give the same gradients.
Arithmetic is in float32 (float64 for float64 inputs), whatever the dtype of predictions and targets and also under
autocast. It runs over chunks of feature columns with a hand-written backward, so that beside the gradient of the
predictions no tensor of their size is ever made: a row has up to 884,736 features.

Source: arXiv 2412.09585, predictive embedding losses.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

MAX_SCALE = 100.0
"""Upper bound of exp(logit_scale), as in CLIP."""
_CHUNK_ELEMENTS = 2**20
_MAX_CHUNKS = 32
_NORM_EPS = 1e-12


def smooth_l1_sum(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum over valid rows of the row's mean smooth-L1 (beta 1).

    Args:
        prediction: (b, n, D), any float dtype.
        target: (b, n, D), any float dtype; rows that are not valid may hold anything, NaN included.
        valid: bool (b,).

    Returns:
        float32 scalar with a graph to `prediction`; exactly 0 without a valid row.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return _SmoothL1Rows.apply(prediction.flatten(1), target.detach().flatten(1), valid).sum()


def contrastive_sum(
    prediction: torch.Tensor,
    targets: torch.Tensor,
    labels: torch.Tensor,
    valid_rows: torch.Tensor,
    valid_targets: torch.Tensor,
    logit_scale: torch.Tensor,
) -> torch.Tensor:
    """Sum over valid rows of the cross-entropy that picks a prediction's own target among all targets.

    Similarity is the cosine of whole flattened samples, multiplied by min(exp(logit_scale), 100).

    Args:
        prediction: (b, n, D), any float dtype.
        targets: (m, n, D), any float dtype: those of the whole batch, which may be larger than `prediction`.
        labels: long (b,), the row of `targets` that belongs to each prediction.
        valid_rows: bool (b,). Other rows do not count.
        valid_targets: bool (m,). Other targets are no negatives and may hold anything, NaN included.
        logit_scale: scalar parameter s.

    Returns:
        float32 scalar with a graph to `prediction` and `logit_scale`; exactly 0 without a valid row.
    """
    if prediction.shape[1:] != targets.shape[1:]:
        raise ValueError(f"prediction {tuple(prediction.shape)} and targets {tuple(targets.shape)} differ in shape")
    valid_rows = valid_rows & valid_targets[labels]
    cosine = _Cosine.apply(prediction.flatten(1), targets.detach().flatten(1), valid_rows, valid_targets)
    logits = cosine * logit_scale.to(cosine.dtype).exp().clamp(max=MAX_SCALE)  # [b, m]
    logits = logits.masked_fill(~valid_targets, -torch.inf)
    # A row that does not count becomes zeros, which keep its cross-entropy, and so its gradient, finite.
    logits = torch.where(valid_rows[:, None], logits, 0.0)
    per_row = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(valid_rows, per_row, 0.0).sum()


def text_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of next-token cross-entropies over labelled positions, already shifted and gathered.

    Args:
        logits: (positions, vocabulary), any float dtype.
        labels: long (positions,).

    Returns:
        float32 scalar; exactly 0, with a graph, without a position.
    """
    return F.cross_entropy(logits.to(_compute_dtype(logits)), labels, reduction="sum")


class _SmoothL1Rows(torch.autograd.Function):
    """(b, F), (b, F), bool (b,) -> (b,) mean smooth-L1 of each valid row, 0 for the others."""

    @staticmethod
    def forward(ctx, prediction, target, valid):
        ctx.save_for_backward(prediction, target, valid)
        total = torch.zeros(len(prediction), dtype=_compute_dtype(prediction), device=prediction.device)
        for columns in _column_chunks(prediction):
            error = _masked_difference(prediction, target, valid, columns)
            total += F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").sum(dim=1)
        return total / prediction.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        prediction, target, valid = ctx.saved_tensors
        grad = torch.empty_like(prediction)
        scale = (grad_rows / prediction.shape[1])[:, None]
        for columns in _column_chunks(prediction):
            error = _masked_difference(prediction, target, valid, columns)
            grad[:, columns] = error.clamp_(-1, 1).mul_(scale)
        return grad, None, None


class _Cosine(torch.autograd.Function):
    """(b, F), (m, F), bool (b,), bool (m,) -> (b, m) cosines; 0 in rows and columns that are not valid."""

    @staticmethod
    def forward(ctx, prediction, targets, valid_rows, valid_targets):
        dtype, device = _compute_dtype(prediction), prediction.device
        dots = torch.zeros(len(prediction), len(targets), dtype=dtype, device=device)
        p_square = torch.zeros(len(prediction), 1, dtype=dtype, device=device)
        t_square = torch.zeros(1, len(targets), dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for columns in _column_chunks(prediction, targets):
                p = _masked_columns(prediction, valid_rows, columns, dtype)
                t = _masked_columns(targets, valid_targets, columns, dtype)
                dots += p @ t.T
                p_square += p.square().sum(dim=1)[:, None]
                t_square += t.square().sum(dim=1)[None]
        p_norm, t_norm = (square.sqrt().clamp(min=_NORM_EPS) for square in (p_square, t_square))
        cosine = dots / (p_norm * t_norm)
        ctx.save_for_backward(prediction, targets, valid_rows, valid_targets, cosine, p_norm, t_norm)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cosine):
        prediction, targets, valid_rows, valid_targets, cosine, p_norm, t_norm = ctx.saved_tensors
        dtype = cosine.dtype
        along_targets = grad_cosine / (p_norm * t_norm)  # [b, m]
        along_itself = (grad_cosine * cosine).sum(dim=1, keepdim=True) / p_norm.square()  # [b, 1]
        along_itself = torch.where(p_norm > _NORM_EPS, along_itself, 0.0)
        grad = torch.empty_like(prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            for columns in _column_chunks(prediction, targets):
                p = _masked_columns(prediction, valid_rows, columns, dtype)
                t = _masked_columns(targets, valid_targets, columns, dtype)
                rows = torch.addmm(p.mul_(along_itself), along_targets, t, beta=-1)
                grad[:, columns] = torch.where(valid_rows[:, None], rows, 0.0)
        return grad, None, None, None


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _column_chunks(*tensors: torch.Tensor) -> Iterator[slice]:
    """Slices of the shared column axis: all tensors' rows of a chunk are small, or a 32nd of the whole."""
    rows, columns = sum(len(tensor) for tensor in tensors), tensors[0].shape[1]
    width = max(_CHUNK_ELEMENTS // max(1, rows), -(-columns // _MAX_CHUNKS), 1)
    for start in range(0, columns, width):
        yield slice(start, start + width)


def _masked_columns(tensor: torch.Tensor, valid: torch.Tensor, columns: slice, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(valid[:, None], tensor[:, columns].to(dtype), 0.0)


def _masked_difference(
    prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, columns: slice
) -> torch.Tensor:
    dtype = _compute_dtype(prediction)
    error = prediction[:, columns].to(dtype) - target[:, columns].to(dtype)
    return torch.where(valid[:, None], error, 0.0)
