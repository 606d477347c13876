"""Where distillation targets come from: the cache, or teachers in the loop.

Both sources have two halves. `load(images)` runs in a loader process and touches no device; `finish(loaded, device)`
runs in the training process. Both give the same targets, up to the storage dtype.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL import Image

from olavlm.cache import BadImage, CacheError, Dataset, FeatureStore, ImageRoots, TeacherFeatures
from olavlm.cache.images import redacted
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe, TaskConfig
from olavlm.student.errors import RecipeError, TargetsError
from olavlm.student.losses.scaled_features import Features, ScaledFeatures
from olavlm.student.tokens import TaskSpec

from .coverage import check_covered, rows_in_plan
from .shared_tensors import Shape, allocate
from .stored_rows import open_store, read_rows, row_shapes, rows_of

Loaded = dict[str, dict[str, torch.Tensor]]
"""For each task named tensors on the host with one row a sample, of which "valid", bool (b,), says whether a row holds
anything."""


class TargetSource(Protocol):
    """Gives the teacher features of a micro-batch."""

    specs: list[TaskSpec]
    """The tasks, in the order of insertion, with the shapes that the teachers have."""
    cards: dict[str, dict[str, Any]]
    """For each task what identifies the features."""

    def shapes(self, num_samples: int) -> dict[str, dict[str, Shape]]:
        """Shapes and dtypes of what `load` fills for so many samples."""
        ...

    def load(self, images: Sequence[str | None], out: Loaded | None = None) -> tuple[Loaded, dict[int, str]]:
        """The host half, for the images of a micro-batch; None is a sample without an image. Fills `out`, if given.

        Also gives, by row, why an image could not be read, if this source reads images.
        """
        ...

    def finish(self, loaded: Loaded, device: torch.device) -> tuple[dict[str, Features], dict[str, torch.Tensor]]:
        """Targets (b, n, D) and valid bool (b,) of each task, on `device`. Invalid rows may hold anything."""
        ...


class CachedTargets:
    """Rows of a feature store, in its storage dtype, as `stored_rows` reads them."""

    def __init__(self, recipe: Recipe) -> None:
        self.store = open_store(recipe, recipe.targets.store)
        self.groups = {name: self.store[store_key_of(recipe, name)] for name in recipe.task_order}
        self.specs = [
            task_spec(name, recipe.tasks[name], group.layout.tokens, group.layout.dim)
            for name, group in self.groups.items()
        ]
        self.cards = {name: group.card for name, group in self.groups.items()}

    def shapes(self, num_samples: int) -> dict[str, dict[str, Shape]]:
        return {name: {**row_shapes(group, num_samples), "valid": ((num_samples,), torch.bool)}
                for name, group in self.groups.items()}  # fmt: skip

    def load(self, images: Sequence[str | None], out: Loaded | None = None) -> tuple[Loaded, dict[int, str]]:
        loaded = allocate(self.shapes(len(images))) if out is None else out
        present = [i for i, image in enumerate(images) if image is not None]
        rows = rows_of(self.store, [images[i] for i in present])
        for name, group in self.groups.items():
            parts = {part: rows for part, rows in loaded[name].items() if part != "valid"}
            loaded[name]["valid"].zero_()[present] = torch.from_numpy(read_rows(group, rows, present, parts))
        return loaded, {}

    def finish(self, loaded: Loaded, device: torch.device) -> tuple[dict[str, Features], dict[str, torch.Tensor]]:
        targets, valid = {}, {}
        for name, parts in loaded.items():
            tensors = {part: values.to(device, non_blocking=True) for part, values in parts.items()}
            features = tensors["features"]
            targets[name] = ScaledFeatures(features, tensors["scales"]) if "scales" in tensors else features
            valid[name] = tensors["valid"]
        return targets, valid


class OnlineTargets:
    """Teachers in the loop: each image is prepared by the loader and run through every teacher in the step.

    A task's teacher is its `model`; without one, what the store's card names, if there is a store; else the teacher's
    default. Where there is a store, the teacher must be the one that filled it.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.roots = ImageRoots(recipe.image_roots)
        self.teachers = {name: _load_teacher(recipe, name, device) for name in recipe.task_order}
        self.specs = [
            task_spec(name, recipe.tasks[name], teacher.card.tokens, teacher.card.dim)
            for name, teacher in self.teachers.items()
        ]
        self.cards = {name: teacher.card.to_dict() for name, teacher in self.teachers.items()}
        self._blanks = {name: teacher.prepare(Image.new("RGB", (1, 1))) for name, teacher in self.teachers.items()}

    def shapes(self, num_samples: int) -> dict[str, dict[str, Shape]]:
        return {
            name: {
                "pixels": ((num_samples, *blank.shape), torch.from_numpy(blank).dtype),
                "valid": ((num_samples,), torch.bool),
            }
            for name, blank in self._blanks.items()
        }

    def load(self, images: Sequence[str | None], out: Loaded | None = None) -> tuple[Loaded, dict[int, str]]:
        from olavlm.teachers import TeacherError

        loaded = allocate(self.shapes(len(images))) if out is None else out
        pictures, bad = [], {}
        for row, image in enumerate(images):
            try:
                pictures.append(None if image is None else self.roots.open(image))
            except BadImage as e:
                pictures.append(None)
                bad[row] = str(e)
        for name, teacher in self.teachers.items():
            for row, picture in enumerate(pictures):
                try:
                    loaded[name]["pixels"].numpy()[row] = 0 if picture is None else teacher.prepare(picture)
                except TeacherError as e:
                    raise TargetsError(str(e)) from None
                loaded[name]["valid"][row] = picture is not None
        return loaded, bad

    def finish(self, loaded: Loaded, device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        targets, valid = {}, {}
        for name, parts in loaded.items():
            moved = {part: values.to(device, non_blocking=True) for part, values in parts.items()}
            targets[name] = self.teachers[name].forward(moved["pixels"])
            valid[name] = moved["valid"] & targets[name].isfinite().all(dim=(1, 2))
        return targets, valid


def _load_teacher(recipe: Recipe, name: str, device: torch.device):
    from olavlm.teachers import TeacherError, load_teacher

    task, stored = recipe.tasks[name], {}
    if recipe.targets.store is not None:
        store = FeatureStore(recipe.targets.store)
        if (key := store_key_of(recipe, name)) in store.teachers:
            stored = store[key].card
            _check_card(recipe, name, stored)
    try:
        teacher = load_teacher(
            task.teacher or name,
            model=task.model or stored.get("model"),
            revision=None if task.model else stored.get("revision"),
            recipe=task.recipe,
            geometry=recipe.targets.geometry,
            device=device,
            compute_dtype=stored.get("compute_dtype", "float32"),
        )
    except TeacherError as e:
        raise TargetsError(f"tasks.{name}: {e}") from None
    if stored and teacher.card.fingerprint() != stored["fingerprint"]:
        raise TargetsError(
            f"tasks.{name}: the teacher {teacher.card.model} is not the one that filled "
            f"{redacted(recipe.targets.store)} ({stored['model']}); name that one, or no store"
        )
    return teacher


def task_spec(name: str, task: TaskConfig, tokens: int, dim: int) -> TaskSpec:
    return TaskSpec(name, tokens, dim, tuple(task.layers), task.weight, task.predictor_width)


def check_targets(recipe: Recipe, dataset: Dataset, stage: Stage) -> None:
    """Refuse a store that cannot serve the recipe, before any model is loaded.

    Raises:
        RecipeError: targets from the cache, and no store named; teachers that are to see what the base encoder sees,
            and do not in this stage.
        TargetsError: the store is not there, lacks a teacher, holds features of another recipe, teacher or geometry, or
            does not cover the dataset. Says what is missing and the command that makes it.
    """
    seen, base = recipe.targets.geometry, recipe.base_geometry(stage)
    if recipe.tasks and seen not in ("reference", base):
        raise RecipeError(
            f"targets.geometry is {seen}, and the base encoder sees {base} in {stage}, so that their grids do not line "
            f"up; set model.geometry to {seen}, or targets.geometry to {base} or reference"
        )
    if recipe.targets.source == "online" or not recipe.tasks:
        return
    if recipe.targets.store is None:
        raise RecipeError("targets.store is not set; name a store of olavlm-extract, or set targets.source to online")
    try:
        store = open_store(recipe, recipe.targets.store)
        store.teachers  # noqa: B018 - is it readable?
    except CacheError as e:
        raise TargetsError(f"{e}: {extract_command(recipe, recipe.task_order)}") from None
    keys = {name: store_key_of(recipe, name) for name in recipe.task_order}
    lacking = [name for name, key in keys.items() if key not in store.teachers]
    if lacking:
        raise TargetsError(
            f"store {redacted(recipe.targets.store)} lacks {', '.join(keys[name] for name in lacking)} "
            f"(it has {', '.join(store.teachers) or 'nothing'}); make it with: {extract_command(recipe, lacking)}"
        )
    for name, key in keys.items():
        _check_card(recipe, name, store[key].card)
    if not len(dataset.images()):
        if recipe.fuses:
            return
        raise TargetsError(f"{', '.join(recipe.files)}: no sample has an image, so there is nothing to distil")
    rows = rows_in_plan(store, dataset, extract_command(recipe, recipe.task_order))
    for name, key in keys.items():
        check_covered(store, key, rows, extract_command(recipe, [name]))


def _check_card(recipe: Recipe, name: str, card: dict[str, Any]) -> None:
    from olavlm.teachers import TeacherError, look_up  # names and recipes; no model library is imported

    task = recipe.tasks[name]
    teacher = task.teacher or name
    try:
        _, features = look_up(teacher, task.recipe)
    except TeacherError as e:
        raise RecipeError(f"tasks.{name}: {e}") from None
    wanted = {
        "name": (card.get("name"), teacher),
        "recipe": (card.get("recipe", {}).get("name"), features),
        "geometry": (card.get("geometry"), recipe.targets.geometry),
    }
    for what, (there, here) in wanted.items():
        if there != here:
            raise TargetsError(
                f"store {redacted(recipe.targets.store)}, '{store_key_of(recipe, name)}': {what} is {there!r}, the "
                f"recipe wants {here!r}; make another store with: {extract_command(recipe, [name], 'ANOTHER_STORE')}"
            )


def store_key_of(recipe: Recipe, name: str) -> str:
    """Where the store keeps a task's features: its `key`, or what `olavlm-extract` calls them by default."""
    from olavlm.teachers import TeacherError, store_key

    task = recipe.tasks[name]
    try:
        return task.key or store_key(task.teacher or name, task.recipe)
    except TeacherError as e:
        raise RecipeError(f"tasks.{name}: {e}") from None


def extract_command(recipe: Recipe, names: Sequence[str], store: str | None = None) -> str:
    """The command that makes, or finishes, the features of these tasks, by the recipe's store unless another is named.

    Several commands, where a task needs flags that go with one teacher alone. Where the recipe's store has the features
    in part, model and dtypes are those they were begun with.
    """
    alone = [name for name in names if recipe.tasks[name].recipe or recipe.tasks[name].key]
    groups = [[name for name in names if name not in alone], *([name] for name in alone)]
    return " && ".join(_extract_command(recipe, group, store) for group in groups if group)


def _extract_command(recipe: Recipe, names: Sequence[str], store: str | None) -> str:
    words, dtypes, computed = [], set(), set()
    for name in names:
        task, model = recipe.tasks[name], recipe.tasks[name].model
        if store is None and (group := _stored(recipe, name)) is not None:
            model = model or group.card.get("model")
            dtypes.add(group.layout.dtype)
            computed.add(group.card.get("compute_dtype", "float32"))
        words += ["--teacher", f"{task.teacher or name}={model}" if model else task.teacher or name]
    if len(names) == 1:
        task = recipe.tasks[names[0]]
        words += ["--recipe", task.recipe] if task.recipe else []
        words += ["--as", task.key] if task.key else []
    if recipe.targets.geometry != "reference":
        words += ["--geometry", recipe.targets.geometry]
    words += ["--dtype", *dtypes] if len(dtypes) == 1 and dtypes != {"float16"} else []
    words += ["--compute-dtype", *computed] if len(computed) == 1 and computed != {"float32"} else []
    words += ["--data", *recipe.files, "--images", *recipe.image_roots]
    words += ["--store", store or recipe.targets.store or "STORE"]
    return shlex.join(["olavlm-extract", *map(redacted, words)])


def _stored(recipe: Recipe, name: str) -> TeacherFeatures | None:
    if recipe.targets.store is None:
        return None
    try:
        return FeatureStore(recipe.targets.store)[store_key_of(recipe, name)]
    except CacheError:
        return None


def tokens_without_losses(recipe: Recipe) -> list[TaskSpec]:
    """The tasks, with the shapes of the store's features and no layer: their tokens are inserted and nothing more.

    RecipeError without a store to take the shapes from.
    """
    if recipe.targets.store is None:
        raise RecipeError("targets.store is not set; it gives the task tokens their shapes (or set every task to null)")
    return [replace(spec, layers=()) for spec in CachedTargets(recipe).specs]


def open_targets(recipe: Recipe, device: torch.device) -> TargetSource:
    """The recipe's source."""
    return OnlineTargets(recipe, device) if recipe.targets.source == "online" else CachedTargets(recipe)
