"""Plans and failures as pandas tables.

    >>> FeatureStore("features").to_pandas()["depth"].value_counts()
    >>> FeatureStore("features")["depth"].to_pandas()

pandas comes with the extra `notebook` and is imported when a table is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import BadImage, CacheError, MissingExtra

if TYPE_CHECKING:
    import pandas

    from .features import TeacherFeatures
    from .store import FeatureStore

MISSING_IMAGE = "missing image"
"""How `plan_frame` says the reason `missing` (no such file under the image root): there, "missing" is not extracted."""


def plan_frame(store: FeatureStore) -> pandas.DataFrame:
    """The plan as a table, one line a row: `row`, `image`, and a column a teacher with what became of the row.

    That is "valid", "missing" (not extracted, or in a damaged shard), or the reason why it was quarantined, of which
    `missing` is spelled "missing image"; all "damaged" where the teacher cannot be opened. The columns are categorical
    and have the same categories, those that occur. A teacher called `row` or `image` gets the column `row (teacher)`.

    Raises `MissingExtra` without pandas.
    """
    pd = _pandas()
    states = ("valid", "missing", "damaged", *map(outcome, BadImage.REASONS))
    code = {state: i for i, state in enumerate(states)}
    rows, columns = store.rows.rows, {}
    for key in store.teachers:
        state = np.full(len(rows), code["valid"], np.int8)
        try:
            features = store[key]
            state[np.searchsorted(rows, features.missing_rows())] = code["missing"]
            failures = features.failures()
        except (CacheError, OSError):
            state[:], failures = code["damaged"], []
        at = np.searchsorted(rows, np.fromiter((row for row, _ in failures), np.int64, len(failures)))
        state[at] = [code[outcome(bad.reason)] for _, bad in failures]
        columns[f"{key} (teacher)" if key in ("row", "image") else key] = state
    kept = sorted({0, 1}.union(*(np.unique(state).tolist() for state in columns.values())))
    kind = pd.CategoricalDtype([states[i] for i in kept])
    frame = store.plan.to_pandas()
    for key, state in columns.items():
        frame[key] = pd.Categorical.from_codes(np.searchsorted(kept, state), dtype=kind)
    return frame


def failures_frame(features: TeacherFeatures) -> pandas.DataFrame:
    """The quarantined rows of one teacher, ascending: `row`, `image`, `reason` (categorical) and `detail`.

    Raises `MissingExtra` without pandas.
    """
    pd = _pandas()
    failures = features.failures()
    bad = [b for _, b in failures]
    reasons = {b.reason for b in bad}
    return pd.DataFrame(
        {
            "row": np.fromiter((row for row, _ in failures), np.int64, len(failures)),
            "image": pd.Series([b.image for b in bad], dtype=str),
            "reason": pd.Categorical([b.reason for b in bad], [r for r in BadImage.REASONS if r in reasons]),
            "detail": pd.Series([b.detail for b in bad], dtype=str),
        }
    )


def outcome(reason: str) -> str:
    return MISSING_IMAGE if reason == "missing" else reason


def _pandas():
    try:
        import pandas
    except ImportError as e:
        raise MissingExtra(f"tables need pandas ({' '.join(str(e).split())}): pip install 'olavlm[notebook]'") from None
    return pandas
