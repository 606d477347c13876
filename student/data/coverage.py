"""Whether a feature store holds what a dataset needs; what is missing, and the command that makes it."""

from __future__ import annotations

import numpy as np

from olavlm.cache import Dataset, FeatureStore
from olavlm.cache.images import redacted
from olavlm.student.errors import TargetsError


def rows_in_plan(store: FeatureStore, dataset: Dataset, command: str) -> np.ndarray:
    """The plan's rows, int64, of a dataset's distinct images; TargetsError, with the command, if some are not in it."""
    images = dataset.images()
    rows = store.rows.rows_of(images)
    if (outside := int((rows < 0).sum())) > 0:
        first = images[int(np.argmin(rows))].as_py()
        raise TargetsError(
            f"store {_named(store)} does not cover the dataset: {outside} of its {len(rows)} images (first: {first!r}) "
            f"are not in the plan; add to --data the files that the plan was made from, and run: {command}"
        )
    return rows


def check_covered(store: FeatureStore, key: str, rows: np.ndarray, command: str) -> None:
    """TargetsError, with the command, if rows have no features of `key` yet, or if all of them are quarantined."""
    if len(missing := store[key].missing_rows(rows)):
        raise TargetsError(
            f"store {_named(store)} does not cover the dataset: {len(missing)} of its {len(rows)} images have no "
            f"'{key}' features yet (first: {store.rows.image_of(int(missing[0]))!r}); finish it with: {command}"
        )
    if len(rows) and not store[key].coverage(rows).valid:
        raise TargetsError(f"store {_named(store)}: every '{key}' row of the dataset is quarantined")


def _named(store: FeatureStore) -> str:
    return redacted(str(store.path))
