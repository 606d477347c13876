"""Rows of a feature store, read into the tensors of a micro-batch, in their storage dtype.

int8 stays so, with its scales: it is widened on the device. int4, which no device here decodes, becomes float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from olavlm.cache import FeatureStore, LocalCache, MissingFeatures, TeacherFeatures
from olavlm.cache.files import is_local, location
from olavlm.student.config import Recipe

from .shared_tensors import Shape


def open_store(recipe: Recipe, path: str) -> FeatureStore:
    """A store of the recipe's, through its `targets.local_cache` if the store is on object storage.

    Raises:
        CacheError: it is no store, or the local cache cannot be written.
    """
    t = recipe.targets
    if t.local_cache is None or is_local(location(path)):
        return FeatureStore(path)
    return FeatureStore(path, local_cache=LocalCache(t.local_cache, round(t.local_cache_gb * 1e9)))


def rows_of(store: FeatureStore, images: Sequence[str]) -> np.ndarray:
    """The store's rows of images, int64; MissingFeatures for the first that is not in the plan."""
    rows = store.rows.rows_of(images)
    if (rows < 0).any():
        raise MissingFeatures(f"image {images[int(rows.argmin())]!r} is not in the store's plan")
    return rows


def row_shapes(group: TeacherFeatures, num_rows: int) -> dict[str, Shape]:
    """Shapes and dtypes of the tensors that `read_rows` fills."""
    _, tokens, dim = group.shape
    if group.layout.dtype == "int4":
        return {"features": ((num_rows, tokens, dim), torch.float32)}
    return {
        name: ((num_rows, *array.row_shape), torch.from_numpy(np.empty(0, array.dtype)).dtype)
        for name, array in group.layout.arrays.items()
    }


def read_rows(
    group: TeacherFeatures, rows: np.ndarray, places: Sequence[int], into: dict[str, torch.Tensor]
) -> np.ndarray:
    """Fill batches of rows, as `row_shapes` has them: `rows` at `places`, ascending, and zeros at the others.

    Zeros, not empty memory: a row that was not read must not be able to look like features.

    Returns:
        bool (rows,): which of them hold features. One that was quarantined decodes to NaN.

    Raises:
        MissingFeatures, CorruptFeatures: rows that are not committed, or damaged.
        OSError: rows that cannot be read.
    """
    parts = {name: part.numpy() for name, part in into.items()}
    first = {name: part[: len(rows)] for name, part in parts.items()}
    try:
        if not len(rows):
            valid = np.zeros(0, bool)
        elif group.layout.dtype == "int4":
            stored, valid = group.read_stored(rows)
            first["features"][:] = group.layout.codec.decode(stored)
        else:
            _, valid = group.read_stored(rows, out=first)
    except OSError as e:
        if e.strerror and not e.filename:  # of a file that is open
            e.filename = str(group.folder)
        raise
    for part in parts.values():
        for row, place in reversed(list(enumerate(places))):  # none is written over before it was moved
            if row != place:
                part[place] = part[row]
        part[np.isin(np.arange(len(part)), places, invert=True)] = 0
    return valid
