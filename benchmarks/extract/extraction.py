"""Extractions in this process, without Ray: a new store, its plan, and workers that have loaded their teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from olavlm.cache import StoreBuilder, pending
from olavlm.pipelines.extraction.blocks import Block, plan_blocks
from olavlm.pipelines.extraction.extractor import ShardExtractor, Stages, TeacherSpec
from olavlm.teachers import Teacher
from olavlm.teachers.registry import TEACHERS, Entry

BLOCKS_AT_ONCE = 2  # as a worker is given them: one computes while the other is committed


@dataclass(frozen=True)
class Job:
    """What is extracted, and how."""

    teachers: Mapping[str, Teacher]
    """By store key; loaded, and used as they are."""
    folder: Path
    """Of the images."""
    images: list[str]
    batch: int
    shard_rows: int
    device: str
    threads: int = 1
    """That prepare images, a worker."""
    dtype: str = "float16"
    """Of the stored features."""
    workers: int = 1
    stages: list[Stages] = field(default_factory=list)
    """What the workers said of their time, one entry a worker and run."""

    def prepare(self, store: Path) -> Callable[[], None]:
        """Make a store with its plan, and the workers; what is returned extracts everything.

        Raises RuntimeError if a row is not committed.
        """
        builder = StoreBuilder(store)
        builder.extend_plan(pa.array(self.images, pa.large_string()))
        tasks = []
        for key, teacher in self.teachers.items():
            card = teacher.card.to_dict()
            tasks += pending(builder.ensure_teacher(key, card, dtype=self.dtype, shard_rows=self.shard_rows))
        workers = [self._worker(store) for _ in range(self.workers)]
        blocks = plan_blocks(tasks, self.workers)
        return lambda: self._extract(workers, blocks)

    def _worker(self, store: Path) -> ShardExtractor:
        specs = [TeacherSpec(key, f"loaded {key}") for key in self.teachers]
        options = {"batch_size": self.batch, "device": self.device, "threads": self.threads}
        worker = ShardExtractor(str(store), specs, [str(self.folder)], **options)
        loaded = {  # the registry is a plain dict
            f"loaded {key}": Entry(None, ("loaded",), lambda teacher=teacher, **_: teacher)
            for key, teacher in self.teachers.items()
        }
        TEACHERS.update(loaded)
        worker.load()
        for name in loaded:
            del TEACHERS[name]
        return worker

    def _extract(self, workers: list[ShardExtractor], blocks: list[Block]) -> None:
        with ThreadPoolExecutor(BLOCKS_AT_ONCE * len(workers)) as pool:
            futures = [pool.submit(workers[k % len(workers)].extract, block) for k, block in enumerate(blocks)]
            results = [result for future in futures for result in future.result()]
        for result in results:
            if result.outcome != "committed" or result.quarantined:
                raise RuntimeError(
                    f"{result.task.key} shard {result.task.shard}: {result.outcome}, {result.quarantined} rows "
                    f"quarantined: {result.detail}"
                )
        self.stages.extend(worker.watch().stages for worker in workers)


def shares(stages: list[Stages]) -> str:
    """Where the workers' time went, in words."""
    device, images, disk = (sum(getattr(s, name) for s in stages) for name in ("device", "images", "disk"))
    total = device + images + disk
    if not total:
        return "the workers noted no time"
    return (
        f"the device computed for {device / total:.1%} of the noted time, waited for images for {images / total:.1%} "
        f"and for the disk for {disk / total:.1%}"
    )
