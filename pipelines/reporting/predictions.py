"""Targets and predictions of some samples of a PT run: what `features.py` draws.

The samples take the trainer's own way: its collator, its target source, and a forward with labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from olavlm.cache import BadImage, Dataset, DatasetError
from olavlm.cache.recorded_roots import reachable_root, started_in
from olavlm.student.adapter import read_adapter
from olavlm.student.config import Recipe
from olavlm.student.data.collator import Collator
from olavlm.student.data.targets import OnlineTargets, TargetSource, open_targets
from olavlm.student.loading import DTYPES
from olavlm.student.recipes import load_recipe
from olavlm.student.training.pictures import cosine
from olavlm.student.training.trainer import open_data


@dataclass
class TaskView:
    """A task's target and predictions for one sample."""

    name: str
    tokens: int
    grid: tuple[int, ...]
    """(rows, columns) of the tokens, () if the card does not say"""
    target: np.ndarray | None
    """(tokens, dim) float32, None if there is none"""
    why: str
    """why there is no target, '' if there is one"""
    predictions: dict[int, np.ndarray]
    """for each layer (tokens, dim) float32; empty if the image did not reach the model"""
    cosines: dict[int, tuple[float, float | None]]
    """for each layer: with its own target, and the mean with those of the other samples, None if there is no other"""


@dataclass
class SampleView:
    """A sample, and what its tasks hold for it, in the order of insertion."""

    image: str
    text: str
    """its first answer, such as a caption"""
    photograph: Image.Image | None
    """upright, RGB; None if it cannot be read"""
    tasks: list[TaskView]


def predict(
    run: Path, *, num_samples: int, store: str | None = None, images: Sequence[str] | None = None
) -> list[SampleView]:
    """Targets of samples spread over the data, and what the predictors of a finished PT run make of them.

    Args:
        run: a run folder with `recipe.yaml` and an adapter.
        store, images: instead of the recipe's.

    Raises:
        StudentError, CacheError, TeacherError, OSError: the recipe, data, store or models cannot be had any more.
    """
    recipe = reachable_recipe(run, store, images)
    adapter = read_adapter(run)
    dataset, roots = open_data(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_targets(recipe, device)
    indices = evenly_spaced(dataset, num_samples)
    options = {"dtype": DTYPES[recipe.model.dtype], "attn_implementation": recipe.model.attention}
    model, tokenizer = adapter.build(with_predictors=True, **options)
    collator = Collator.of(recipe, model, tokenizer, dataset, roots, source)
    model = model.to(device).eval()
    batch = collator.collate(indices)
    inputs = ("input_ids", "attention_mask", "labels", "pixel_values")
    with torch.inference_mode():
        output = model(**{name: getattr(batch, name).to(device) for name in inputs})
        targets, valid = source.finish(batch.targets, device)
    predictions = {name: values.float().cpu().numpy() for name, values in output.predictions.items()}
    known = {name: values.float().cpu().numpy() for name, values in targets.items()}
    grids, views = _grids(source), []
    for row, index in enumerate(indices):
        sample, tasks = dataset[index], []
        for task in model.tasks:
            rows = torch.nonzero(valid[task.name].cpu()).flatten().tolist()
            own = {layer: predictions[f"{task.name}/{layer}"][row] for layer in task.layers if batch.complete[row]}
            target = known[task.name][row] if row in rows else None
            others = [known[task.name][r] for r in rows if r != row]
            pairs = {layer: compared(p, target, others) for layer, p in own.items() if target is not None}
            why = "" if target is not None else _why(source, task.name, sample.image)
            tasks.append(TaskView(task.name, task.tokens, grids[task.name], target, why, own, pairs))
        try:
            photograph = roots.open(sample.image)
        except BadImage:
            photograph = None
        answers = [turn["value"].strip() for turn in sample.conversations if turn["from"] == "gpt"]
        views.append(SampleView(sample.image, answers[0] if answers else "", photograph, tasks))
    return views


def reachable_recipe(run: Path, store: str | None = None, images: Sequence[str] | None = None) -> Recipe:
    """A PT run's recipe with its relative paths as they can be reached from here, and what is given instead."""
    recipe = load_recipe(str(run / "recipe.yaml"), [], "pt")
    base = started_in(run, recipe.train.output_dir)

    def reach(path: str) -> str:
        return str(base / path) if base is not None and (base / path).exists() else path  # as for image roots

    recipe.data.file = [reach(file) for file in recipe.files]
    recipe.data.images = list(images or [reachable_root(root, base) or root for root in recipe.image_roots])
    if store:
        recipe.targets.store, recipe.targets.source = store, "cache"
    elif recipe.targets.store:
        recipe.targets.store = reach(recipe.targets.store)
    for task in recipe.tasks.values():
        task.model = task.model and reach(task.model)
    return recipe


def evenly_spaced(dataset: Dataset, count: int) -> list[int]:
    """Indices of `count` samples with different images (of all, if there are fewer), evenly spread over the data."""
    images = dataset.images()
    if not len(images):
        raise DatasetError("no sample of the data has an image")
    column = dataset.table.column("image")
    wanted = np.linspace(0, len(images) - 1, min(count, len(images))).round()
    return [pc.index(column, pa.scalar(images[int(i)].as_py(), pa.large_string())).as_py() for i in wanted]


def _grids(source: TargetSource) -> dict[str, tuple[int, ...]]:
    if isinstance(source, OnlineTargets):
        return {name: tuple(teacher.card.grid) for name, teacher in source.teachers.items()}
    return {name: tuple(group.card.get("grid") or ()) for name, group in source.groups.items()}


def _why(source: TargetSource, task: str, image: str) -> str:
    if isinstance(source, OnlineTargets):
        return "the image cannot be read"
    failure = source.groups[task].failure(image)
    assert failure is not None, image
    return f"quarantined: {failure.reason}"


def compared(prediction: np.ndarray, own: np.ndarray, others: list[np.ndarray]) -> tuple[float, float | None]:
    """Its cosine with its own target, and the mean with others', None without any."""
    apart = [cosine(prediction, other) for other in others]
    return cosine(prediction, own), statistics.fmean(apart) if apart else None
