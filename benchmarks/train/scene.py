"""What a run needs on disk: photographs, captions, a store, the base models' folders, the teachers' checkpoints.

All of it is made by the product's own writers; features are random numbers under the cards of the teachers that the
other arms run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa

from olavlm.cache import StoreBuilder, pending
from olavlm.student.config import Recipe
from olavlm.student.recipes import load_recipe
from olavlm.teachers import load_teacher

from ..extract.architectures import ARCHITECTURES
from ..extract.photographs import photographs
from .base_models import write_encoder, write_llm
from .sizes import SIZES, Size

_SHA256 = "0" * 64  # of an image: nothing here compares it
_CAPTIONS = files("olavlm.pipelines") / "sample" / "pt.json"


@dataclass(frozen=True)
class Scene:
    """A folder with all that runs of one size need."""

    folder: Path
    size_name: str

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def recipe(self, run: str, overrides: Mapping[str, object]) -> Recipe:
        """The size's recipe, writing to `runs`/`run` of the folder; `overrides` win, and may set a task to null."""
        size, folder = self.size, self.folder
        teachers = json.loads((folder / "teachers.json").read_text())
        said: dict[str, object] = {
            "model.llm": folder / "llm",
            "model.encoder": folder / "encoder",
            "data.file": folder / "captions.json",
            "data.images": folder / "images",
            "data.workers": size.workers,
            "targets.store": folder / "store",
            "train.output_dir": folder / "runs" / run,
            "train.batch_size": size.batch,
            "train.save_every": 10**9,
            **{f"tasks.{task}.model": path for task, path in teachers.items() if f"tasks.{task}" not in overrides},
            **size.overrides,
            **overrides,
        }
        return load_recipe(size.recipe, [f"--{key}={value}" for key, value in said.items()], "pt")


def make_scene(folder: Path, size_name: str) -> Scene:
    """Write it to an empty folder."""
    size = SIZES[size_name]
    images = photographs(folder / "images", size.images)
    captions = [sample["conversations"] for sample in json.loads(_CAPTIONS.read_text())]
    samples = [
        {"id": f"{number}", "image": image, "conversations": captions[number % len(captions)]}
        for number, image in enumerate(images)
    ]
    (folder / "captions.json").write_text(json.dumps(samples))
    write_llm(folder / "llm", size.llm)
    write_encoder(folder / "encoder", size.encoder)
    kinds = {task: ARCHITECTURES[name] for task, name in size.teachers.items()}
    models = {task: kind.write(_made(folder / "teachers" / task)) for task, kind in kinds.items()}
    (folder / "teachers.json").write_text(json.dumps({task: str(path) for task, path in models.items()}))
    builder = StoreBuilder(folder / "store")
    builder.extend_plan(pa.array(images, pa.large_string()))
    for task, kind in kinds.items():
        teacher = load_teacher(kind.teacher, model=models[task], device="cpu", compute_dtype=size.compute_dtype)
        _fill(builder, task, teacher.card.to_dict(), size.shard_rows)
        del teacher
    return Scene(folder, size_name)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _fill(builder: StoreBuilder, key: str, card: dict, shard_rows: int) -> None:
    """All rows of a teacher, by the cache's own writer."""
    rng = np.random.default_rng(0)
    group = builder.ensure_teacher(key, card, dtype="float16", shard_rows=shard_rows)
    writer = builder.writer(group)
    for task in pending(group):
        with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
            for _ in range(task.num_rows):
                shard.append(rng.standard_normal((card["tokens"], card["dim"]), np.float32), image_sha256=_SHA256)
            shard.commit()
