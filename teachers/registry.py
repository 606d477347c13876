"""Teachers by name. Looking one up, or naming its store key, imports no model library; loading one does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import check_geometry

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from olavlm.teachers.base import Teacher


@dataclass(frozen=True)
class Entry:
    """A teacher that can be named."""

    model: str
    """Hub id of the teacher's own checkpoint."""
    recipes: tuple[str, ...]
    """Valid recipes, the default first."""
    load: Callable[..., Teacher]
    """Factory; takes the arguments of `load_teacher`, checked and complete."""


def _depth(**options) -> Teacher:
    from olavlm.teachers.depth import load_depth

    return load_depth(**options)


def _seg(**options) -> Teacher:
    from olavlm.teachers.seg import load_seg

    return load_seg(**options)


def _gen(**options) -> Teacher:
    from olavlm.teachers.gen import load_gen

    return load_gen(**options)


TEACHERS: dict[str, Entry] = {
    "depth": Entry("depth-anything/Depth-Anything-V2-Large-hf", ("mean4", "last"), _depth),
    "seg": Entry("shi-labs/oneformer_coco_swin_large", ("stage4", "stage4-768"), _seg),
    "gen": Entry("stabilityai/stable-diffusion-2-1-unclip", ("embedding",), _gen),
}


def load_teacher(
    name: str,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    recipe: str | None = None,
    geometry: str = "reference",
    device: str | torch.device = "auto",
    compute_dtype: str = "float32",
) -> Teacher:
    """Load a frozen teacher.

    Args:
        name: one of `TEACHERS`.
        model: hub id or local checkpoint folder; the teacher's own by default.
        revision: branch, tag or commit of a hub repository.
        recipe: which features; the teacher's first recipe by default.
        geometry: `reference` (the teacher's own framing), `square` or `pad`, see `geometry.frame`.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        compute_dtype: `float32`, `bfloat16` or `float16`; features are returned in float32 all the same.

    Raises:
        TeacherError: an unknown name, recipe, geometry, device or dtype, or a checkpoint that cannot be used.
    """
    entry, recipe = _look_up(name, recipe)
    check_geometry(geometry)
    from olavlm.teachers.base import COMPUTE_DTYPES, resolve_device

    if compute_dtype not in COMPUTE_DTYPES:
        raise TeacherError(f"compute dtype {compute_dtype!r}: unknown; use one of {', '.join(COMPUTE_DTYPES)}")
    return entry.load(
        name=name,
        model=entry.model if model is None else str(model),
        revision=revision,
        recipe=recipe,
        geometry=geometry,
        device=resolve_device(device),
        compute_dtype=compute_dtype,
    )


def store_key(name: str, recipe: str | None = None) -> str:
    """The key under which a store keeps a teacher's features unless told otherwise.

    The name with every character but letters, digits, `.`, `_` and `-` as `-`, and `-RECIPE` after it for a recipe
    that is not the default: `depth`, `depth-last`.

    Raises:
        TeacherError: an unknown name or recipe.
    """
    entry, recipe = _look_up(name, recipe)
    key = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return key if recipe == entry.recipes[0] else f"{key}-{recipe}"


def _look_up(name: str, recipe: str | None) -> tuple[Entry, str]:
    entry = TEACHERS.get(name)
    if entry is None:
        raise TeacherError(f"teacher {name!r}: unknown; use one of {', '.join(TEACHERS)}")
    if recipe is None:
        return entry, entry.recipes[0]
    if recipe not in entry.recipes:
        raise TeacherError(f"recipe {recipe!r}: unknown to {name}; use one of {', '.join(entry.recipes)}")
    return entry, recipe
