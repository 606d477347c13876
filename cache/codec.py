"""From a teacher's float32 features to what a store keeps, and back.

float16 is the default; float32 is for exactness. A row with a value that is not finite, or that does not fit the
storage dtype, never lands: `encode` names it so that it can be quarantined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


@dataclass(frozen=True)
class Fidelity:
    """How far a stored row is from the teacher's: cosine over the whole row, relative L2 error, L2 norm."""

    cosine: float
    relative_error: float
    norm: float


def encode(row: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray | None, str | None, Fidelity | None]:
    """Encode one row `(tokens, dim)` float32 for storage.

    Returns (stored, None, fidelity), or (None, reason, None) with reason "non-finite" or "overflow".
    """
    row = np.ascontiguousarray(row, np.float32)
    if not np.isfinite(row).all():
        return None, "non-finite", None
    norm = math.sqrt(_dot(row, row, np.float64))  # a float32 square overflows from 1.8e19
    if dtype == np.float32:
        return row.astype(dtype, copy=False), None, Fidelity(1.0, 0.0, norm)
    with np.errstate(over="ignore"):
        stored = row.astype(dtype)
    back = stored.astype(np.float32)
    if not np.isfinite(back).all():
        return None, "overflow", None
    if norm == 0.0:
        return stored, None, Fidelity(1.0, 0.0, 0.0)
    other = math.sqrt(_dot(back, back))
    if other == 0.0:
        return stored, None, Fidelity(0.0, 1.0, norm)
    cosine = _dot(row, back) / (norm * other)
    np.subtract(back, row, out=back)
    return stored, None, Fidelity(min(cosine, 1.0), math.sqrt(_dot(back, back)) / norm, norm)


def _dot(a: np.ndarray, b: np.ndarray, dtype: type = np.float32) -> float:
    """Sum of products, by token in `dtype`, then in float64; unlike BLAS the same for any number of threads."""
    return float(np.einsum("td,td->t", a, b, dtype=dtype).sum(dtype=np.float64))


def decode(stored: np.ndarray) -> np.ndarray:
    """Stored rows to float32; a copy only where the dtype differs."""
    return stored.astype(np.float32, copy=False)
