"""The card: what identifies a teacher's features, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from olavlm.teachers.errors import TeacherError

HASHED_FIELDS = (
    "weights_sha256",
    "recipe",
    "geometry",
    "size",
    "mean",
    "std",
    "channel_order",
    "compute_dtype",
    "tokens",
    "dim",
    "grid",
)


@dataclass(frozen=True)
class Card:
    """What a teacher is and how its features are made.

    `HASHED_FIELDS` decide the features and make up the fingerprint. The other fields (`name`, `model`, `revision`,
    `versions`) are a record: the same weights from the hub and from a folder are the same teacher.
    """

    name: str
    """Registry name, such as `depth`."""
    model: str
    """Hub id or folder the weights came from, as the user gave it."""
    weights_sha256: str
    """Digest of the safetensors files, see `checkpoint.weights_digest`."""
    recipe: Mapping[str, Any]
    """From network to features: `name`, and what it stands for (layers, averaging, interpolation, resizing)."""
    geometry: str
    """What is done to the picture's frame before the recipe's own resize, one of `geometry.GEOMETRIES`."""
    size: tuple[int, int]
    """Height and width of the network input, in pixels."""
    mean: tuple[float, float, float]
    """Per-channel mean subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Per-channel divisor after the mean."""
    tokens: int
    """Tokens per image."""
    dim: int
    """Width of a token."""
    grid: tuple[int, int]
    """Rows and columns the tokens form, row-major; (1, 1) for a pooled embedding."""
    channel_order: str = "RGB"
    compute_dtype: str = "float32"
    revision: str | None = None
    """Commit of the hub repository; None for a folder."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that resize the picture and run the network."""

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std", "grid"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON of `HASHED_FIELDS`."""
        hashed = {name: getattr(self, name) for name in HASHED_FIELDS}
        canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON values, with its `fingerprint`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.loads(json.dumps(values | {"fingerprint": self.fingerprint()}, allow_nan=False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Card:
        """The inverse of `to_dict`.

        Raises:
            TeacherError: a field is missing or unknown, or the stored fingerprint is not the card's own.
        """
        values = dict(values)
        stored = values.pop("fingerprint", None)
        try:
            card = cls(**values)
        except TypeError as error:
            raise TeacherError(
                f"card with fields {', '.join(sorted(values))}: not a teacher's card ({error}); "
                "use one written by Card.to_dict"
            ) from error
        if stored is not None and stored != card.fingerprint():
            raise TeacherError(
                f"card {card.name!r}: its fingerprint {stored} is not that of its fields ({card.fingerprint()}); "
                "it was edited or damaged, take it from the teacher again"
            )
        return card
