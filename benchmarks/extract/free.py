"""A teacher and a preparation that cost nothing, over writing and fsyncing the same shard files.

What is left is the pipeline itself: reading image files, handing rows on, encoding, checksums, reading back, commit
records. The floor has its bytes ready, one `write` a file and fsync of file and folder.

The pipeline reads, hashes and decodes an image file for every row whatever the teacher then does with it, so these are
files of one pixel. Rows of the gen teacher are small (2 KB), and there even that is most of the work: the third arm
does nothing but it, in as many threads.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from olavlm.cache import ImageRoots, decode_rgb
from olavlm.teachers import Card

from ..cache.commit import write_arm
from ..cache.olavlm_store import KEY
from ..cache.plain_files import PlainFiles
from ..cache.sizes import Shape
from ..figures import Comparison, spread
from ..rounds import Arm, alternate
from .extraction import Job, shares
from .photographs import specks
from .sizes import Free, Size

MUST = 0.6
BATCH = 32
OURS, IMAGES = "olavlm", "reading, hashing and decoding the image files alone"


class FreeTeacher:
    """Prepares nothing and computes nothing: one zero for any picture, the same block of features for any batch."""

    def __init__(self, shape: Shape, batch: int, device: str) -> None:
        self.card = Card(
            name="free",
            model="none",
            weights_sha256=hashlib.sha256(str(shape).encode()).hexdigest(),
            recipe={"name": "free"},
            geometry="reference",
            size=(1, 1),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            tokens=shape.tokens,
            dim=shape.dim,
            grid=(1, shape.tokens),
        )
        self._nothing = np.zeros(1, np.uint8)
        values = np.random.default_rng(0).standard_normal((batch, shape.tokens, shape.dim), np.float32)
        self._block = torch.from_numpy(values).to(device)

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self._nothing

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self._block

    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self._block[: len(images)].cpu()


def measure(size: Size, folder: Path) -> list[Comparison]:
    return [_compare(free, size, folder / free.shape.key) for free in size.frees]


def _compare(free: Free, size: Size, folder: Path) -> Comparison:
    shape, rows = free.shape, free.shards * free.shape.shard_rows
    images, batch = specks(folder / "images", rows), min(BATCH, shape.shard_rows)
    teacher = FreeTeacher(shape, batch, size.device)
    job = Job({KEY: teacher}, folder / "images", images, batch, shape.shard_rows, size.device, size.threads)
    job.prepare(folder / "complete")()
    plain = PlainFiles(folder / "complete")
    plain.write(folder / "plain")
    plain.check(folder / "plain")
    for written in ("complete", "plain"):
        shutil.rmtree(folder / written)
    job.stages.clear()
    arms = {
        plain.name: write_arm(folder / "plain", lambda path: lambda: plain.write(path)),
        OURS: write_arm(folder / "store", job.prepare),
        IMAGES: _images_alone(folder / "images", images, size.threads),
    }
    seconds = alternate(arms, size.free_rounds)
    rounds = zip(seconds[plain.name], seconds[IMAGES], seconds[OURS], strict=True)
    slower = [max(disk, read) / ours for disk, read, ours in rounds]
    return Comparison(
        title=f"nothing but the pipeline, {shape}",
        rows=rows,
        bytes=rows * shape.row_bytes,
        floor=plain.name,
        seconds=seconds,
        must={OURS: MUST},
        notes=[
            f"Over the slower of the two others: {spread(slower)}.",
            f"{shares(job.stages).capitalize()}.",
        ],
    )


def _images_alone(folder: Path, images: list[str], threads: int) -> Arm:
    roots = ImageRoots([str(folder)])

    def one(image: str) -> None:
        data = roots.read(image)
        hashlib.sha256(data).hexdigest()
        decode_rgb(data, image)

    def arm(_: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            began = perf_counter()
            list(pool.map(one, images))
            return perf_counter() - began

    return arm
