"""The three teachers as the public code runs them in its training step, beside our pipeline.

One picture at a time, each prepared on the thread that computes, one teacher after the other. Our arm starts from image
files and ends with committed shards; the public way is spared reading and decoding (its data loader does that), the
decoders that it also runs, and its slower preparation: it uses ours.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import torch
from PIL import Image

from olavlm.cache import ImageRoots
from olavlm.teachers import Teacher

from ..cache.commit import write_arm
from ..figures import Comparison
from ..rounds import Arm, alternate
from .architectures import ARCHITECTURES, load
from .extraction import Job, shares
from .photographs import photographs
from .sizes import Size, Together

PUBLIC, OURS = "one at a time", "olavlm"


def measure(size: Size, folder: Path) -> list[Comparison]:
    return [_compare(work, size, folder / str(number)) for number, work in enumerate(size.publics)]


def _compare(work: Together, size: Size, folder: Path) -> Comparison:
    folder.mkdir()
    images = photographs(folder / "images", work.rows)
    roots = ImageRoots([str(folder / "images")])
    pictures = [roots.open(image) for image in images]
    options = {"device": size.device, "compute_dtype": size.compute_dtype}
    teachers = {ARCHITECTURES[name].teacher: load(name, **options) for name in work.architectures}
    job = Job(teachers, folder / "images", images, work.batch, work.shard_rows, size.device, size.threads)
    arms = {
        PUBLIC: one_at_a_time(list(teachers.values()), pictures, size.device),
        OURS: write_arm(folder / "store", job.prepare),
    }
    seconds = alternate(arms, size.rounds)
    titles = "; ".join(ARCHITECTURES[name].title for name in work.architectures)
    return Comparison(
        title=f"{titles}; {size.compute_dtype}, batches of {work.batch}",
        rows=work.rows,
        bytes=0,
        floor=PUBLIC,
        seconds=seconds,
        notes=[f"{shares(job.stages).capitalize()}."],
    )


def one_at_a_time(teachers: list[Teacher], pictures: list[Image.Image], device: str) -> Arm:
    def arm(_: int) -> float:
        began = perf_counter()
        for picture in pictures:
            for teacher in teachers:
                teacher.forward(torch.from_numpy(teacher.prepare(picture)[None]))
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - began

    return arm
