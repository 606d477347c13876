"""The teachers of a fusion baseline: what a checkpoint records of them, and themselves, where it answers.

In training their features are read like distillation targets (`targets.py`). A picture that a user asks about has none
in any store, so the teachers are run on it, and must be those that the model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from olavlm.student.errors import ModelError, SampleError, TargetsError

_AT_ONCE = 8
"""Pictures that a teacher sees in one pass, whatever the batch that is answered."""


@dataclass(frozen=True)
class FusedTeacher:
    """A teacher whose features reach the LLM."""

    name: str
    """Of its task in the recipe, such as depth."""
    card: Mapping[str, Any]
    """Of its features, as the store keeps it: name, model, revision, recipe, geometry, compute dtype, fingerprint."""

    @classmethod
    def of(cls, name: str, card: Mapping[str, Any]) -> FusedTeacher:
        """With a local model by its full path, so that it is found from anywhere.

        Raises:
            TargetsError: a card without a grid.
        """
        rows, columns = card.get("grid") or (0, 0)
        if rows * columns != card["tokens"]:
            raise TargetsError(
                f"tasks.{name}: {card['tokens']} tokens on a grid of {rows} x {columns}; only features on a grid can "
                "be fused, so take another recipe of the teacher"
            )
        model = card.get("model")
        local = {"model": str(Path(model).absolute())} if model and Path(model).exists() else {}
        return cls(name, {**card, **local})

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.card["tokens"]

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.card["dim"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns that the tokens form, row-major."""
        rows, columns = self.card["grid"]
        return rows, columns

    @property
    def fingerprint(self) -> str:
        """What is equal for equal features."""
        return self.card["fingerprint"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FusedTeacher:
        """The inverse of `to_dict`."""
        return cls(**fields)

    def load(self, model: str | None, device: torch.device) -> Any:
        """The `olavlm.teachers.Teacher` itself, from the place that the card names or from another one.

        Raises:
            ModelError: it cannot be loaded, or has other features than those of the training.
        """
        from olavlm.teachers import TeacherError, load_teacher

        card = self.card
        remedy = f"name the place of the right one: --teacher {self.name}=MODEL, or load_teachers in Python"
        try:
            teacher = load_teacher(
                card["name"],
                model=model or card["model"],
                revision=None if model else card["revision"],
                recipe=card["recipe"]["name"],
                geometry=card["geometry"],
                device=device,
                compute_dtype=card["compute_dtype"],
            )
        except TeacherError as e:
            raise ModelError(f"teacher {self.name}, which this model reads: {e}; {remedy}") from None
        if (found := teacher.card.fingerprint()) != self.fingerprint:
            raise ModelError(
                f"teacher {self.name}: {teacher.card.model} has the fingerprint {found[:16]}, and the model was "
                f"trained with {self.fingerprint[:16]} ({card['model']}); {remedy}"
            )
        return teacher


def load_fused(
    teachers: Sequence[FusedTeacher], models: Mapping[str, str | Path], device: torch.device
) -> dict[str, Any]:
    """The teachers themselves, by name; `models` gives other places of some.

    Raises:
        ModelError: as `FusedTeacher.load`, or for a name in `models` that is none of them.
    """
    names = [teacher.name for teacher in teachers]
    if unknown := sorted(set(models) - set(names)):
        raise ModelError(f"teacher {unknown[0]!r}: this model reads {', '.join(names) or 'no teacher'}")
    places = {name: str(models[name]) if name in models else None for name in names}
    return {teacher.name: teacher.load(places[teacher.name], device) for teacher in teachers}


def encode_fused(
    teachers: Mapping[str, Any], images: Sequence[Image.Image], device: torch.device
) -> dict[str, torch.Tensor]:
    """Features of pictures by each teacher, float32 (B, n, D). SampleError for features that are not finite."""
    features = {}
    for name, teacher in teachers.items():
        parts = [teacher.encode(images[i : i + _AT_ONCE]).to(device) for i in range(0, len(images), _AT_ONCE)]
        features[name] = torch.cat(parts)
        if not features[name].isfinite().all():
            raise SampleError(f"teacher {name}: its features of an image are not finite; ask about another image")
    return features


def in_order(teachers: Sequence[FusedTeacher], given: Mapping[str, torch.Tensor], row: int) -> list[torch.Tensor]:
    """The features (B, n, D) of each teacher; SampleError, which names a `row` with an image, if some are missing."""
    for teacher in teachers:
        if teacher.name not in given:
            raise SampleError(f"row {row} has an image, but no teacher_features of {teacher.name} are given")
        if (found := tuple(given[teacher.name].shape[1:])) != (teacher.tokens, teacher.dim):
            raise SampleError(
                f"teacher_features of {teacher.name} are {found} an image, the model was trained with "
                f"{(teacher.tokens, teacher.dim)}"
            )
    return [given[teacher.name] for teacher in teachers]
