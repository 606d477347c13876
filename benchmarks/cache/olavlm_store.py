"""Our own store, through its public interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

from olavlm.cache import FeatureStore, StoreBuilder, pending

from .payload import Payload, card, image_paths

KEY = "features"
_SHA256 = "0" * 64  # of an image: the extraction hashes it while it decodes, which is no work of the store


class OlavlmStore:
    name: ClassVar[str] = "olavlm"
    checksums: ClassVar[str] = "crc32c, against the commit record"

    def write(self, folder: Path, payload: Payload) -> None:
        self.prepare(folder, payload)()

    def prepare(self, folder: Path, payload: Payload) -> Callable[[], None]:
        """Create a store with its plan; what is returned commits all its shards, as the extraction does."""
        shape, builder = payload.shape, StoreBuilder(folder)
        builder.extend_plan(image_paths(payload.rows))
        teacher = card(KEY, shape.tokens, shape.dim)
        group = builder.ensure_teacher(KEY, teacher, dtype="float16", shard_rows=shape.shard_rows)
        writer, tasks = builder.writer(group), pending(group)
        assert len(tasks) == payload.shards

        def commit() -> None:
            for task in tasks:
                with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
                    for row in payload.shard(task.shard):
                        shard.append(row, image_sha256=_SHA256)
                    shard.commit()

        return commit

    def open(self, folder: Path) -> StoreReader:
        return StoreReader(folder)


class StoreReader:
    def __init__(self, folder: Path) -> None:
        self.group = FeatureStore(folder)[KEY]

    def read(self, rows: list[int], out: np.ndarray) -> None:
        self.group.read(rows, out=out)

    def read_slice(self, start: int, stop: int, out: np.ndarray) -> None:
        self.group.read(range(start, stop), out=out)

    def read_float32(self, rows: list[int], out: np.ndarray) -> None:
        """As `group.read(rows)` hands it out by default; a new array, `out` is left alone."""
        self.group.read(rows)
