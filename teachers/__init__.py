"""Frozen vision experts whose features an MLLM is taught to predict.

    from olavlm.teachers import load_teacher

    teacher = load_teacher("depth", device="cuda")   # or seg, gen, timm:MODEL, open_clip:MODEL/PRETRAINED; model= a hub
                                                     # id or a local checkpoint
    teacher.card.tokens, teacher.card.dim            # 576, 1024
    teacher.encode([picture])                        # float32 CPU tensor [1, 576, 1024]

Importing this package is cheap: PyTorch and transformers are imported when a teacher is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from olavlm.teachers.card import Card
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import GEOMETRIES
from olavlm.teachers.registry import TEACHERS, Entry, load_teacher, look_up, store_key

if TYPE_CHECKING:
    from olavlm.teachers.base import PixelTeacher, Teacher
    from olavlm.teachers.tiny import make_tiny

__all__ = [
    "GEOMETRIES",
    "TEACHERS",
    "Card",
    "Entry",
    "PixelTeacher",
    "Teacher",
    "TeacherError",
    "load_teacher",
    "look_up",
    "make_tiny",
    "store_key",
]


def __getattr__(name: str) -> object:
    if name in ("PixelTeacher", "Teacher"):
        from olavlm.teachers.base import PixelTeacher, Teacher

        return {"PixelTeacher": PixelTeacher, "Teacher": Teacher}[name]
    if name == "make_tiny":
        from olavlm.teachers.tiny import make_tiny

        return make_tiny
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
