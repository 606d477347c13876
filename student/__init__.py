"""The student: the MLLM, its predictors and losses, and its training. Reads the cache; runs no teacher unless told to.

>>> from olavlm.student import OlaVLM
>>> model = OlaVLM.from_pretrained("ift_run")
"""

from .checkpoint import load_checkpoint
from .config import Recipe, load_recipe
from .errors import ModelError, RecipeError, SampleError, StudentError, TargetsError, TrainingError
from .model import OlaVLM, OlaVLMConfig
from .tokens import TaskSpec

__all__ = [
    "ModelError",
    "OlaVLM",
    "OlaVLMConfig",
    "Recipe",
    "RecipeError",
    "SampleError",
    "StudentError",
    "TargetsError",
    "TaskSpec",
    "TrainingError",
    "load_checkpoint",
    "load_recipe",
]
