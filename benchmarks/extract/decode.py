"""What JPEG decoding and preparing cost on top of a forward, a picture and a core.

The teachers are tiny ones, whose preparation is that of the real ones: the size of the network's input is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from olavlm.cache import ImageRoots, decode_rgb
from olavlm.teachers import Teacher, load_teacher, make_tiny

from ..cache.commit import write_arm
from ..figures import Comparison
from ..rounds import Arm, alternate
from .extraction import Job
from .photographs import SIZE, photographs
from .sizes import Size

NAMES = ("depth", "seg", "gen")
READ, DECODE = "read and hash", "decode"
ONE, THREE = "all of it for the three, one decode", "all of it for the three, three decodes"


def measure(size: Size, folder: Path) -> list[Comparison]:
    images = photographs(folder / "images", size.photographs)
    tiny = make_tiny(folder / "tiny")
    teachers = {name: load_teacher(name, model=tiny[name], device="cpu") for name in NAMES}
    return [
        _by_step(teachers, folder / "images", images, size.rounds),
        _by_threads(teachers, folder / "images", images, size),
        _in_the_pipeline(teachers, folder, images, size),
    ]


def _by_step(teachers: dict[str, Teacher], folder: Path, images: list[str], rounds: int) -> Comparison:
    roots = ImageRoots([str(folder)])
    files = [roots.read(image) for image in images]
    pictures = [decode_rgb(data) for data in files]

    def read(image: str) -> None:
        hashlib.sha256(roots.read(image)).hexdigest()

    def three_decodes(image: str) -> None:
        for teacher in teachers.values():
            prepare([teacher], roots, image)

    kilobytes = np.mean([len(file) for file in files]) / 1e3
    arms = {
        THREE: _each(three_decodes, images),
        ONE: _each(lambda image: prepare(teachers.values(), roots, image), images),
        READ: _each(read, images),
        DECODE: _each(decode_rgb, files),
        **{name_of(name): _each(teacher.prepare, pictures) for name, teacher in teachers.items()},
    }
    return Comparison(
        title=f"one thread, JPEG photographs of {SIZE[0]} x {SIZE[1]}, {kilobytes:.0f} KB each",
        rows=len(images),
        bytes=0,
        floor=THREE,
        seconds=alternate(arms, rounds),
    )


def name_of(teacher: str) -> str:
    """The arm that prepares a decoded picture for a teacher."""
    return f"prepare for {teacher}"


def prepare(teachers: Iterable[Teacher], roots: ImageRoots, image: str) -> list[np.ndarray]:
    data = roots.read(image)
    hashlib.sha256(data).hexdigest()
    picture = decode_rgb(data, image)
    return [teacher.prepare(picture) for teacher in teachers]


def _each(work: Callable[[object], object], items: list) -> Arm:
    def arm(_: int) -> float:
        began = perf_counter()
        for item in items:
            work(item)
        return perf_counter() - began

    return arm


def _by_threads(teachers: dict[str, Teacher], folder: Path, images: list[str], size: Size) -> Comparison:
    roots = ImageRoots([str(folder)])

    def arm_of(threads: int) -> Arm:
        def arm(_: int) -> float:
            with ThreadPoolExecutor(threads) as pool:
                began = perf_counter()
                list(pool.map(lambda image: prepare(teachers.values(), roots, image), images))
                return perf_counter() - began

        return arm

    counts = sorted({1, 2, size.cores})
    names = {count: f"{count} thread{'s' * (count > 1)}" for count in counts}
    return Comparison(
        title="the same for the three teachers with one decode, in threads",
        rows=len(images),
        bytes=0,
        floor=names[1],
        seconds=alternate({names[count]: arm_of(count) for count in counts}, size.rounds),
    )


class _Prepares:
    """A real preparation before a forward that costs nothing and has little to write."""

    def __init__(self, teacher: Teacher) -> None:
        self.card, self.prepare, self.encode = teacher.card, teacher.prepare, teacher.encode

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch), self.card.tokens, self.card.dim)


def _in_the_pipeline(teachers: dict[str, Teacher], folder: Path, images: list[str], size: Size) -> Comparison:
    """All three in one extraction, which decodes a picture once, over three extractions."""
    wrapped = {name: _Prepares(teacher) for name, teacher in teachers.items()}
    rest = (folder / "images", images, 1, len(images), "cpu", size.cores)
    together, alone = Job(wrapped, *rest), [Job({name: teacher}, *rest) for name, teacher in wrapped.items()]

    def three(path: Path) -> Callable[[], None]:
        path.mkdir()
        runs = [job.prepare(path / str(number)) for number, job in enumerate(alone)]
        return lambda: [run() for run in runs]

    arms = {
        "three extractions": write_arm(folder / "three", three),
        "one extraction": write_arm(folder / "one", together.prepare),
    }
    return Comparison(
        title="through the pipeline, forwards that cost nothing",
        rows=len(images),
        bytes=0,
        floor="three extractions",
        seconds=alternate(arms, size.rounds),
    )
