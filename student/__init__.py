"""The student: the MLLM, its predictors and losses, and its training. Reads the cache; runs no teacher unless told to.

    >>> from olavlm.student import OlaVLM
    >>> model = OlaVLM.from_pretrained("runs/tiny/ift")

Importing this package is cheap: PyTorch and transformers are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from olavlm.student.errors import (
    ModelError,
    RecipeError,
    RecipeFileError,
    SampleError,
    StudentError,
    TargetsError,
    TrainingError,
)

if TYPE_CHECKING:
    from olavlm.student.adapter import load_checkpoint
    from olavlm.student.config import Recipe
    from olavlm.student.model import OlaVLM, OlaVLMConfig
    from olavlm.student.recipes import load_recipe
    from olavlm.student.tokens import TaskSpec

_LAZY = {
    "OlaVLM": "model",
    "OlaVLMConfig": "model",
    "Recipe": "config",
    "TaskSpec": "tokens",
    "load_checkpoint": "adapter",
    "load_recipe": "recipes",
}

__all__ = [
    "ModelError",
    "OlaVLM",
    "OlaVLMConfig",
    "Recipe",
    "RecipeError",
    "RecipeFileError",
    "SampleError",
    "StudentError",
    "TargetsError",
    "TaskSpec",
    "TrainingError",
    "load_checkpoint",
    "load_recipe",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
