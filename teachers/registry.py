"""Teachers by name. Looking one up, or naming its store key, imports no model library; loading one does.

A teacher of one's own is an `Entry` that an installed package offers as an entry point of the group `olavlm.teachers`
(docs/add-a-teacher.md): so it is found in every process, Ray's workers included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import check_geometry

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from olavlm.teachers.base import Teacher


GROUP = "olavlm.teachers"
"""Of entry points."""


@dataclass(frozen=True)
class Entry:
    """A teacher, or a family of teachers, that can be named."""

    model: str | None
    """Hub id of the teacher's own checkpoint; None where the factory knows, or has none."""
    recipes: tuple[str, ...]
    """Valid recipes, the default first. The N of one that ends in it, such as `layerN`, stands for any whole number."""
    load: Callable[..., Teacher]
    """Factory; takes the arguments of `load_teacher`, checked and complete."""
    variant: str = ""
    """Of a family, what follows `NAME:`, such as MODEL."""


def _depth(**options) -> Teacher:
    from olavlm.teachers.depth import load_depth

    return load_depth(**options)


def _seg(**options) -> Teacher:
    from olavlm.teachers.seg import load_seg

    return load_seg(**options)


def _gen(**options) -> Teacher:
    from olavlm.teachers.gen import load_gen

    return load_gen(**options)


def _timm(**options) -> Teacher:
    from olavlm.teachers.timm_models import load_timm

    return load_timm(**options)


def _open_clip(**options) -> Teacher:
    from olavlm.teachers.open_clip_models import load_open_clip

    return load_open_clip(**options)


TEACHERS: dict[str, Entry] = {
    "depth": Entry("depth-anything/Depth-Anything-V2-Large-hf", ("mean4", "last"), _depth),
    "seg": Entry("shi-labs/oneformer_coco_swin_large", ("stage4", "stage4-768"), _seg),
    "gen": Entry("stabilityai/stable-diffusion-2-1-unclip", ("embedding",), _gen),
    "timm": Entry(None, ("tokens", "embedding"), _timm, variant="MODEL"),
    "open_clip": Entry(None, ("embedding", "tokens"), _open_clip, variant="MODEL/PRETRAINED"),
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
        name: one of `TEACHERS`, such as `depth` or `timm:MODEL`, or of an installed package's entry points.
        model: hub id or local checkpoint, a folder or, for timm and open_clip, a file; the teacher's own by default.
        revision: branch, tag or commit of a hub repository.
        recipe: which features; the teacher's first recipe by default.
        geometry: `reference` (the teacher's own framing), `square` or `pad`, see `geometry.frame`.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        compute_dtype: `float32`, `bfloat16` or `float16`; features are returned in float32 all the same.

    Raises:
        TeacherError: an unknown name, recipe, geometry, device or dtype, or a checkpoint that cannot be used.
    """
    entry, recipe = look_up(name, recipe)
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
    entry, recipe = look_up(name, recipe)
    key = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return key if recipe == entry.recipes[0] else f"{key}-{recipe}"


def look_up(name: str, recipe: str | None = None) -> tuple[Entry, str]:
    """The entry of a teacher, and the recipe, which is its default where none is named.

    Raises:
        TeacherError: an unknown name or recipe, or an entry point that cannot be used.
    """
    base, colon, variant = name.partition(":")
    entry = TEACHERS.get(base) or _installed(base)
    if entry is None or bool(entry.variant) != bool(colon) or bool(colon) != bool(variant):
        names = {key: entry.variant for key, entry in TEACHERS.items()}
        names |= {point.name: "" for point in entry_points(group=GROUP) if point.name not in names}
        known = ", ".join(f"{key}:{variant}" if variant else key for key, variant in names.items())
        raise TeacherError(f"teacher {name!r}: unknown; use one of {known}")
    if recipe is None:
        return entry, entry.recipes[0]
    if not any(_is_of(recipe, known) for known in entry.recipes):
        raise TeacherError(f"recipe {recipe!r}: unknown to {name}; use one of {', '.join(entry.recipes)}")
    return entry, recipe


def _is_of(recipe: str, known: str) -> bool:
    if known.endswith("N"):
        return re.fullmatch(f"{re.escape(known[:-1])}-?[0-9]+", recipe) is not None
    return recipe == known


def _installed(name: str) -> Entry | None:
    """The entry that an installed package offers under this name."""
    for point in entry_points(group=GROUP, name=name):
        try:
            entry = point.load()
        except Exception as error:  # whatever somebody's module raises when it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TeacherError(
                f"teacher {name!r}: its entry point {point.value} cannot be imported ({reason}); mend its package"
            ) from error
        if not isinstance(entry, Entry):
            raise TeacherError(
                f"teacher {name!r}: its entry point {point.value} is a {type(entry).__name__}; make it an "
                "olavlm.teachers.Entry"
            )
        return entry
    return None
