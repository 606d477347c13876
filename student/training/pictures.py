"""Pictures during training: what the predictors make of a few samples that the run does not train on.

Every `train.pictures_every` steps, RUN/pictures/step-000100/00-cat.png and so on, a sheet a sample: the photograph, and
in a row for each task its target and the prediction of each layer, in colours that need no decoder (the principal
components of the target's tokens). Where a task's teacher is named by a local folder (`tasks.NAME.model`), a second row
is decoded by that teacher's own decoder: depth maps, classes. The samples are loaded once and the model's state is
left as it was, so no other step is slower or different, and a run that is resumed draws the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from olavlm.cache import BadImage, Dataset, ImageRoots
from olavlm.cache.display import (
    SIDE,
    PcaColours,
    bar_limit,
    enlarged,
    panel,
    sheet,
    token_map,
    vector_bars,
)
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.data.collator import Collator
from olavlm.student.data.encoder_features import check_encoder_features, on_device
from olavlm.student.data.samples import check_samples, choose_samples
from olavlm.student.data.targets import TargetSource, check_targets
from olavlm.student.errors import RecipeError, TargetsError
from olavlm.student.losses.scaled_features import ScaledFeatures

from .parallel import Parallel

FOLDER = "pictures"
_DECODED = ("depth", "seg")  # quickly enough to wait for; unCLIP takes many steps a picture


@runtime_checkable
class PictureTracker(Protocol):
    """A tracker that takes pictures too."""

    def log_pictures(self, step: int, pictures: dict[str, Image.Image]) -> None: ...


def held_out(recipe: Recipe, stage: Stage) -> Dataset | None:
    """The samples that are drawn, `train.pictures` of them with different images; None if the stage draws nothing.

    They are of `data.held_out`, or of what `data.fraction` leaves out.

    Raises:
        RecipeError: the run would train on everything there is.
        SampleError, CacheError: samples that make no prompt, or a file that cannot be read.
        TargetsError: the store does not cover them.
    """
    if recipe.train.pictures_every is None or not recipe.distils(stage):
        return None
    files = recipe.held_out_files
    if files:
        dataset = Dataset(files)
    else:
        whole = Dataset(recipe.files)
        trained = choose_samples(len(whole), recipe.data.fraction, recipe.train.seed)
        dataset = whole.take(np.setdiff1d(np.arange(len(whole)), trained))
    first = _first_of_each_image(dataset, recipe.train.pictures)
    if not first:
        what = f"{', '.join(files)} has no sample with an image" if files else "the run trains on every sample"
        raise RecipeError(
            f"train.pictures_every is {recipe.train.pictures_every}, and {what}: name a dataset file that the run does "
            "not train on by data.held_out, or set train.pictures_every to null"
        )
    chosen = dataset.take(np.array(first))
    check_samples(chosen, recipe.model.template)
    data = dataclasses.replace(recipe.data, file=files or recipe.files)
    of_these = dataclasses.replace(recipe, data=data)  # so that what is said to be missing is of this file
    if recipe.data.encoder_features is not None:
        check_encoder_features(of_these, chosen, stage)
    check_targets(of_these, chosen, stage)
    return chosen


def _first_of_each_image(dataset: Dataset, count: int) -> list[int]:
    seen: dict[str, int] = {}
    for index, image in enumerate(dataset.table.column("image").to_pylist()):
        if len(seen) == count:
            break
        if image is not None:
            seen.setdefault(image, index)
    return list(seen.values())


class HeldOutPictures:
    """Called with a step's number, on every process; the main one draws.

    Args:
        samples: what `held_out` gave.
        collator: the trainer's, of any samples; its settings are used for these.
        parallel: the model, as it is spread over the processes.
        run: the run folder.

    Raises:
        TargetsError: a task's teacher folder holds no decoder.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Dataset,
        collator: Collator,
        source: TargetSource,
        parallel: Parallel,
        accelerator: Accelerator,
        run: Path,
    ) -> None:
        self.every, self.parallel, self.accelerator = recipe.train.pictures_every, parallel, accelerator
        self.tasks, self.source, self.folder = source.specs, source, run / FOLDER
        self.batch = dataclasses.replace(collator, dataset=samples).collate(list(range(len(samples))))
        self.photographs, self.decoders = [], {}
        if accelerator.is_main_process:
            self.photographs = [_open(collator.roots, image) for image in self.batch.images]
            self.decoders = local_decoders(recipe, accelerator.device)
        self.grids = {name: card.get("grid") for name, card in source.cards.items()}

    def __call__(self, step: int, trackers: Sequence[Any]) -> None:
        """Draw, if this is a step to draw at (counted from 1); `trackers` that take pictures get them."""
        if step % self.every:
            return
        predictions, targets = self._predict()
        if not self.accelerator.is_main_process:
            return
        folder, pictures = self.folder / f"step-{step:06d}", {}
        folder.mkdir(parents=True, exist_ok=True)
        for row, image in enumerate(self.batch.images):
            name = f"{row:02d}-{Path(image).stem}"
            pictures[name] = self._sheet(row, predictions, targets)
            private = folder / f".{name}.part"
            pictures[name].save(private, "png")
            private.replace(folder / f"{name}.png")
        for tracker in trackers:
            if isinstance(tracker, PictureTracker):
                tracker.log_pictures(step, pictures)

    def _predict(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """For "task/layer" and for each task (b, n, D) float32; targets that there are not are NaN."""
        device, batch = self.accelerator.device, self.batch
        names = ("input_ids", "attention_mask", "labels", "pixel_values")
        inputs = {name: value.to(device) for name in names if (value := getattr(batch, name)) is not None}
        if batch.encoder_features is not None:
            inputs["image_features"] = on_device(batch.encoder_features, device)
        module = self.parallel.module
        with evaluating(module), torch.no_grad(), self.accelerator.autocast():
            predictions = module(**inputs).predictions
        self.parallel.finish_forward()
        features, valid = self.source.finish(batch.targets, device)
        targets = {}
        for name, values in features.items():
            values = values.float() if isinstance(values, ScaledFeatures) else values
            targets[name] = values.float().masked_fill(~valid[name][:, None, None], torch.nan).cpu().numpy()
        return {name: values.float().cpu().numpy() for name, values in predictions.items()}, targets

    def _sheet(self, row: int, predictions: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> Image.Image:
        photograph, image = self.photographs[row], self.batch.images[row]
        rows = []
        for task in self.tasks:
            features = {"target": targets[task.name][row]}
            if self.batch.complete[row]:
                layers = [layer for layer in task.layers if f"{task.name}/{layer}" in predictions]
                features |= {f"layer {layer}": predictions[f"{task.name}/{layer}"][row] for layer in layers}
            small = "photograph: cannot be read" if photograph is None else _within(photograph)
            rows.append([panel(small, image, ""), *_colour_panels(task.name, features, self.grids[task.name])])
            decoder = self.decoders.get(task.name)
            if decoder is not None and photograph is not None:
                rows.append(_decoded_panels(decoder, features, photograph))
        return sheet(rows)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """With every part in evaluation mode; afterwards each is as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def local_decoders(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The decoders of the tasks whose teacher is a local folder; of depth, and of seg on whole photographs, alone.

    Raises:
        TargetsError: a folder without one.
    """
    from olavlm.teachers import TeacherError
    from olavlm.teachers.decoders import load_decoder

    decoders = {}
    for name, task in recipe.tasks.items():
        teacher = task.teacher or name
        if teacher == "seg" and recipe.targets.geometry != "reference":
            continue  # its decoder reads the whole photograph beside features that would be of a part of it
        if teacher in _DECODED and task.model is not None and Path(task.model).is_dir():
            options = {"recipe": task.recipe} if teacher == "seg" else {}
            try:
                decoders[name] = load_decoder(teacher, model=task.model, device=device, **options)
            except TeacherError as e:
                raise TargetsError(f"train.pictures_every, tasks.{name}.model: {e}") from None
    return decoders


def _open(roots: ImageRoots, image: str) -> Image.Image | None:
    try:
        return roots.open(image)
    except BadImage:
        return None


def _within(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small


def _colour_panels(task: str, features: dict[str, np.ndarray], grid: Sequence[int] | None) -> list[Image.Image]:
    """Target and predictions in the target's own basis and scale; without a target there is none."""
    target = features["target"]
    if not np.isfinite(target).all():
        return [panel("no target", f"{task}, target", "")]
    colours, limit = PcaColours.fit(target), bar_limit(target)
    panels = []
    for name, values in features.items():
        if not np.isfinite(values).all():
            panels.append(panel("not finite", f"{task}, {name}", ""))
            continue
        if len(values) == 1:
            drawn = vector_bars(values[0], (SIDE, SIDE // 2), limit)
        else:
            drawn = enlarged(token_map(values, grid, colours), SIDE)
        said = "" if name == "target" else f"cosine with the target {cosine(values, target):.3f}"
        panels.append(panel(drawn, f"{task}, {name}", said))
    return panels


def _decoded_panels(decoder: Any, features: dict[str, np.ndarray], photograph: Image.Image) -> list[Image.Image]:
    from olavlm.teachers.decoders.drawing import draw

    drawn = draw(decoder, features, photograph, side=SIDE)
    first = panel(drawn.legend or "", f"{decoder.name}, decoded", "by the teacher's own decoder")
    panels = [panel(drawn.pictures.get(name, "not finite"), f"{decoder.name}, {name}", "decoded") for name in features]
    return [first, *panels]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays as flat vectors, in float64; NaN if one of them is zero or not finite."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (a, b))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else math.nan
