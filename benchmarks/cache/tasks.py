"""Work for fresh processes, see `fresh.py`; each prints its figures as one line of JSON.

python -m benchmarks.cache.tasks plan '{"store": "STORE", "rows": 1000}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from olavlm.cache import FeatureStore, StoreBuilder, pending

from .formats import Format, format_named
from .fresh import Peak
from .payload import Payload, image_path, image_paths, stamp
from .sizes import SIZES, Shape


def plan(store: str, rows: int) -> dict:
    """Make a store and its plan, of paths that are in memory."""
    images = image_paths(rows)
    peak, began = Peak(), perf_counter()
    StoreBuilder(store).extend_plan(images)
    return {"s": perf_counter() - began, "MB": peak.mb()}


def fill(store: str, keys: list[str], part: int, parts: int) -> dict:
    """Commit every `parts`-th shard of a tiny store. The disk is not waited for: this only prepares."""
    os.fsync = lambda descriptor: None
    builder, opened = StoreBuilder(store), FeatureStore(store)
    for key in keys:
        group = opened[key]
        writer = builder.writer(group)
        for task in pending(group):
            if task.shard % parts != part:
                continue
            features = stamp(np.arange(task.start, task.stop)).astype(np.float32)[:, None, :]
            with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
                for row in features:
                    shard.append(row, image_sha256="0" * 64)
                shard.commit()
    return {}


def open_store(store: str, row: int, rows: int, before: str | None) -> dict:
    """Open, coverage of every teacher, one read by path; once more than measured, of the store `before`, if given."""
    if before:
        _open(before, 0)
    return _open(store, row, rows)


def _open(store: str, row: int, rows: int | None = None) -> dict:
    image = image_path(row)  # made without Arrow, which would import what a store that is opened imports late
    peak, marks = Peak(), [perf_counter()]
    opened = FeatureStore(store)
    teachers = [opened[key] for key in opened.teachers]
    marks.append(perf_counter())
    coverages = [teacher.coverage() for teacher in teachers]
    marks.append(perf_counter())
    features = teachers[0][image]
    marks.append(perf_counter())
    mb = peak.mb()
    assert np.array_equal(features[0, :2], stamp(np.asarray(row))), features
    assert all(c.complete and c.valid == c.images == (rows or c.images) for c in coverages), coverages
    steps = np.diff(marks).tolist()
    return {"open s": steps[0], "coverage s": steps[1], "read by path s": steps[2], "all s": sum(steps), "all MB": mb}


def write_shard(name: str, folder: str, shape: dict) -> dict:
    """Write one shard of rows that are in memory, after a tiny one, which imports what is imported late."""
    payload, format_ = Payload(Shape(**shape), 1), format_named(name)
    _write_and_read(format_, Path(f"{folder}.tiny"))
    peak = Peak()
    format_.write(Path(folder), payload)
    return {"MB": peak.mb()}


def read_rows(name: str, folder: str, shape: dict, rows: list[int], batch: int, tiny: str) -> dict:
    """Read rows into a batch that is in memory, after reading what is tiny."""
    shape, format_ = Shape(**shape), format_named(name)
    _write_and_read(format_, Path(tiny))
    out = np.full((batch, shape.tokens, shape.dim), 1, np.float16)
    peak = Peak()
    reader = format_.open(Path(folder))
    for start in range(0, len(rows), batch):
        wanted = rows[start : start + batch]
        reader.read(wanted, out[: len(wanted)])
    return {"MB": peak.mb()}


def _write_and_read(format_: Format, folder: Path) -> None:
    shape = SIZES["toy"].depth.shape
    format_.write(folder, Payload(shape, 1))
    format_.open(folder).read([1, 0], np.empty((2, shape.tokens, shape.dim), np.float16))


TASKS = {"plan": plan, "fill": fill, "open": open_store, "write_shard": write_shard, "read_rows": read_rows}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
