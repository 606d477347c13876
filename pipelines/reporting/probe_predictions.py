"""Targets and what the probes of a run predict of some of its images, layer by layer: what `features.py` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from olavlm.cache import BadImage, Dataset, FeatureStore, ImageRoots
from olavlm.cache.recorded_roots import reachable_root, started_in
from olavlm.student.errors import RecipeError, TargetsError
from olavlm.student.probing.predictions import ProbePredictions

from .predictions import SampleView, TaskView, compared, evenly_spaced


def predict_by_probes(
    folder: Path,
    asked: Mapping[str, Any],
    *,
    num_samples: int,
    store: str | None = None,
    images: Sequence[str] | None = None,
) -> list[SampleView]:
    """Views of images spread over those that the probes were trained on; of `images` and `store` instead, if given.

    Args:
        folder: a finished run of `olavlm-probe train`.
        asked: its settings, as `recipe.yaml` has them.

    Raises:
        StudentError, CacheError, OSError: the run, data, store or model cannot be had any more.
    """
    try:
        base, data = started_in(folder, asked["output"]), asked["data"]
        files, roots_given, store_given = list(data["files"]), list(data["images"]), str(data["store"])
    except (KeyError, TypeError) as e:
        raise RecipeError(f"recipe.yaml does not say what the probes were trained on: {e!r}") from None

    def reach(path: str) -> str:
        return str(base / path) if base is not None and (base / path).exists() else path  # as for image roots

    dataset = Dataset([reach(file) for file in files])
    roots = ImageRoots(list(images or [reachable_root(root, base) or root for root in roots_given]))
    features = FeatureStore(store or reach(store_given))
    probes = ProbePredictions(folder, roots, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = [dataset[index].image for index in evenly_spaced(dataset, num_samples)]
    predictions, reached = probes(chosen, probes.run.tasks)
    by_task: dict[str, list[TaskView]] = {}
    for task in probes.run.tasks:
        teacher = probes.run.teachers[task.name]
        group = features[teacher.key]
        if group.card.get("fingerprint") != teacher.fingerprint:
            raise TargetsError(
                f"store {features.path}, {teacher.key!r}: not the features that the probes in {folder} were trained on"
            )
        values, valid = group.read(chosen)
        by_task[task.name] = []
        for row, image in enumerate(chosen):
            own = {layer: p[row].numpy() for layer, p in predictions[task.name].items() if reached[row]}
            target = values[row] if valid[row] else None
            others = [values[r] for r in valid.nonzero()[0] if r != row]
            pairs = {layer: compared(p, target, others) for layer, p in own.items() if target is not None}
            why = "" if valid[row] else f"quarantined: {group.failure(image).reason}"
            grid = tuple(group.card.get("grid") or ())
            by_task[task.name].append(TaskView(task.name, task.tokens, grid, target, why, own, pairs))
    views = []
    for row, image in enumerate(chosen):
        try:
            photograph = roots.open(image)
        except BadImage:
            photograph = None
        views.append(SampleView(image, "", photograph, [of_images[row] for of_images in by_task.values()]))
    return views
