"""The projector: features of an image to tokens of the LLM. One encoder's, or with the features of teachers fused in.

    none            base [n, D]  ->  MLP  ->  n tokens
    feature_concat  at each base position the features of base and teachers side by side  ->  one MLP  ->  n tokens
    token_concat    base, and 8 tokens of each teacher behind it, each through an MLP of its own  ->  n + 8 T tokens

The last two are the baselines of arXiv 2412.09585, table 1, that feed to the LLM what the method distils into it.
Positions are those of what each network sees of the picture; a recipe's `targets.geometry` can make that the same.
"""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import nn

from olavlm.student.choices import Fusion
from olavlm.student.errors import RecipeError
from olavlm.student.fused_teachers import FusedTeacher

TOKENS_PER_TEACHER = 8
"""Of token_concat."""


def check_fusion(fusion: str, teachers: Sequence[FusedTeacher]) -> None:
    """RecipeError for a name that is none of `Fusion`, or for teachers that do not go with it."""
    if fusion not in get_args(Fusion):
        raise RecipeError(f"fusion={fusion!r} must be one of {', '.join(get_args(Fusion))}")
    if (fusion == "none") != (not teachers):
        names = ", ".join(teacher.name for teacher in teachers) or "no teacher"
        raise RecipeError(
            f"fusion={fusion!r} with {names}: feature_concat and token_concat take teachers, none does not"
        )


def make_projector(
    fusion: Fusion, grid: tuple[int, int], base_width: int, teachers: Sequence[FusedTeacher], width: int
) -> nn.Module:
    """A module of (base features (B, n, D), then those of each teacher, (B, n_t, D_t)) to tokens (B, n', H).

    n' is `num_image_tokens`.

    Args:
        grid: rows and columns of the base encoder's tokens.
        base_width: D, of the base encoder.
        width: H, of the LLM.

    Raises:
        RecipeError: a teacher whose tokens the fusion cannot take.
    """
    if fusion == "feature_concat":
        return FeatureConcat(grid, base_width, teachers, width)
    if fusion == "token_concat":
        return TokenConcat(base_width, teachers, width)
    return Projector(base_width, width)


def num_image_tokens(fusion: Fusion, base_tokens: int, num_teachers: int) -> int:
    """Tokens that stand for an image."""
    return base_tokens + (num_teachers * TOKENS_PER_TEACHER if fusion == "token_concat" else 0)


class Projector(nn.Sequential):
    """Linear, GELU, Linear, with biases (LLaVA-1.5's mlp2x_gelu): features (..., D) to (..., H)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(as_input_of(self[0].weight, features))


class FeatureConcat(Projector):
    """At each base position base features, then each teacher's, side by side; one MLP.

    A teacher's one token is repeated. A grid of another size than the base encoder's is resampled to it, if both are
    square: bilinear, corners not aligned, with antialiasing where it shrinks.

    Raises:
        RecipeError: a grid of another size that is not square, or against a base grid that is not.
    """

    def __init__(self, grid: tuple[int, int], base_width: int, teachers: Sequence[FusedTeacher], width: int) -> None:
        for teacher in teachers:
            if teacher.tokens > 1 and teacher.grid != grid and (len({*grid}) > 1 or len({*teacher.grid}) > 1):
                raise RecipeError(
                    f"teacher {teacher.name}: its grid is {teacher.grid}, the base encoder's {grid}; feature_concat "
                    "takes equal grids and resamples square ones alone: use token_concat, or another encoder or teacher"
                )
        super().__init__(base_width + sum(teacher.dim for teacher in teachers), width)
        self.grid = grid
        self.grids = [teacher.grid if teacher.tokens > 1 else (1, 1) for teacher in teachers]

    def forward(self, base: torch.Tensor, *teachers: torch.Tensor) -> torch.Tensor:
        fitted = [resample(x, grid, self.grid) for x, grid in zip(teachers, self.grids, strict=True)]
        return super().forward(torch.cat([x.to(self[0].weight.dtype) for x in (base, *fitted)], dim=-1))


class TokenConcat(nn.Module):
    """The base encoder's tokens, then `TOKENS_PER_TEACHER` of each teacher, each through an MLP of its own.

    A teacher's tokens are averaged over as many runs of consecutive ones, row-major; its one token is repeated.

    Raises:
        RecipeError: a teacher whose tokens cannot be cut into runs.
    """

    def __init__(self, base_width: int, teachers: Sequence[FusedTeacher], width: int) -> None:
        super().__init__()
        for teacher in teachers:
            if teacher.tokens > 1 and teacher.tokens % TOKENS_PER_TEACHER:
                raise RecipeError(
                    f"teacher {teacher.name}: its {teacher.tokens} tokens cannot be cut into {TOKENS_PER_TEACHER} "
                    "equal runs; use feature_concat, or another teacher"
                )
        self.base = Projector(base_width, width)
        self.teachers = nn.ModuleDict({teacher.name: Projector(teacher.dim, width) for teacher in teachers})

    def forward(self, base: torch.Tensor, *teachers: torch.Tensor) -> torch.Tensor:
        pieces = [self.base(base)]
        for projector, features in zip(self.teachers.values(), teachers, strict=True):
            pieces.append(projector(average_runs(features.to(projector[0].weight.dtype), TOKENS_PER_TEACHER)))
        return torch.cat(pieces, dim=1)


def resample(features: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """Features (B, rows * columns, D) of one grid on another, float32 unless they stay as they are."""
    if grid == wanted:
        return features
    if grid == (1, 1):
        return features.expand(-1, wanted[0] * wanted[1], -1)
    maps = features.float().transpose(1, 2).unflatten(2, grid)  # [B, D, rows, columns]
    return F.interpolate(maps, wanted, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def average_runs(features: torch.Tensor, count: int) -> torch.Tensor:
    """(B, n, D) to (B, count, D): the mean of each of `count` runs of n / count tokens; one token is repeated."""
    if features.shape[1] == 1:
        return features.expand(-1, count, -1)
    return features.unflatten(1, (count, -1)).mean(dim=2)


def as_input_of(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """States in the dtype of the layer that reads them; under autocast that is the layer's own affair."""
    return states if torch.is_autocast_enabled(states.device.type) else states.to(weight.dtype)
