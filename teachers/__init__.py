"""Frozen vision experts whose features an MLLM is taught to predict.

    from olavlm.teachers import load_teacher

    teacher = load_teacher("depth", device="cuda")   # or seg, gen; model= a hub id or a local checkpoint folder
    teacher.card.tokens, teacher.card.dim            # 576, 1024
    teacher.encode([picture])                        # float32 CPU tensor [1, 576, 1024]

Importing this package is cheap: PyTorch and transformers are imported when a teacher is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from olavlm.teachers.card import Card
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import GEOMETRIES
from olavlm.teachers.registry import TEACHERS, load_teacher, store_key

if TYPE_CHECKING:
    from olavlm.teachers.base import Teacher
    from olavlm.teachers.tiny import make_tiny

__all__ = [
    "GEOMETRIES",
    "TEACHERS",
    "Card",
    "Teacher",
    "TeacherError",
    "load_teacher",
    "make_tiny",
    "store_key",
]


def __getattr__(name: str) -> object:
    if name == "Teacher":
        from olavlm.teachers.base import Teacher

        return Teacher
    if name == "make_tiny":
        from olavlm.teachers.tiny import make_tiny

        return make_tiny
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
