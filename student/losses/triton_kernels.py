"""The passes of the embedding losses as Triton kernels, for CUDA; `eager` says what they compute.

Each pass is one kernel that reads predictions and targets once, widens them in registers, and skips rows that are not
valid. Products are float32's own ("ieee"): TF32 would miss the plain formula by 1e-3. Sums over the features are cut
into parts of fixed size that are added in a fixed order, so that a run repeats bit for bit.

Tests run the kernels in Triton's interpreter and compile them for compute capabilities 8.0 and 9.0. They have not been
run, timed or tuned on a GPU yet; `losses.kernels: eager` in a recipe is the way around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .scaled_features import Features, ScaledFeatures

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET was set when this module was imported: the kernels run on a CPU then, step by step."""
BLOCK_TARGETS, BLOCK_FEATURES, WARPS = 32, 64, 8
"""Twice as many targets, or half the warps, and the compiler runs out of registers."""
_MAX_BLOCK_ROWS = 32
_PROGRAMS = 1024
"""That a pass is divided into, about: a few for each multiprocessor of a large GPU."""


def forward_pass(
    predictions: Sequence[torch.Tensor],
    targets: Features,
    labels: torch.Tensor,
    valid_rows: torch.Tensor,
    valid_targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `eager.forward_pass`."""
    found = [_forward(p.contiguous(), targets, labels, valid_rows, valid_targets) for p in predictions]
    smooth_l1, dots, p_square, t_square = zip(*found, strict=True)
    return torch.stack(smooth_l1), torch.stack(dots), torch.stack(p_square), t_square[0]


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
    """As `eager.backward_pass`."""
    for layer, (prediction, gradient) in enumerate(zip(predictions, gradients, strict=True)):
        p = prediction.contiguous()
        out = gradient if gradient.is_contiguous() else torch.empty_like(p)
        values, scales = _parts(targets)
        b, n, dim = p.shape
        rows = _block_rows(b)
        with _on(p.device):
            backward_kernel[triton.cdiv(n * dim, BLOCK_FEATURES), triton.cdiv(b, rows)](
                p, values, scales, labels, valid_rows, valid_targets,
                along_error[layer].contiguous(), along_targets[layer].contiguous(), along_itself[layer].contiguous(),
                out, b, len(values), n * dim, dim,
                HAS_SCALES=isinstance(targets, ScaledFeatures), ROWS=rows, TARGETS=BLOCK_TARGETS,
                FEATURES=BLOCK_FEATURES, num_warps=WARPS,
            )  # fmt: skip
        if out is not gradient:
            gradient.copy_(out)


def _forward(
    p: torch.Tensor, targets: Features, labels: torch.Tensor, valid_rows: torch.Tensor, valid_targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, scales = _parts(targets)
    b, n, dim = p.shape
    m, rows = len(values), _block_rows(b)
    row_blocks, target_blocks = triton.cdiv(b, rows), triton.cdiv(m, BLOCK_TARGETS)
    steps = triton.cdiv(n * dim, BLOCK_FEATURES)
    part_steps = triton.cdiv(steps, max(1, _PROGRAMS // (row_blocks * target_blocks)))
    parts = triton.cdiv(steps, part_steps)
    new = {"dtype": torch.float32, "device": p.device}
    smooth_l1, p_square = torch.empty(parts, b, **new), torch.empty(parts, b, **new)
    dots, t_square = torch.empty(parts, b, m, **new), torch.empty(parts, m, **new)
    with _on(p.device):
        forward_kernel[parts, target_blocks, row_blocks](
            p, values, scales, labels, valid_rows, valid_targets, smooth_l1, dots, p_square, t_square,
            b, m, n * dim, dim, part_steps,
            HAS_SCALES=isinstance(targets, ScaledFeatures), ROWS=rows, TARGETS=BLOCK_TARGETS, FEATURES=BLOCK_FEATURES,
            num_warps=WARPS,
        )  # fmt: skip
    return smooth_l1.sum(dim=0), dots.sum(dim=0), p_square.sum(dim=0), t_square.sum(dim=0)


def _parts(targets: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales; without scales, something that is not read."""
    if isinstance(targets, ScaledFeatures):
        return targets.values.contiguous(), targets.scales.contiguous()
    values = targets.contiguous()
    return values, values


def _block_rows(b: int) -> int:
    return min(_MAX_BLOCK_ROWS, max(16, triton.next_power_of_2(b)))  # `tl.dot` takes no fewer than 16


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def load_rows(values, scales, rows, wanted, columns, features, dim, HAS_SCALES: tl.constexpr):
    """float32 (rows, columns) of flattened samples; zeros in rows that are not wanted, whatever they hold."""
    there = wanted[:, None] & (columns < features)[None, :]
    found = tl.load(values + rows[:, None] * features + columns[None, :], mask=there, other=0.0).to(tl.float32)
    if HAS_SCALES:
        tokens = rows[:, None] * (features // dim) + (columns // dim)[None, :]
        found *= tl.load(scales + tokens, mask=there, other=0.0)
    return found


@triton.jit
def forward_kernel(
    prediction, values, scales, labels, valid_rows, valid_targets, smooth_l1, dots, p_square, t_square,
    b, m, features, dim, part_steps,
    HAS_SCALES: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One part of the features of one block of predictions and one of targets.

    What belongs to predictions alone is left to the programs of the first block of targets, and the other way round.
    """
    part, target_block, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = row_block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    targets = target_block * TARGETS + tl.arange(0, TARGETS).to(tl.int64)
    row_wanted = tl.load(valid_rows + rows, mask=rows < b, other=0) != 0
    target_wanted = tl.load(valid_targets + targets, mask=targets < m, other=0) != 0
    own = tl.load(labels + rows, mask=row_wanted, other=0)
    products = tl.zeros((ROWS, TARGETS), tl.float32)
    p_sum, t_sum = tl.zeros((ROWS,), tl.float32), tl.zeros((TARGETS,), tl.float32)
    error_sum = tl.zeros((ROWS,), tl.float32)
    first = part * part_steps * FEATURES
    for start in range(first, tl.minimum(first + part_steps * FEATURES, features), FEATURES):
        columns = start + tl.arange(0, FEATURES)
        p = load_rows(prediction, prediction, rows, row_wanted, columns, features, dim, False)
        t = load_rows(values, scales, targets, target_wanted, columns, features, dim, HAS_SCALES)
        products = tl.dot(p, tl.trans(t), products, input_precision="ieee")
        if row_block == 0:
            t_sum += tl.sum(t * t, axis=1)
        if target_block == 0:
            p_sum += tl.sum(p * p, axis=1)
            error = p - load_rows(values, scales, own, row_wanted, columns, features, dim, HAS_SCALES)
            size = tl.abs(error)
            error_sum += tl.sum(tl.where(size < 1.0, 0.5 * error * error, size - 0.5), axis=1)
    places = (part.to(tl.int64) * b + rows)[:, None] * m + targets[None, :]
    tl.store(dots + places, products, mask=(rows < b)[:, None] & (targets < m)[None, :])
    if row_block == 0:
        tl.store(t_square + part * m + targets, t_sum, mask=targets < m)
    if target_block == 0:
        tl.store(p_square + part * b + rows, p_sum, mask=rows < b)
        tl.store(smooth_l1 + part * b + rows, error_sum, mask=rows < b)


@triton.jit
def backward_kernel(
    prediction, values, scales, labels, valid_rows, valid_targets, along_error, along_targets, along_itself, gradient,
    b, m, features, dim,
    HAS_SCALES: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of predictions in one block of features, which may be those predictions' memory."""
    columns = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row_wanted = tl.load(valid_rows + rows, mask=rows < b, other=0) != 0
    own = tl.load(labels + rows, mask=row_wanted, other=0)
    found = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, m, TARGETS):
        targets = start + tl.arange(0, TARGETS).to(tl.int64)
        target_wanted = tl.load(valid_targets + targets, mask=targets < m, other=0) != 0
        t = load_rows(values, scales, targets, target_wanted, columns, features, dim, HAS_SCALES)
        there = row_wanted[:, None] & target_wanted[None, :]
        weights = tl.load(along_targets + rows[:, None] * m + targets[None, :], mask=there, other=0.0)
        found = tl.dot(weights, t, found, input_precision="ieee")
    p = load_rows(prediction, prediction, rows, row_wanted, columns, features, dim, False)
    error = p - load_rows(values, scales, own, row_wanted, columns, features, dim, HAS_SCALES)
    slope = tl.where(error > 1.0, 1.0, tl.where(error < -1.0, -1.0, error))  # NaN stays
    found += tl.load(along_error + rows, mask=row_wanted, other=0.0)[:, None] * slope
    found -= tl.load(along_itself + rows, mask=row_wanted, other=0.0)[:, None] * p
    there = (rows < b)[:, None] & (columns < features)[None, :]
    tl.store(gradient + rows[:, None] * features + columns[None, :], found.to(gradient.dtype.element_ty), mask=there)
