"""COCO mIoU: classes of pixels against COCO's panoptic annotations, read as semantic ones.

The published form: a JSON file with `images`, `annotations` (`image_id`, the PNG's `file_name`, `segments_info`) and
`categories`, and a folder of PNGs in which a pixel's segment is R + 256 G + 256^2 B. Classes are the categories in the
file's order (133: things, then stuff); 0 and what no segment claims is void, which counts nowhere. Segments of crowds
count as their class.

The score is of the dataset: intersections and unions are summed over all images ahead of the division. The mean over
images of each image's own mean, which the public code of OLA-VLM reports, is beside it: a rare class weighs less in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from olavlm.pipelines.cli import JobFailed

VOID = 255
_NO_NAME = re.compile(r"LABEL_\d+")  # what the library calls a class that has none


@dataclass(frozen=True)
class PanopticImage:
    """An annotated image."""

    file_name: str
    """Of the photograph."""
    png: str
    size: tuple[int, int]
    """height, width"""
    segments: dict[int, int]
    """class of each segment id"""


@dataclass(frozen=True)
class PanopticLabels:
    """The annotations of a dataset."""

    folder: Path
    """Of the PNGs."""
    names: list[str]
    """Of the classes."""
    images: list[PanopticImage]

    @classmethod
    def read(cls, file: str | Path, folder: str | Path) -> PanopticLabels:
        """Read `panoptic_val2017.json` or its like.

        Raises:
            JobFailed: not of that form, a category that is not listed, or more classes than void leaves room for.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            categories = content["categories"]
            classes = {category["id"]: i for i, category in enumerate(categories)}
            photographs = {image["id"]: image for image in content["images"]}
            images = []
            for annotation in content["annotations"]:
                photograph = photographs[annotation["image_id"]]
                segments = {s["id"]: classes[s["category_id"]] for s in annotation["segments_info"]}
                size = photograph["height"], photograph["width"]
                images.append(PanopticImage(photograph["file_name"], annotation["file_name"], size, segments))
            names = [category["name"] for category in categories]
        except (ValueError, KeyError, TypeError) as e:
            raise JobFailed(f"{file}: not COCO's panoptic annotations ({e!r}); give panoptic_val2017.json") from e
        if len(names) > VOID:
            raise JobFailed(f"{file}: {len(names)} categories, and {VOID} means void; at most {VOID} fit")
        return cls(Path(folder), names, images)

    def semantic(self, image: PanopticImage) -> np.ndarray:
        """The class of each pixel, int64 (height, width); `VOID` where there is none.

        Raises:
            JobFailed: another size than the file says, or a segment that it does not list.
            OSError: the PNG cannot be read.
        """
        file = self.folder / image.png
        with Image.open(file) as picture:
            rgb = np.asarray(picture.convert("RGB")).astype(np.int64)
        if rgb.shape[:2] != image.size:
            raise JobFailed(f"{file}: {rgb.shape[:2]} pixels, and its JSON file says {image.size}; fetch both again")
        segments = rgb @ np.array([1, 256, 256**2])
        known, where = np.unique(segments, return_inverse=True)
        unlisted = [int(s) for s in known if s and int(s) not in image.segments]
        if unlisted:
            raise JobFailed(f"{file}: segment {unlisted[0]} is not in its JSON file; fetch both again")
        return np.array([image.segments.get(int(s), VOID) for s in known])[where].reshape(segments.shape)


def match_classes(model: Sequence[str], dataset: Sequence[str]) -> np.ndarray:
    """For each class of the model its number in the dataset, int64: by name, or by order if the model's have no names.

    Raises:
        JobFailed: other classes, or another number of them.
    """
    if all(_NO_NAME.fullmatch(name) for name in model) and len(model) == len(dataset):
        return np.arange(len(model))
    numbers = {name: i for i, name in enumerate(dataset)}
    unknown = [name for name in model if name not in numbers]
    if unknown or len(set(model)) != len(dataset):
        said = f"such as {unknown[0]!r}" if unknown else "and lacks some"
        raise JobFailed(
            f"the model has {len(model)} classes, the annotations {len(dataset)}: {len(unknown)} of the model's are "
            f"not among them, {said}; score a model of the same categories"
        )
    return np.array([numbers[name] for name in model])


class MiouScore:
    """Sums intersections and unions, image by image.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.confusion = np.zeros((len(names), len(names)), np.int64)  # truth, prediction
        self.per_image: list[float] = []

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count an image: classes (height, width) of each pixel; where the truth is `VOID` nothing counts.

        Raises:
            ValueError: another shape, or a predicted class that does not exist.
        """
        if truth.shape != predicted.shape:
            raise ValueError(f"truth {truth.shape} and prediction {predicted.shape} differ in size")
        counted = truth != VOID
        truth, predicted = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
        count = len(self.names)
        if predicted.size and (predicted.min() < 0 or predicted.max() >= count):
            raise ValueError(f"predicted classes from {predicted.min()} to {predicted.max()}: {count} exist, from 0")
        own = np.bincount(truth * count + predicted, minlength=count * count).reshape(count, count)
        self.confusion += own
        if own.any():
            self.per_image.append(float(np.nanmean(class_ious(own))))

    def result(self) -> dict[str, Any]:
        """`miou` of the dataset (0 to 1), `miou_per_image`, the number of images, and `classes`, IoU by name.

        A mean is over the classes that the truth has; `classes` holds None for the others.
        """
        ious = class_ious(self.confusion)
        return {
            "miou": float(np.nanmean(ious)) if np.isfinite(ious).any() else float("nan"),
            "miou_per_image": float(np.mean(self.per_image)) if self.per_image else float("nan"),
            "images": len(self.per_image),
            "classes": {n: None if np.isnan(v) else float(v) for n, v in zip(self.names, ious, strict=True)},
        }

    @property
    def value(self) -> float:
        return self.result()["miou"]


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64, of counts (truth, prediction); NaN where the truth has none."""
    both, truth = np.diag(confusion).astype(np.float64), confusion.sum(axis=1)
    union = truth + confusion.sum(axis=0) - both
    return np.where(truth > 0, both / np.maximum(union, 1), np.nan)
