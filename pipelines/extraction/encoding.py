"""Features to what a store keeps, a batch at a time on the teacher's device: the torch twin of `cache/codec.py`.

What is stored is the same bits as the codec's, in a sixth of the time, and from a GPU only the stored bytes travel. The
three sums that fidelity is made of are in float32 by token; a row that they cannot hold (a value that is not finite,
that overflows, or whose square does) goes through the codec itself on the host, which alone decides what is rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from olavlm.cache.codec import Codec, Fidelity

_PIECE = 2**19  # float32 values that are encoded at a time on the CPU: what its cache holds
_LONGEST_DOT = 8192  # channels; longer ones BLAS would split between threads, and sum in another order
_LEAST, _MOST = 1e-16, 1e30  # of a row's squared norm, for float32 sums to be exact enough
_SMALLEST = 1e-45  # the smallest float32, as in the codec
_TWINS = ("float16", "float32", "int8")  # int4's rotation is the codec's own


@dataclass(frozen=True)
class Encoded:
    """A batch of rows, encoded; on a GPU perhaps not yet computed.

    `features` is float32 [B, tokens, dim] and stays on the device. `parts` is what is stored, by array, and `sums`
    float64 [B, 3]: of each row, with e = row - stored, the sums of row * row, row * e and e * e; not finite where they
    do not tell.
    """

    codec: Codec
    features: torch.Tensor
    parts: dict[str, torch.Tensor]
    sums: torch.Tensor

    def to_host(self) -> Encoded:
        """Begin to copy parts and sums from a GPU to pinned memory, on the current stream."""
        parts = {name: _to_pinned(part) for name, part in self.parts.items()}
        return replace(self, parts=parts, sums=_to_pinned(self.sums))

    def rows(self, count: int) -> tuple[dict[str, np.ndarray], list[str | None], list[Fidelity | None]]:
        """The first `count` rows on the host: the stored parts, why a row is rejected, how faithful it is.

        The parts of a rejected row mean nothing, and it has no fidelity.
        """
        parts = {name: part[:count].numpy() for name, part in self.parts.items()}
        reasons: list[str | None] = [None] * count
        fidelity = [_fidelity(*of_row) for of_row in self.sums[:count].tolist()]
        for i in range(count):
            if fidelity[i] is None:
                stored, reasons[i], fidelity[i] = self.codec.encode(self.features[i].cpu().numpy())
                for name, part in (stored or {}).items():
                    parts[name][i] = part
        return parts, reasons, fidelity


def encode(codec: Codec, features: torch.Tensor, room: dict[str, torch.Tensor] | None = None) -> Encoded:
    """Encode features [B, tokens, dim], float32, on their own device and without waiting for it.

    `room` is where the parts go, those of an earlier batch of this shape that nobody needs any more.
    """
    features = features.contiguous()
    batch, tokens, dim = features.shape
    device = features.device if codec.name in _TWINS else torch.device("cpu")
    parts = room or _room(codec, features.shape, device)
    sums = torch.full((batch, tokens, 3), math.nan, device=device)
    if codec.name in _TWINS:
        by_token = [of_all.flatten(0, 1) for of_all in (features, *parts.values(), sums)]
        step = max(1, _PIECE // dim) if device.type == "cpu" else batch * tokens
        scratch = features.new_empty(2, min(step, batch * tokens), dim)
        for pieces in zip(*(of_all.split(step) for of_all in by_token), strict=True):
            _encode(scratch, *pieces)
    return Encoded(codec, features, parts, sums.sum(1, dtype=torch.float64))


def _room(codec: Codec, shape: torch.Size, device: torch.device) -> dict[str, torch.Tensor]:
    batch, tokens, dim = shape
    dtype = getattr(torch, codec.dtype.name)
    room = {"features": torch.empty(batch, tokens, dim // codec.values_per_item, dtype=dtype, device=device)}
    if codec.has_scales:
        room["scales"] = torch.empty(batch, tokens, device=device)
    return room


def _encode(scratch: torch.Tensor, tokens: torch.Tensor, stored: torch.Tensor, *more: torch.Tensor) -> None:
    """Encode tokens [N, dim] into `stored`; `more` is scales [N], where the codec has them, and sums [N, 3]."""
    *scales, sums = more
    products, error = scratch[:, : len(tokens)]
    if scales:
        largest = torch.abs(tokens, out=products).amax(-1, keepdim=True)
        # Divided by a tensor: CUDA would multiply by the reciprocal of a number.
        scale = (largest / torch.full_like(largest, 127)).clamp_min_(_SMALLEST).where(largest > 0, 0.0)
        scales[0].copy_(scale[:, 0])
        torch.div(tokens, scale, out=products).round_().clamp_(-127, 127).masked_fill_(scale == 0, 0)
        stored.copy_(products)
        error.copy_(stored).mul_(scale)
    else:
        stored.copy_(tokens)
        error.copy_(stored)
    torch.sub(tokens, error, out=error)
    for i, (a, b) in enumerate([(tokens, tokens), (tokens, error), (error, error)]):
        sums[:, i] = _sums(a, b, products)


def _sums(a: torch.Tensor, b: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Sums of a * b, by token."""
    if a.device.type == "cpu" and a.shape[-1] <= _LONGEST_DOT:  # in half the time
        with np.errstate(over="ignore", invalid="ignore"):
            return torch.from_numpy(np.vecdot(a.numpy(), b.numpy()))
    return torch.mul(a, b, out=products).sum(-1)


def _fidelity(size: float, cross: float, error: float) -> Fidelity | None:
    """None if the sums do not tell."""
    if not (_LEAST < size < _MOST and math.isfinite(error)):
        return None
    other = size - 2 * cross + error
    cosine = (size - cross) / math.sqrt(size * other) if other > 0 else 0.0
    return Fidelity(min(cosine, 1.0), math.sqrt(error / size), math.sqrt(size))


def _to_pinned(source: torch.Tensor) -> torch.Tensor:
    if not source.is_cuda:
        return source
    source.record_stream(torch.cuda.current_stream(source.device))
    return torch.empty_like(source, device="cpu", pin_memory=True).copy_(source, non_blocking=True)
