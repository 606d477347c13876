"""From a teacher's float32 features to what a store keeps, and back.

    float16   the default
    float32   exactness
    int8      half of float16: symmetric, one float32 scale a token, q = round(x / scale), scale = max|x| / 127
    int4      a quarter: every token is rotated, then each value becomes one of 16 levels times one scale a token

A row with a value that is not finite, or that does not fit the storage dtype, never lands: `Codec.encode` names it so
that it can be quarantined. An all-zero token has scale 0 and stays exactly zero.

Teacher tokens have a few very large channels, which would leave four bits to no other. An orthonormal rotation spreads
them: signs s from a fixed stream, a Hadamard transform over the largest power of two P that divides dim, and across the
dim / P blocks a DCT-II, so that every value is nearly Gaussian (QuaRot, arXiv 2404.00456). The levels are the Lloyd-Max
quantiser of a Gaussian (Max 1960, table I: mean squared error 0.0095, so cosine 0.995), the scale is the least-squares
one given the levels chosen, and the rotation is undone on reading.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

Parts = dict[str, np.ndarray]
"""What is stored of a row, by array: "features", and "scales" (tokens,) float32 where the codec has them."""


@dataclass(frozen=True)
class Fidelity:
    """How far a stored row is from the teacher's: cosine over the whole row, relative L2 error, L2 norm."""

    cosine: float
    relative_error: float
    norm: float


@dataclass(frozen=True)
class Codec:
    """How rows `(tokens, dim)` float32 are stored: plain floats. The subclasses say what else there is."""

    name: str
    dtype: np.dtype
    """Of the array "features"."""
    has_scales: bool = False
    values_per_item: int = 1
    """Channels that one item of "features" holds."""

    def row_bytes(self, tokens: int, dim: int) -> int:
        """Bytes of a stored row, all arrays together, without checksums."""
        return tokens * (dim // self.values_per_item * self.dtype.itemsize + 4 * self.has_scales)

    def encode(self, row: np.ndarray) -> tuple[Parts | None, str | None, Fidelity | None]:
        """Encode one row `(tokens, dim)` float32 for storage.

        Returns (parts, None, fidelity), or (None, reason, None) with reason "non-finite" or "overflow".
        """
        row = np.ascontiguousarray(row, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            size = _dot(row, row)
            if not math.isfinite(size) and not np.isfinite(row).all():
                return None, "non-finite", None
            parts = self._store(row)
            if self.dtype == np.float32:
                return parts, None, Fidelity(1.0, 0.0, math.sqrt(size))
            back = self.decode(parts)
            other = _dot(back, back)
            if not math.isfinite(other) and not np.isfinite(back).all():
                return None, "overflow", None
            return parts, None, _fidelity(row, back, size, other)

    def _store(self, row: np.ndarray) -> Parts:
        return {"features": row.astype(self.dtype, copy=False)}

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stored rows, `(..., tokens, stored dim)` and scales `(..., tokens)`, as float32 `(..., tokens, dim)`.

        A copy only where the dtype differs.
        """
        return parts["features"].astype(np.float32, copy=False)

    def mark_invalid(self, parts: Mapping[str, np.ndarray], row: int) -> None:
        """Make `row` of a batch of stored rows one that decodes to NaN."""
        parts["features"][row].fill(np.nan)


class _Int8(Codec):
    def _store(self, row: np.ndarray) -> Parts:
        largest = np.abs(row).max(axis=1)
        scales = np.where(largest > 0, np.maximum(largest / np.float32(127), _SMALLEST), np.float32(0))
        q = np.divide(row, scales[:, None], out=np.zeros_like(row), where=scales[:, None] > 0)
        return {"features": np.clip(np.rint(q), -127, 127).astype(np.int8), "scales": scales}

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return parts["features"].astype(np.float32) * parts["scales"][..., None]

    def mark_invalid(self, parts: Mapping[str, np.ndarray], row: int) -> None:
        parts["features"][row].fill(0)
        parts["scales"][row].fill(np.nan)


class _Int4(_Int8):
    def _store(self, row: np.ndarray) -> Parts:
        rotated = rotate(row)
        size = np.sqrt(np.einsum("td,td->t", rotated, rotated, dtype=np.float64) / row.shape[1])[:, None]
        unit = np.divide(rotated, size, out=np.zeros(row.shape), where=size > 0)
        q = np.searchsorted(_BOUNDS, unit).astype(np.uint8)
        levels = LEVELS[q].astype(np.float64)
        scales = np.einsum("td,td->t", levels, unit) / np.einsum("td,td->t", levels, levels) * size[:, 0]
        return {"features": q[:, 0::2] | q[:, 1::2] << 4, "scales": scales.astype(np.float32)}

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        packed = parts["features"]
        q = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
        return rotate(LEVELS[q] * parts["scales"][..., None], back=True)


_SMALLEST = np.float32(1e-45)  # the smallest float32: a token of yet smaller values is not all zero
_POSITIVE = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
LEVELS = np.array([*(-x for x in reversed(_POSITIVE)), *_POSITIVE], np.float32)
"""Of int4, code 0 to 15: the 16-level Lloyd-Max quantiser of a unit Gaussian."""
_BOUNDS = (LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2

CODECS: dict[str, Codec] = {
    "float16": Codec("float16", np.dtype("<f2")),
    "float32": Codec("float32", np.dtype("<f4")),
    "int8": _Int8("int8", np.dtype("i1"), has_scales=True),
    "int4": _Int4("int4", np.dtype("u1"), has_scales=True, values_per_item=2),
}


def rotate(x: np.ndarray, back: bool = False) -> np.ndarray:
    """The rotation of int4 over the last axis, float32 `(..., dim)`, or with `back` its inverse."""
    dim = x.shape[-1]
    power = dim & -dim  # the largest power of two that divides it
    signs, across = _signs(dim), _dct(dim // power)
    y = np.array(x if back else x * signs, np.float32)
    if back and len(across) > 1:
        y = _mix(across.T, y, power)
    y = y.reshape(*x.shape[:-1], dim // power, power)
    step = 1
    while step < power:
        pairs = y.reshape(*y.shape[:-1], power // (2 * step), 2, step)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        y, step = y.reshape(*x.shape[:-1], dim // power, power), step * 2
    y = (y * np.float32(1 / math.sqrt(power))).reshape(x.shape)
    if not back and len(across) > 1:
        y = _mix(across, y, power)
    return y * signs if back else y


def _mix(matrix: np.ndarray, y: np.ndarray, power: int) -> np.ndarray:
    blocks = y.reshape(*y.shape[:-1], len(matrix), power)
    return np.einsum("ij,...jp->...ip", matrix, blocks, dtype=np.float32).reshape(y.shape)  # not BLAS: same bits


@cache
def _signs(dim: int) -> np.ndarray:
    """Bit i of SHAKE-256 of a fixed text, least significant first: 1 is minus."""
    stream = np.frombuffer(hashlib.shake_256(b"olavlm int4 rotation 1").digest(-(-dim // 8)), np.uint8)
    return (1 - 2 * np.unpackbits(stream, bitorder="little")[:dim].astype(np.float32)).astype(np.float32)


@cache
def _dct(count: int) -> np.ndarray:
    """The orthonormal DCT-II matrix (count, count)."""
    k, n = np.arange(count)[:, None], np.arange(count)[None]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * count)) * np.sqrt(2 / count)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _fidelity(row: np.ndarray, back: np.ndarray, size: float, other: float) -> Fidelity:
    """`size` and `other` are the squared norms of a row and of what is stored of it; `back` is overwritten."""
    norm = math.sqrt(size)
    if norm == 0.0:
        return Fidelity(1.0, 0.0, 0.0)
    if other == 0.0:
        return Fidelity(0.0, 1.0, norm)
    cosine = _dot(row, back) / (norm * math.sqrt(other))
    np.subtract(back, row, out=back)
    return Fidelity(min(cosine, 1.0), math.sqrt(_dot(back, back)) / norm, norm)


_MOST_IN_ONE_THREAD = 8192  # OpenBLAS splits longer dot products between threads, and sums in another order


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of products, by token in float32, then in float64; the same for any number of threads.

    A float32 square overflows from 1.8e19 and is lost below 1e-19: then it is float64 throughout, and infinite or NaN
    only if a value is.
    """
    by_token = np.vecdot(a, b) if a.shape[-1] <= _MOST_IN_ONE_THREAD else np.einsum("td,td->t", a, b)
    total = float(by_token.sum(dtype=np.float64))
    return total if 1e-24 < abs(total) < math.inf else float(np.einsum("td,td->t", a, b, dtype=np.float64).sum())
