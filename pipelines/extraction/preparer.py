"""Images ahead of the forward: each is read and decoded once, and prepared for every teacher that wants it.

Nothing of an image outlives its preparation but the network inputs, which go straight into the place that they have in
their batch, in pinned memory where a GPU takes them from.

JPEG is decoded at its full size. Scaled decoding (`Image.draft`) would take half the time, but not leave the features
alone: measured on photographs of 512 to 1411 pixels it moved pixels by up to 81 of 255 levels and an EfficientNet's
pooled features to a cosine of 0.971, and to 0.999 where a picture of twice the size needed was asked for.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from olavlm.cache import BadImage, ImageRoots, decode_rgb

from .device import Cpu, Gpu
from .shard_job import ShardJob


class Batch:
    """Rows [start, stop) of a shard that go through the network together.

    A rejected image keeps its place, as zeros, and the last batch of a shard is padded with zeros, so that a row's
    features depend on neither.
    """

    def __init__(self, job: ShardJob, start: int, stop: int, size: int, device: Cpu | Gpu) -> None:
        self.job, self.start, self.stop = job, start, stop
        self.images_sha256: list[str | None] = [None] * (stop - start)
        self.rejections: list[tuple[str, str] | None] = [None] * (stop - start)
        self.ready = threading.Event()
        """Every image has been seen to."""
        self._size, self._device = size, device
        self._lock, self._awaited = threading.Lock(), stop - start
        self._room: torch.Tensor | None = None
        self._filled = np.zeros(size, bool)

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its shard."""
        return self.stop == self.job.task.stop

    def put(self, row: int, pixels: np.ndarray) -> None:
        """What the teacher prepared of the image of `row`."""
        with self._lock:
            if self._room is None:
                self._room = self._device.room(self._size, pixels)
        self._room.numpy()[row - self.start] = pixels
        self._filled[row - self.start] = True

    def reject(self, row: int, sha256: str | None, error: BadImage) -> None:
        """The image of `row` cannot become features; `sha256` is of its bytes, if they could be read."""
        self.images_sha256[row - self.start] = sha256
        self.rejections[row - self.start] = error.reason, error.detail

    def arrived(self) -> None:
        """One more image was seen to."""
        with self._lock:
            self._awaited -= 1
            if not self._awaited:
                self.ready.set()

    def take(self) -> torch.Tensor | None:
        """The network's input, once: a full batch, on the host; None if no image of it could be prepared."""
        room, self._room = self._room, None
        if room is not None:
            room.numpy()[~self._filled] = 0
        return room


class Preparer:
    """The images of one block: `ask` for those of a batch, and they come, in the order asked for, in threads."""

    def __init__(
        self,
        batches: Iterable[Batch],
        roots: ImageRoots,
        threads: ThreadPoolExecutor,
        on_image: Callable[[], None],
    ) -> None:
        self._roots, self._threads, self._on_image = roots, threads, on_image
        self._wanted: dict[int, list[Batch]] = {}
        for batch in batches:
            for row in range(batch.start, batch.stop):
                self._wanted.setdefault(row, []).append(batch)

    def ask(self, batch: Batch) -> None:
        """Again does nothing. A row of it that another batch wants too is prepared for both."""
        for row in range(batch.start, batch.stop):
            batches = self._wanted.pop(row, None)
            if batches is not None:
                self._threads.submit(self._prepare, row, batches)

    def _prepare(self, row: int, batches: list[Batch]) -> None:
        wanted = [batch for batch in batches if batch.job.live]
        try:
            if wanted:
                self._prepare_for(row, wanted)
        except Exception as e:  # memory, or a decoder's own
            for batch in wanted:
                batch.job.fail(e)
        for batch in batches:
            batch.arrived()
        self._on_image()

    def _prepare_for(self, row: int, batches: list[Batch]) -> None:
        image, sha256 = batches[0].job.group.plan.image_of(row), None
        try:
            data = self._roots.read(image)
            sha256 = hashlib.sha256(data).hexdigest()
            picture = decode_rgb(data, image)
        except BadImage as e:
            for batch in batches:
                batch.reject(row, sha256, e)
            return
        for batch in batches:
            batch.images_sha256[row - batch.start] = sha256
            try:
                # All but the last get a copy: a teacher of one's own may change what it is given.
                batch.put(row, batch.job.teacher.prepare(picture if batch is batches[-1] else picture.copy()))
            except BadImage as e:
                batch.reject(row, sha256, e)
            except Exception as e:
                batch.job.fail(e)
