"""The special task tokens: learnt queries that follow the image tokens, one group for each distilled task.

Source: arXiv 2412.09585 A task is described by a `TaskSpec` alone, so that a new teacher needs no code.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import nn

from olavlm.student.choices import PredictorWidth
from olavlm.student.errors import RecipeError


@dataclass(frozen=True)
class TaskSpec:
    """What is distilled from one teacher, into which layers."""

    name: str
    """Key of the task, as in the feature store: letters, digits, `_` and `-`."""
    tokens: int
    """Tokens of the teacher's features for an image; 1 for a pooled embedding."""
    dim: int
    """Width of the teacher's features."""
    layers: tuple[int, ...] = ()
    """Decoder blocks with a predictor, counted from 1. Empty: the task has tokens but no loss."""
    weight: float = 0.5
    """Weight of the task's loss in the total."""
    predictor_width: PredictorWidth = "target"
    """Inner width of the predictor: the teacher's width, or the LLM's (the paper's depth task)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise RecipeError(f"task name {self.name!r}: use only letters, digits, '_' and '-'")
        if self.tokens < 1 or self.dim < 1:
            raise RecipeError(f"task {self.name}: tokens={self.tokens} and dim={self.dim} must be at least 1")
        if any(layer < 1 for layer in self.layers) or len(set(self.layers)) != len(self.layers):
            raise RecipeError(f"task {self.name}: layers={list(self.layers)} must be distinct and are counted from 1")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise RecipeError(f"task {self.name}: weight={self.weight} must be a number of 0 or more")
        if self.predictor_width not in get_args(PredictorWidth):
            raise RecipeError(
                f"task {self.name}: predictor_width={self.predictor_width!r} must be one of "
                f"{', '.join(get_args(PredictorWidth))}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TaskSpec":
        return cls(**fields)


class TaskTokens(nn.Module):
    """Learnt tokens of every task, inserted right after the image tokens in the order of `tasks`.

    A task whose teacher gives one token owns N tokens that are inserted as they are. Any other task owns one query for
    each teacher token, pooled to N tokens by the mean over N contiguous groups, afresh in each forward, so that the
    inserted tokens and the predictor's queries share one parameter. All start from a standard normal.

    Args:
        tasks: specifications in the order of insertion.
        num_tokens: N, tokens a task inserts; 0 inserts none and owns no parameter.
        width: H, width of the LLM.

    Raises:
        RecipeError: a teacher's token count is not divisible by N, or a name occurs twice.
    """

    def __init__(self, tasks: Sequence[TaskSpec], num_tokens: int, width: int) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if len(set(names)) != len(names):
            raise RecipeError(f"tasks {names}: each name may occur once")
        if num_tokens < 0:
            raise RecipeError(f"num_task_tokens={num_tokens} must be 0 or more")
        for task in tasks:
            if num_tokens and task.tokens > 1 and task.tokens % num_tokens:
                raise RecipeError(
                    f"task {task.name}: {task.tokens} teacher tokens are not divisible into "
                    f"num_task_tokens={num_tokens} groups; choose a divisor of {task.tokens}"
                )
        self.names = tuple(names) if num_tokens else ()
        self.num_tokens = num_tokens
        self.width = width
        self.query = nn.ParameterDict()
        if num_tokens:
            for task in tasks:
                rows = num_tokens if task.tokens == 1 else task.tokens
                self.query[task.name] = nn.Parameter(torch.empty(rows, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal, standard deviation 1."""
        for parameter in self.query.values():
            nn.init.normal_(parameter)

    def queries(self, task: str) -> torch.Tensor:
        """The raw parameter of a task: (teacher tokens, H), or (N, H) for a teacher of one token."""
        return self.query[task]

    def forward(self) -> torch.Tensor:
        """The inserted tokens (T*N, H), task after task; (0, H) when there are none."""
        pooled = [q.view(self.num_tokens, -1, self.width).mean(dim=1) for q in self.query.values()]
        return torch.cat(pooled) if pooled else torch.empty(0, self.width)
