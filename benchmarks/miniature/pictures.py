"""Photographs of the world, their true depth, and what the depth teacher's decoder makes of features and of what probes
read of them in the LLM's layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .arms import ARMS
from .forms import Form
from .results import SAME, mean_features
from .scenes import NEAREST
from .steps import STAGES, run_folder

SHOWN, SIDE = 4, 112
"""Pictures, and their pixels from side to side."""
TASK, KEYS = "depth", {"depth": "teacher, mean of four layers", "depth-last": "teacher, last layer: what probes learn"}


@dataclass(frozen=True)
class Shown:
    """One picture and its maps, all of which are coloured from their own least to their own greatest closeness."""

    name: str
    caption: str
    """The objects that it shows, from left to right."""
    photograph: Image.Image
    truth: Image.Image
    teacher: dict[str, Image.Image]
    """By what was decoded, in words: the teacher's features, and their mean over all pictures to train on."""
    layers: dict[str, dict[str, Image.Image]]
    """By arm and stage in words, by layer."""


def draw_pictures(root: Path, form: Form, arms: Sequence[str], seed: int) -> list[Shown]:
    """With the layers of those arms whose probes are there; nothing until all features are."""
    mean = mean_features(root, TASK, form)
    if mean is None:
        return []
    from olavlm.cache import FeatureStore, ImageRoots
    from olavlm.student.probing.predictions import ProbePredictions
    from olavlm.teachers.decoders import load_decoder

    with np.load(root / "world" / "truth.npz") as truth:
        depth = truth["depth"]
    rows = np.linspace(0, len(depth) - 1, SHOWN + 2).astype(int)[1:-1]
    names = [f"held_out/{row:06d}.jpg" for row in rows]
    samples = json.loads((root / "world" / "held_out.json").read_text())
    captions = {sample["image"]: sample["conversations"][-1]["value"] for sample in samples}
    decoder = load_decoder(TASK, model=str(root / "models" / TASK), device="cpu")

    def colours(closeness: np.ndarray) -> Image.Image:
        return decoder.picture(closeness.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)

    def decoded(features: np.ndarray | torch.Tensor) -> list[Image.Image]:
        return [colours(one) for one in decoder.decode(torch.as_tensor(features).float())]

    store, roots = FeatureStore(root / "features"), ImageRoots([str(root / "world" / "images")])
    teacher = {words: decoded(store[key].read(names)[0]) for key, words in KEYS.items() if key in store.teachers}
    by_run: dict[str, dict[str, list[Image.Image]]] = {}
    same = decoded(mean[None])[0]
    for stage, arm, probes in _probes(root, arms, seed):
        predict = ProbePredictions(probes, roots, torch.device("cpu"))
        tasks = [task for task in predict.run.tasks if task.name == TASK]
        layers, _ = predict(names, tasks)
        title = f"{ARMS[arm].title}, after {stage.upper()}"
        by_run[title] = {f"layer {layer}": decoded(values) for layer, values in layers[TASK].items()}
    return [
        Shown(
            name,
            captions[name],
            roots.open(name),
            colours(NEAREST / depth[row]),
            {**{words: maps[place] for words, maps in teacher.items()}, SAME: same},
            {run: {layer: maps[place] for layer, maps in layers.items()} for run, layers in by_run.items()},
        )
        for place, (name, row) in enumerate(zip(names, rows, strict=True))
    ]


def _probes(root: Path, arms: Sequence[str], seed: int) -> Iterator[tuple[str, str, Path]]:
    for stage in STAGES:
        for arm in arms:
            probes = root / run_folder(arm, seed, stage) / "probes"
            if (probes / "probes.json").is_file():
                yield stage, arm, probes
