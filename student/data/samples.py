"""Samples as they are trained on: which of them, their turns, and what cannot be used."""

from __future__ import annotations

import numpy as np

from olavlm.cache import BadImage, Dataset, DatasetError, ImageRoots, Sample
from olavlm.student.errors import SampleError
from olavlm.student.text.conversation import IMAGE_TOKEN, check_turns


def prompt_turns(sample: Sample) -> list[dict[str, str]]:
    """A sample's turns, of which one has `<image>` if and only if there is an image.

    In a sample without one, `<image>` is text about HTML or the like, and loses its meaning. SampleError for an image
    whose place the text does not name.
    """
    if sample.image is None:
        return [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, "< image>")} for turn in sample.conversations]
    if not any(IMAGE_TOKEN in turn["value"] for turn in sample.conversations if turn["from"] == "human"):
        raise SampleError(f"sample {sample.id}: it has an image, {sample.image}, and no {IMAGE_TOKEN} in a human turn")
    return sample.conversations


def check_samples(dataset: Dataset, template: str) -> None:
    """SampleError for the first sample whose turns do not make a prompt: at the start of a run, not hours into it."""
    for sample in dataset:
        check_turns(prompt_turns(sample), template, sample.id)


def check_images(dataset: Dataset, roots: ImageRoots, tries: int = 16) -> None:
    """DatasetError if none of some images, spread over the dataset, can be read: a wrong root, not bad images."""
    images = dataset.images()
    failures = []
    for i in np.linspace(0, len(images) - 1, min(tries, len(images))).round().astype(int):
        try:
            roots.open(images[int(i)].as_py())
            return
        except BadImage as e:
            failures.append(e)
    if failures:
        raise DatasetError(
            f"none of {len(failures)} images tried can be read, the first: {failures[0]}; check data.images"
        )


def choose_samples(num_samples: int, fraction: float, seed: int) -> np.ndarray:
    """Indices of a random part of a dataset, ascending, int64; the same for the same seed."""
    if fraction == 1.0:
        return np.arange(num_samples)
    generator = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
    return np.sort(generator.permutation(num_samples)[: max(1, round(num_samples * fraction))])
