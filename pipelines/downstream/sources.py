"""Where the features that are decoded and scored come from: a store of targets, or the probes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from olavlm.cache import FeatureStore
from olavlm.cache.images import redacted
from olavlm.pipelines.cli import JobFailed

if TYPE_CHECKING:
    import torch


class FeatureSource(Protocol):
    """Features of one teacher, or predictions of them, by image path."""

    name: str
    """What is scored, for the record: a path."""
    card: Mapping[str, Any]
    """Of the teacher: what the features are, or what is predicted."""
    layers: Sequence[str]
    """What gives them, such as `layer 12` of a model."""

    def read(self, images: Sequence[str]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """For each layer features float32 (B, tokens, dim), and valid bool (B,); invalid rows may hold anything.

        Raises:
            CacheError, StudentError: an image that is not known, or damage.
        """
        ...


class StoreSource:
    """The targets themselves, the upper bound of what a probe can score.

    Raises:
        JobFailed: the store has no such key, or features of another teacher.
    """

    layers = ("targets",)

    def __init__(self, store: str, teacher: str, key: str | None = None) -> None:
        self.store, store = FeatureStore(store), redacted(store)
        names = self.store.teachers
        alike = [name for name in names if self.store[name].card.get("name") == teacher]
        if key is None and len(alike) != 1:
            held = ", ".join(alike or names) or "nothing"
            raise JobFailed(
                f"store {store} has {len(alike)} keys with features of {teacher} (it has {held}), and one is scored; "
                "name it by --key"
            )
        if key is not None and key not in names:
            raise JobFailed(f"store {store} has no {key!r}; it has {', '.join(names) or 'nothing'}")
        self.group = self.store[key or alike[0]]
        self.card = self.group.card
        if self.card.get("name") != teacher:
            raise JobFailed(f"store {store}, {key!r}: features of {self.card.get('name')!r}, and {teacher} is scored")
        self.name = f"{store}/{key or alike[0]}"

    def read(self, images: Sequence[str]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        import torch

        values, valid = self.group.read([self.store.rows.row_of(image) for image in images])
        return {self.layers[0]: torch.from_numpy(values)}, valid
