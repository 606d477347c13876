"""The feature store: one plan, and beside it one group of committed shards a teacher.

    STORE/zarr.json                a Zarr v3 group
    STORE/plan/00000.parquet       the rows (plan.py)
    STORE/depth/zarr.json          group; its attribute `card` says what made the features
    STORE/depth/features/          (rows padded to whole shards, tokens, dim), fill value NaN (shard.py)
    STORE/depth/scales/            only for int8 and int4: (rows, tokens), fill value NaN (codec.py)
    STORE/depth/commits/           one record a shard: a shard exists if and only if its valid record does (records.py)
    STORE/depth/index              what the records say, in columns; can be made anew (ledger.py)
    STORE/depth/leases/ staging/   writers at work (lease.py, commit.py)
    STORE/runs/                    what every extraction was asked, and what it cost

    >>> from olavlm.cache import FeatureStore
    >>> store = FeatureStore("STORE")
    >>> store["depth"]["coco/000001.jpg"].shape
    (576, 1024)

STORE is a folder, or an fsspec URL such as `s3://bucket/features`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import pyarrow as pa

from . import files
from .errors import MissingFeatures, StoreError
from .features import TeacherFeatures
from .local_cache import LocalCache
from .plan import Plan
from .shard import read_metadata

FORMAT = 1
RESERVED = ("plan", "runs", "zarr.json")  # names in a store that are no teacher's


class FeatureStore(Mapping[str, TeacherFeatures]):
    """A store, opened read-only. `store["depth"]` is a teacher's features, `store.plan` the rows.

    With `local_cache`, rows of a store on object storage are kept there once they were fetched. Raises `StoreError` if
    `path` is not a store, `PlanError` if its plan is damaged.
    """

    def __init__(self, path: str | os.PathLike, *, local_cache: LocalCache | None = None) -> None:
        self.path = files.location(path)
        self._local_cache = None if files.is_local(self.path) else local_cache
        metadata = read_metadata(self.path)
        about = metadata.get("attributes", {}).get("olavlm")
        if not isinstance(about, dict):
            raise StoreError(f"{self.path} is a Zarr group but not a feature store; make one with olavlm-extract")
        if about.get("format") != FORMAT:
            raise StoreError(
                f"{self.path} has format {about.get('format')}, this version reads {FORMAT}; use a later one"
            )
        self._plan = Plan.load(self.path / "plan")
        self._opened: dict[str, TeacherFeatures] = {}

    @property
    def teachers(self) -> list[str]:
        """The keys present, sorted."""
        return [
            name
            for name in files.names(self.path)
            if name not in RESERVED and name[0] != "." and files.exists(self.path / name / "features" / "zarr.json")
        ]

    @property
    def plan(self) -> pa.Table:
        """Columns row (int64) and image (string), one line per distinct image."""
        return self._plan.table

    @property
    def rows(self) -> Plan:
        """The plan with its look-ups, path to row and back."""
        return self._plan

    def __getitem__(self, key: str) -> TeacherFeatures:
        if key not in self._opened:
            if key not in self.teachers:
                raise MissingFeatures(
                    f"{self.path} has no features '{key}'; it has {', '.join(self.teachers) or 'none'}"
                )
            self._opened[key] = TeacherFeatures(self.path, key, self._plan, self._local_cache)
        return self._opened[key]

    def __iter__(self):
        return iter(self.teachers)

    def __len__(self) -> int:
        return len(self.teachers)

    def preview(self, image: str | int, roots: Sequence[str] | None = None):
        """A picture (PIL, RGB): the image beside each teacher's tokens as PCA colours.

        `roots` are image roots as for `ImageRoots`; by default those that the store was extracted from.
        """
        from .display import preview

        return preview(self, image, roots)

    def to_pandas(self):
        """A DataFrame, one line a plan row: row, image, and for each teacher "valid", "missing" or the reason."""
        from .display import plan_frame

        return plan_frame(self)

    def compare(self, row_a: int | str, row_b: int | str):
        """Two rows or image paths side by side: each teacher's similarity, as numbers and as a picture."""
        from .display import compare

        return compare(self, row_a, row_b)

    def _repr_html_(self) -> str:
        from .display import store_html

        return store_html(self)

    def __repr__(self) -> str:
        lines = [f"FeatureStore({str(self.path)!r}), plan of {self._plan.num_images} images"]
        for key in self.teachers:
            try:
                lines.append(f"  {key}: {self[key].shape} {self[key].layout.dtype}, {self[key].coverage()}")
            except StoreError as e:
                lines.append(f"  {key}: {e}")
        return "\n".join(lines)
