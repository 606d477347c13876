"""Hugging Face datasets: one memory-mapped Arrow file, rows as typed 2-dimensional arrays. It keeps no checksums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up on the hub

import numpy as np
from datasets import Array2D, Dataset, Features
from datasets.arrow_writer import ArrowWriter

from .formats import fsync_tree
from .payload import Payload


class HFDatasets:
    name: ClassVar[str] = "datasets (Arrow)"
    checksums: ClassVar[str] = "none"

    def write(self, folder: Path, payload: Payload) -> None:
        folder.mkdir()
        shape = payload.shape
        features = Features({"features": Array2D((shape.tokens, shape.dim), "float16")})
        with ArrowWriter(path=str(folder / "data.arrow"), features=features, writer_batch_size=128) as writer:
            for rows in payload.in_shards():
                for row in rows:
                    writer.write({"features": row.astype(np.float16)})
            writer.finalize()
        fsync_tree(folder)

    def open(self, folder: Path) -> HFReader:
        return HFReader(folder)


class HFReader:
    def __init__(self, folder: Path) -> None:
        self.dataset = Dataset.from_file(str(folder / "data.arrow")).with_format("numpy", dtype=np.float16)

    def read(self, rows: list[int], out: np.ndarray) -> None:
        out[:] = self.dataset[rows]["features"]

    def read_slice(self, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = self.dataset[start:stop]["features"]
