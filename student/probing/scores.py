"""Scores of probes on held-out images: the cosine of each whole prediction with its target, and its mean over images.

Source: arXiv 2412.09585, figure 3. The intervals are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from olavlm.cache import Dataset, ImageRoots
from olavlm.cache.images import redacted
from olavlm.student.data.batches import batches
from olavlm.student.data.samples import check_images
from olavlm.student.errors import ModelError, TargetsError
from olavlm.student.loading import DTYPES
from olavlm.student.losses.scaled_features import Features, ScaledFeatures

from .bank import ProbeRun
from .model import TURNS, check_layout, load_probed, probe_collator
from .rows import ProbeRows
from .settings import ProbeData
from .training import TRAIN_IMAGES


@dataclass
class Cosines:
    """What one run's probes reach on each image."""

    run: ProbeRun
    images: list[str]
    """All that were asked about, in the order of the data."""
    values: dict[str, dict[int, np.ndarray]]
    """By task and layer: float64 (images,), NaN for an image that is left out."""
    unreadable: int
    """Images that could not be read, and are left out of every task."""
    quarantined: dict[str, int]
    """By task: further images that have no target (of a fusion baseline: or no features to be fed)."""
    seen: int
    """Images that the probes were trained on, by their paths: of these no score tells anything."""


@dataclass(frozen=True)
class Score:
    """A mean over images with its bootstrap interval, and how the images spread."""

    mean: float
    low: float
    high: float
    images: int
    std: float
    quantiles: list[float]
    """Least, first quartile, median, third quartile and greatest."""


class _InOrder:
    """A dataset once, in its order, in batches of `size`: the last may be smaller."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def slices(self, step: int, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
        return [np.arange(step * self.size, min(self.count, (step + 1) * self.size))]


def probe_cosines(
    folder: Path,
    data: ProbeData,
    *,
    model_path: str | None = None,
    batch_size: int = 16,
    workers: int = 4,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> Cosines:
    """Evaluate a finished run of probes on the distinct images of the data.

    Args:
        folder: its run folder.
        model_path: where the probed model lies now, if it has moved.
        on_images: called after each batch with its number of images and that of all.

    Raises:
        ModelError: no such run, a model that has changed, or whose sequences are not those of the training; a
            prediction or a target without a direction.
        TargetsError: a store that lacks features, or has those of other teachers.
        CacheError: the data cannot be read.
        TrainingError: a loader that died, or images that are gone.
    """
    run = ProbeRun.load(folder)
    dataset, roots = Dataset(data.files).asking(TURNS), ImageRoots(data.images)
    rows = ProbeRows(data, {name: teacher.key for name, teacher in run.teachers.items()})
    for name, teacher in run.teachers.items():
        if (found := rows.cards[name].get("fingerprint")) != teacher.fingerprint:
            raise TargetsError(
                f"store {redacted(data.store)}, {teacher.key!r}: fingerprint {str(found)[:16]}, and the probes in "
                f"{folder} were trained on {teacher.fingerprint[:16]}; extract the images with the teacher "
                f"{teacher.card.get('model')}"
            )
    rows.check_covers(dataset)
    check_images(dataset, roots)
    bank = run.bank(folder).to(device)
    model, _ = load_probed(run.find_model(folder, model_path), dtype=DTYPES[run.dtype], template=run.template)
    check_layout(model, run.layout, folder)
    rows.feed(model.fused_teachers, dataset)
    model.to(device)
    values = {task.name: {x: np.full(len(dataset), np.nan) for x in task.layers} for task in run.tasks}
    valid = {task.name: np.zeros(len(dataset), bool) for task in run.tasks}
    unreadable, place = 0, 0
    sampler = _InOrder(len(dataset), batch_size)
    collator = probe_collator(model, dataset, roots, rows)
    loading = batches(
        collator, sampler, range(len(sampler)), rank=0, world_size=1, accumulation=1, workers=workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    with loading as loaded, torch.no_grad():
        for (micro,) in loaded:
            batch = rows.on_device(micro, device)
            states, mask = model.states(bank.layers, **batch.inputs)
            here = slice(place, place + len(micro.ids))
            for task in run.tasks:
                usable = batch.valid[task.name]
                valid[task.name][here] = usable.cpu().numpy()
                for layer in task.layers:
                    found = cosines(bank(task.name, layer, states[layer], mask), batch.targets[task.name])
                    values[task.name][layer][here] = torch.where(usable, found, torch.nan).cpu().numpy()
            unreadable += len(micro.bad_images)
            place = here.stop
            on_images(len(micro.ids), len(dataset))
    images = dataset.images().to_pylist()
    for name, by_layer in values.items():
        for layer, found in by_layer.items():
            if (undefined := valid[name] & ~np.isfinite(found)).any():
                raise ModelError(
                    f"{folder}: {name}, layer {layer}, {images[int(undefined.argmax())]}: no cosine, for prediction or "
                    "target is zero or not finite"
                )
    return Cosines(
        run=run,
        images=images,
        values=values,
        unreadable=unreadable,
        quarantined={name: int((~there).sum()) - unreadable for name, there in valid.items()},
        seen=_count_seen(folder, dataset.images()),
    )


def cosines(predictions: torch.Tensor, targets: Features) -> torch.Tensor:
    """Cosines of (b, n, D) predictions with targets, each sample flattened as a whole: float64 (b,)."""
    targets = targets.float() if isinstance(targets, ScaledFeatures) else targets
    p, t = predictions.double().flatten(1), targets.double().flatten(1)
    return (p * t).sum(dim=1) / (p.norm(dim=1) * t.norm(dim=1))


def _count_seen(folder: Path, images: pa.Array) -> int:
    trained = pq.read_table(folder / TRAIN_IMAGES).column("image")
    return int(pc.sum(pc.is_in(images, value_set=trained.cast(images.type))).as_py())


def score(values: np.ndarray, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> list[Score]:
    """The mean of each row of values (k, images) over images, with the percentile bootstrap's interval of it.

    Images are drawn anew, with replacement, and together for all rows: equal numbers of images and an equal seed give
    equal draws, so that rows scored apart can be compared. Images with a NaN in some row are left out of all.

    Args:
        resamples: draws of as many images as there are.
        level: the part of the draws whose means lie within the interval.
    """
    values = values[:, ~np.isnan(values).any(axis=0)]
    count = values.shape[1]
    if not count:
        return [Score(np.nan, np.nan, np.nan, 0, np.nan, [np.nan] * 5) for _ in values]
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    tails = [(1 - level) / 2, (1 + level) / 2]
    lows, highs = np.quantile(draws @ values.T / count, tails, axis=0).tolist()
    return [
        Score(
            mean=float(row.mean()),
            low=low,
            high=high,
            images=count,
            std=float(row.std()),
            quantiles=np.quantile(row, [0, 0.25, 0.5, 0.75, 1]).tolist(),
        )
        for row, low, high in zip(values, lows, highs, strict=True)
    ]
