"""The small models of a world, each in a folder of its own that the product loads like any other checkpoint.

    DIR/depth DIR/seg DIR/gen      teachers
    DIR/encoder DIR/llm            what the student is made of
    DIR/NAME/miniature.json        how it was trained, and what it scored on held-out pictures or text; written last

A folder that is finished is not trained again; one of another effort or seed is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from olavlm.cache import files

from ..figures import Count
from .lessons import Lessons, lessons
from .plan import BLOCK
from .write import HELD_OUT, TEACHING

RECORD = "miniature.json"
NAMES = ("depth", "seg", "gen", "encoder", "llm")


@dataclass(frozen=True)
class Effort:
    """How long a model is trained."""

    steps: int
    batch: int
    lr: float = 2e-3
    """Of AdamW."""
    matrix_lr: float = 3e-3
    """Of Muon, on its scale."""
    pictures: int = 100 * BLOCK
    """That a vision model learns from."""
    decoder_share: float = 0.0
    """Of the batches in which a teacher's own decoder learns, too."""
    decoder_steps: int = 0
    """In which it goes on by itself."""
    decoded: int = 48
    """Held-out pictures that it is scored on."""

    @property
    def fit(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("steps", "batch", "lr", "matrix_lr")}


@dataclass(frozen=True)
class Size:
    """What `--size` stands for."""

    held_out: int
    efforts: dict[str, Effort]


STANDARD = {
    "depth": Effort(1200, 16, matrix_lr=1e-2, decoder_share=0.35),
    "seg": Effort(500, 16, matrix_lr=1e-2, decoder_share=0.7, decoder_steps=1000),
    "gen": Effort(800, 64, matrix_lr=1e-2),
    "encoder": Effort(4000, 8, lr=3e-3, matrix_lr=1e-2, pictures=200 * BLOCK),
    "llm": Effort(2400, 20, lr=3e-3, matrix_lr=3e-3),
}
TOY = {name: Effort(2, 8, pictures=BLOCK, decoder_share=0.5, decoder_steps=2, decoded=2) for name in NAMES}
SIZES = {"standard": Size(8 * BLOCK, STANDARD), "toy": Size(BLOCK, TOY)}
"""toy: that training runs."""


def make_models(
    root: Path, size: str, seed: int, device: str = "cpu", only: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Train what is not there yet, and print what each scored.

    Returns:
        Scores by name.

    Raises:
        ValueError: an unknown name, or a folder that holds something else.
    """
    if unknown := [name for name in only or () if name not in NAMES]:
        raise ValueError(f"--only {unknown[0]}: no such model; choose of {', '.join(NAMES)}")
    plan, data, scores = SIZES[size], _Data(SIZES[size].held_out, seed), {}
    for name in only or NAMES:
        folder, asked = root / name, {"size": size, "seed": seed, **asdict(plan.efforts[name])}
        if (record := folder / RECORD).is_file():
            there = json.loads(record.read_text())
            if there["trained"] != asked:
                raise ValueError(f"{folder}: trained by {there['trained']}, not {asked}; name another folder")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a training that was stopped
            folder.mkdir(parents=True)
            there = {"trained": asked, **_train(name, folder, plan, data, seed, device)}
            files.replace(record, (json.dumps(there, indent=1) + "\n").encode())
        scores[name] = there["scores"]
        told = ", ".join(f"{what} {value:.3f}" for what, value in there["scores"].items())
        print(f"{name:<8} {there['megabytes']:.2f} MB, {there['seconds']:.0f} s: {told}", flush=True)
    return scores


def scored(root: Path, names: Sequence[str] = NAMES) -> list[Count]:
    """Figures of the models, of these names, that are in a folder."""
    found, size = [], 0.0
    for name in names:
        if (record := root / name / RECORD).is_file():
            there = json.loads(record.read_text())
            size += there["megabytes"]
            facts = {"MB": there["megabytes"], "s": there["seconds"]}
            found.append(Count(f"`{name}`, held out", {"": {**there["scores"], **facts}}))
    return [*found, Count("Together", {"": {"MB": size}})]


def _train(name: str, folder: Path, plan: Size, data: _Data, seed: int, device: str) -> dict[str, Any]:
    import torch

    from .train_lm import train_llm
    from .train_teachers import TRAINERS

    parts = () if name == "llm" else data.parts(plan.efforts[name].pictures)
    began = perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "llm":
            scores = train_llm(folder, plan.held_out, plan.efforts[name], seed, device)
        else:
            scores = TRAINERS[name](folder, *parts, plan.efforts[name], seed, device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"scores": scores, "seconds": round(perf_counter() - began, 1), "megabytes": round(size / 1e6, 3)}


class _Data:
    """Pictures for the vision models, rendered when they are needed: a later model sees the first of an earlier's."""

    def __init__(self, held_out: int, seed: int) -> None:
        self._count, self._seed = held_out, seed
        self._taught: Lessons | None = None
        self._held_out: Lessons | None = None

    def parts(self, pictures: int) -> tuple[Lessons, Lessons]:
        if self._held_out is None:
            self._held_out = lessons(self._seed, HELD_OUT, self._count)
        if self._taught is None or len(self._taught) < pictures:
            self._taught = lessons(self._seed, TEACHING, pictures)
        return self._taught.first(pictures), self._held_out
