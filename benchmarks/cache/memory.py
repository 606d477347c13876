"""Memory that writing one shard, and reading rows at random, adds to a fresh process above its imports.

The features to write and the batch to read into are in memory before, and are not counted.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..figures import Measurement
from . import fresh
from .formats import ZARR, installed
from .olavlm_store import KEY, OlavlmStore
from .payload import Payload
from .sizes import Size


def measure(size: Size, folder: Path) -> list[Measurement]:
    shape = size.depth.shape
    payload = Payload(shape, size.depth.formats)
    formats, absent = installed()
    rows = np.random.default_rng(3).integers(0, payload.rows, size.memory_rows).tolist()
    store, written, read = folder / OlavlmStore.name, {}, {}
    for f in formats:
        f.write(folder / f.name, payload)
        source = store / KEY / "features" if f.name in ZARR else folder / f.name
        common = {"name": f.name, "shape": asdict(shape)}
        for round_ in range(size.fresh_rounds):
            place = folder / f"{f.name} {round_}"
            figures = fresh.run("write_shard", folder=str(place), **common)
            written.setdefault(f.name, {"peak MB": []})["peak MB"].append(figures["MB"])
            shutil.rmtree(place)
            reading = {"folder": str(source), "rows": rows, "batch": size.batch, "tiny": f"{place} tiny"}
            figures = fresh.run("read_rows", **reading, **common)
            read.setdefault(f.name, {"peak MB": []})["peak MB"].append(figures["MB"])
    mb = shape.shard_rows * shape.row_bytes / 1e6
    mapped = "What a memory map has touched counts as resident, although the kernel may take it back (datasets)."
    return [
        Measurement(f"memory, writing one shard of {mb:,.1f} MB, {shape}", written, notes=absent),
        Measurement(f"memory, reading {len(rows):,} random rows, {shape}", read, notes=[mapped, *absent]),
    ]
