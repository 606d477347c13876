"""From a teacher's float32 features to what a store keeps, and back.

float16 is the default; float32 is for exactness. A row with a value that is not finite, or that does not fit the
storage dtype, never lands: `encode` names it so that it can be quarantined.
"""

from __future__ import annotations

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
    flat = row.reshape(-1)
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    if dtype == np.float32:
        return row.astype(dtype, copy=False), None, Fidelity(1.0, 0.0, norm)
    with np.errstate(over="ignore"):
        stored = row.astype(dtype)
    back = stored.astype(np.float32)
    if not np.isfinite(back).all():
        return None, "overflow", None
    back = back.reshape(-1)
    if norm == 0.0:
        return stored, None, Fidelity(1.0, 0.0, 0.0)
    other = float(np.linalg.norm(back))
    cosine = float(np.dot(flat, back)) / (norm * other) if other else 0.0
    error = float(np.linalg.norm(back - flat)) / norm
    return stored, None, Fidelity(min(cosine, 1.0), error, norm)


def decode(stored: np.ndarray) -> np.ndarray:
    """Stored rows to float32; a copy only where the dtype differs."""
    return stored.astype(np.float32, copy=False)
