"""The passes of the embedding losses in plain PyTorch, on any device: the oracle of other kernels, and their fall-back.

Predictions and targets are widened a few tokens at a time, into buffers that stay in a CPU's cache: beside these,
at most some 20 MB, nothing is allocated. Each pass reads and widens the targets once, for all predictions together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .scaled_features import Features, ScaledFeatures

_CHUNK_ELEMENTS = {"cpu": 3 * 2**20}
"""Elements that are widened at once, by device type.

So few that they stay in a CPU's last cache; fewer would make its threads, which wait for each other after each
operation, wait the more on a machine that does other work too.
"""
_CHUNK_ELEMENTS_ELSEWHERE = 2**24  # where a kernel's launch is what costs
_LEAST_CHUNKS = 8
"""Chunks that the tokens are cut into at least, so that in a small batch, too, buffers are smaller than what they hold
a part of."""


def forward_pass(
    predictions: Sequence[torch.Tensor],
    targets: Features,
    labels: torch.Tensor,
    valid_rows: torch.Tensor,
    valid_targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What both losses need of predictions and targets; rows that are not valid are taken for zeros.

    Args:
        predictions: k tensors (b, n, D).
        targets: (m, n, D).
        labels: long (b,), each prediction's own target.
        valid_rows: bool (b,).
        valid_targets: bool (m,).

    Returns:
        smooth-L1 summed over the features of a row (k, b), meaningless where the row is not valid; dot products
        (k, b, m); squared norms of predictions (k, b) and of targets (m,). All in the compute dtype.
    """
    k, b, m = len(predictions), len(predictions[0]), len(targets)
    # Sums over chunks are few numbers: in float64, how many chunks there are does not show in them.
    new = {"dtype": torch.float64, "device": predictions[0].device}
    smooth_l1, p_square = torch.zeros(k, b, **new), torch.zeros(k, b, **new)
    dots, t_square = torch.zeros(k * b, m, **new), torch.zeros(m, **new)
    for _, p, t in _chunks(predictions, targets, valid_rows, valid_targets):
        dots += torch.mm(p.flatten(0, 1), t.T)
        p_square += torch.linalg.vector_norm(p, dim=-1).square_()
        t_square += torch.linalg.vector_norm(t, dim=-1).square_()
        own = t.index_select(0, labels).expand_as(p)
        smooth_l1 += F.smooth_l1_loss(p, own, reduction="none").sum(dim=-1)
    dtype = compute_dtype(predictions[0])
    return smooth_l1.to(dtype), dots.view(k, b, m).to(dtype), p_square.to(dtype), t_square.to(dtype)


def backward_pass(
    predictions: Sequence[torch.Tensor],
    targets: Features,
    labels: torch.Tensor,
    valid_rows: torch.Tensor,
    valid_targets: torch.Tensor,
    along_error: torch.Tensor,
    along_targets: torch.Tensor,
    along_itself: torch.Tensor,
    gradients: Sequence[torch.Tensor],
) -> None:
    """Writes along_error · clamp(p - own target, ±1) + along_targets · targets - along_itself · p to `gradients`.

    Args:
        along_error, along_itself: (k, b).
        along_targets: (k, b, m), 0 for targets that are not valid.
        gradients: k tensors shaped as `predictions`; they may be `predictions`, which are then written over.
    """
    along_targets = along_targets.flatten(0, 1)
    for tokens, p, t in _chunks(predictions, targets, valid_rows, valid_targets):
        gradient = torch.mm(along_targets, t).view_as(p)
        error = (p - t.index_select(0, labels)).clamp_(-1, 1)
        gradient.addcmul_(error, along_error[..., None]).addcmul_(p, along_itself[..., None], value=-1)
        for place, found in zip(gradients, gradient, strict=True):
            part = place[:, tokens]
            part.copy_(found.view(part.shape))


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float32, or float64 where that is what is given."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(
    predictions: Sequence[torch.Tensor], targets: Features, valid_rows: torch.Tensor, valid_targets: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Runs of tokens, with predictions (k, b, w) and targets (m, w) of them; the same memory serves every run."""
    _, n, dim = targets.shape
    dtype, device = compute_dtype(predictions[0]), predictions[0].device
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    rows = len(targets) + len(predictions) * len(predictions[0])
    width = max(1, min(-(-n // _LEAST_CHUNKS), elements // max(1, rows * dim)))
    p_memory = torch.empty(len(predictions) * len(predictions[0]) * width * dim, dtype=dtype, device=device)
    t_memory = torch.empty(len(targets) * width * dim, dtype=dtype, device=device)
    keep_rows, keep_targets = (_bits(valid, dtype)[:, None] for valid in (valid_rows, valid_targets))
    for start in range(0, n, width):
        tokens = slice(start, min(n, start + width))
        count = tokens.stop - start
        t = t_memory[: len(targets) * count * dim].view(-1, count, dim)
        if isinstance(targets, ScaledFeatures):
            t.copy_(targets.values[:, tokens]).mul_(targets.scales[:, tokens, None])
        else:
            t.copy_(targets[:, tokens])
        t = t.flatten(1)
        t.view(keep_targets.dtype).bitwise_and_(keep_targets)
        p = p_memory[: len(predictions) * len(predictions[0]) * count * dim].view(len(predictions), -1, count, dim)
        for place, prediction in zip(p, predictions, strict=True):
            place.copy_(prediction[:, tokens])
        p = p.flatten(2)
        p.view(keep_rows.dtype).bitwise_and_(keep_rows)
        yield tokens, p, t


def _bits(valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All ones or all zeros, in integers as wide as `dtype`: `and` with them makes a zero of anything, NaN included.

    It is ten times as fast as `where` or `masked_fill_` on a CPU, and needs no synchronisation on a GPU.
    """
    return -valid.to(torch.int64 if dtype == torch.float64 else torch.int32)
