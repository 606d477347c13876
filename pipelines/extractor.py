"""One worker of an extraction: shards of rows in, committed shards out.

    image roots --(prepare threads)--> network input --(forward, batches)--> features --(write thread)--> shard

Images are read and prepared ahead of the forward, features are written behind it. A batch never crosses a shard, a
rejected image keeps its slot (as zeros) and the last batch is padded, so that a row's bytes do not depend on which
rows are asked for, on how many workers there are, or on which run came before.

Knows nothing of Ray: `extract.py` makes an actor of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch

from olavlm.cache import (
    BadImage,
    FeatureStore,
    ImageRoots,
    LeaseHeld,
    LeaseLost,
    OpenShard,
    ShardTask,
    StoreBuilder,
    decode_rgb,
)
from olavlm.teachers import Teacher, load_teacher

from .cli import quiet_models

BATCHES_AHEAD = 2  # batches of prepared images that wait for the forward
WRITES_BEHIND = 2  # batches of features that wait for the disk


@dataclass(frozen=True)
class TeacherSpec:
    """How to load the teacher behind a store key."""

    key: str
    name: str
    model: str | None = None
    revision: str | None = None
    recipe: str | None = None
    geometry: str = "reference"

    def load(self, device: str) -> Teacher:
        quiet_models()
        return load_teacher(
            self.name,
            model=self.model,
            revision=self.revision,
            recipe=self.recipe,
            geometry=self.geometry,
            device=device,
        )


@dataclass(frozen=True)
class Prepared:
    """A row ready for the forward: the network input, or why there is none."""

    pixels: np.ndarray | None
    sha256: str | None
    reason: str | None = None
    detail: str = ""


@dataclass
class ShardResult:
    """What became of a task. `outcome` is "committed", "done" (another writer was first), "held" (one is at work on it)
    or "lost" (one took it over)."""

    task: ShardTask
    outcome: str
    quarantined: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    bytes: int = 0


class ShardExtractor:
    """Extracts shards with one set of teachers on one device. Not thread-safe; threads inside are its own."""

    def __init__(
        self, store: str, specs: list[TeacherSpec], images: list[str], *, batch_size: int, device: str, threads: int
    ) -> None:
        # One compute thread a worker on the CPU: parallel sums would depend on the number of cores.
        torch.set_num_threads(1)
        self.store, self.batch_size, self.device = store, batch_size, device
        self.specs = {spec.key: spec for spec in specs}
        self.roots = ImageRoots(images)
        self.builder = StoreBuilder(store)
        self._teachers: dict[str, Teacher] = {}
        self._prepare = ThreadPoolExecutor(threads, "prepare")
        self._write = ThreadPoolExecutor(1, "write")

    def _teacher(self, key: str) -> Teacher:
        if key not in self._teachers:
            self._teachers[key] = self.specs[key].load(self.device)
        return self._teachers[key]

    def extract(self, task: ShardTask) -> ShardResult:
        """Extract and commit one shard. Raises what is not one image's fault (disk full, a teacher that fails)."""
        began, teacher = time.perf_counter(), self._teacher(task.key)
        group = FeatureStore(self.store)[task.key]
        if teacher.card.fingerprint() != group.fingerprint:
            raise ValueError(f"the teacher loaded here for '{task.key}' is not the store's: the model files changed")
        images = [group.plan.image_of(row) for row in range(task.start, task.stop)]
        try:
            writer = self.builder.writer(group)
            with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
                standing = writer.valid_record(task.shard)
                if standing is not None and standing.revision != task.supersedes:
                    return ShardResult(task, "done")
                forward_seconds, writes = 0.0, []
                for batch in self._prepared_batches(teacher, images):
                    t = time.perf_counter()
                    features = self._forward(teacher, batch)
                    forward_seconds += time.perf_counter() - t
                    writes.append(self._write.submit(self._append, shard, batch, features))
                    if len(writes) > WRITES_BEHIND:
                        writes.pop(0).result()
                for write in writes:
                    write.result()
                record = shard.commit(
                    timings={"extract_s": time.perf_counter() - began, "forward_s": forward_seconds},
                    host={"device": self.device},
                )
        except LeaseHeld:
            return ShardResult(task, "held")
        except LeaseLost:
            return ShardResult(task, "lost")
        return ShardResult(
            task,
            "committed",
            quarantined=task.num_rows - record.num_valid,
            seconds=time.perf_counter() - began,
            forward_seconds=forward_seconds,
            bytes=record.bytes,
        )

    def _prepared_batches(self, teacher: Teacher, images: list[str]) -> Iterator[list[Prepared]]:
        ahead: list[Future[Prepared]] = []
        upcoming = iter(images)
        for start in range(0, len(images), self.batch_size):
            while len(ahead) < self.batch_size * (1 + BATCHES_AHEAD) and (image := next(upcoming, None)) is not None:
                ahead.append(self._prepare.submit(self._prepare_row, teacher, image))
            size = min(self.batch_size, len(images) - start)
            yield [ahead.pop(0).result() for _ in range(size)]

    def _prepare_row(self, teacher: Teacher, image: str) -> Prepared:
        sha256 = None
        try:
            data = self.roots.read(image)
            sha256 = hashlib.sha256(data).hexdigest()
            return Prepared(teacher.prepare(decode_rgb(data, image)), sha256)
        except BadImage as e:
            return Prepared(None, sha256, e.reason, e.detail)

    def _forward(self, teacher: Teacher, batch: list[Prepared]) -> np.ndarray:
        pixels = [p.pixels for p in batch if p.pixels is not None]
        if not pixels:
            return np.empty((0,), np.float32)
        slots = np.zeros((self.batch_size, *pixels[0].shape), pixels[0].dtype)
        for slot, prepared in zip(slots, batch, strict=False):
            if prepared.pixels is not None:
                slot[...] = prepared.pixels
        return teacher.forward(torch.from_numpy(slots).to(self.device)).cpu().numpy()

    @staticmethod
    def _append(shard: OpenShard, batch: list[Prepared], features: np.ndarray) -> None:
        for i, row in enumerate(batch):
            values = None if row.pixels is None else features[i]
            shard.append(values, image_sha256=row.sha256, reason=row.reason, detail=row.detail)
        shard.lease.renew()


def spec_dict(spec: TeacherSpec) -> dict:
    """JSON-clean, for the run's record."""
    return {k: v for k, v in asdict(spec).items() if v is not None}
