"""Toy teachers with stores and workers of theirs, and a gate that holds one of them up."""

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from olavlm.cache import FeatureStore, ShardTask, StoreBuilder, pending
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.teachers import Card
from olavlm.teachers.registry import TEACHERS, Entry


class Toy:
    """Features are the picture's 8 x 8 pixels in tokens of 12, plus the number of the teacher. Hooks may interfere."""

    def __init__(self, number: int, tokens: int = 16) -> None:
        self.number = number
        self.card = Card(
            name=f"toy{number}", model="none", weights_sha256=str(number) * 64, recipe={"name": "toy"},
            geometry="reference", size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), tokens=tokens, dim=192 // tokens,
            grid=(1, tokens),
        )  # fmt: skip
        self.batches: list[np.ndarray] = []
        self.before_prepare = self.before_forward = lambda given: None
        self.after_forward = lambda features: features

    def prepare(self, image: Image.Image) -> np.ndarray:
        self.before_prepare(image)
        return np.asarray(image.resize((8, 8))).transpose(2, 0, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.before_forward(batch)
        self.batches.append(batch.numpy().copy())
        features = batch.reshape(len(batch), self.card.tokens, self.card.dim).float() / 7 + self.number
        return self.after_forward(features)

    def features_of(self, picture: Image.Image) -> np.ndarray:
        return (self.prepare(picture).astype(np.float32) / 7 + self.number).reshape(self.card.tokens, self.card.dim)


class Scene:
    """A folder of images, toy teachers `a`, `b` and `c` (one token), and stores of them with shards of 8, 8 and 32."""

    batch_size = 4

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        self.names = [f"{i}.png" for i in range(num_images)]
        rng = np.random.default_rng(0)
        for name in self.names:
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(self.images / name)
        self.teachers = {"a": Toy(1), "b": Toy(2), "c": Toy(3, tokens=1)}
        self._opened = 0

    def store(self, keys: str = "abc", dtype: str = "float16") -> FeatureStore:
        self._opened += 1
        builder = StoreBuilder(self.folder / f"store{self._opened}")
        builder.extend_plan(pa.array(self.names, pa.large_string()))
        for key in keys:
            card = self.teachers[key].card.to_dict()
            builder.ensure_teacher(key, card, dtype=dtype, shard_rows=32 if key == "c" else 8)
        return FeatureStore(builder.path)

    def worker(self, store: FeatureStore, threads: int = 2, batch_size: int = batch_size, **options) -> ShardExtractor:
        specs = [TeacherSpec(key, key) for key in store.teachers]
        images = [str(self.images)]
        worker = ShardExtractor(
            str(store.path), specs, images, batch_size=batch_size, device="cpu", threads=threads, **options
        )
        worker.load()
        return worker

    @staticmethod
    def tasks(store: FeatureStore) -> list[ShardTask]:
        opened = FeatureStore(store.path)
        return [task for key in opened.teachers for task in pending(opened[key])]

    @staticmethod
    def files(store: FeatureStore) -> dict[str, bytes]:
        return {
            str(f.relative_to(store.path)): f.read_bytes() for f in sorted(store.path.glob("*/*/c/**/*")) if f.is_file()
        }

    @staticmethod
    def records(store: FeatureStore) -> list[dict]:
        opened = FeatureStore(store.path)
        of_all = [opened[key].record(shard) for key in opened.teachers for shard in range(8)]
        return [record.comparable() for record in of_all if record is not None]

    @staticmethod
    def outcomes(results) -> dict[str, int]:
        found = [result.outcome for result in results]
        return {outcome: found.count(outcome) for outcome in sorted(set(found))}

    @staticmethod
    def left_over(store: FeatureStore) -> list[str]:
        """Staged files and leases."""
        return [str(f) for folder in ("staging", "leases") for f in store.path.glob(f"*/{folder}/*")]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """scene(num_images=20) -> Scene; its teachers can be named. The disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def make(num_images: int = 20) -> Scene:
        scene = Scene(tmp_path, num_images)
        for key, teacher in scene.teachers.items():
            entry = Entry(model="none", recipes=("toy",), load=lambda teacher=teacher, **_: teacher)
            monkeypatch.setitem(TEACHERS, key, entry)
        return scene

    return make


class Gate:
    """Holds up whoever comes, once it is shut, until it is opened; `reached` tells that somebody came."""

    patience = 30.0  # seconds, before something that should happen counts as hung

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self._opened.wait(2 * self.patience)

    def open(self) -> None:
        self._opened.set()

    def hold_up_fsync(self, monkeypatch) -> None:
        """The disk takes no staged file."""

        def fsync(fd: int) -> None:
            if "/staging/" in str(Path(f"/proc/self/fd/{fd}").readlink()):
                self()

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()
