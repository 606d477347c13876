"""Metrics out: one JSON object a step in `metrics.jsonl`, always; TensorBoard and W&B if wanted."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from olavlm.student.choices import TrackerName
from olavlm.student.errors import RecipeError, TrainingError


class Tracker(Protocol):
    """Anything that takes a step's scalars."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`. On resume, lines of steps that will be done again are taken out first."""

    def __init__(self, file: Path, resume_step: int) -> None:
        kept = []
        if file.exists():
            for line in file.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut short, or damaged
        whole = file.with_name(f".{file.name}")
        whole.write_text("".join(f"{line}\n" for line in kept))
        whole.replace(file)  # at once: a kill here loses no history
        self._file = file.open("a", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under `folder`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(f"pictures/{name}", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, whose id `folder` keeps, so that a resumed run goes on in it.

    Steps that a resumed run does again are not logged twice: W&B takes no step below the last it has, and they are the
    same to the bit.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "run-id"
        if not known.exists():
            known.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "olavlm"),
                name=os.environ.get("WANDB_NAME", str(folder.parent)),
                id=known.read_text(),
                resume="allow",
                dir=str(folder.parent),
                config=config,
            )
        except wandb.Error as e:
            raise TrainingError(f"W&B: {e}; log in, set WANDB_MODE=offline, or take wandb from train.trackers") from e

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def log_pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        import wandb

        self._run.log({f"pictures/{name}": wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(names: Sequence[TrackerName]) -> None:
    """RecipeError for a tracker whose package is not installed: ahead of hours of loading, not after."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            "train.trackers has wandb, and the package wandb is not installed; install it with: "
            "pip install 'olavlm[wandb]'"
        )


def open_trackers(names: Sequence[TrackerName], run: Path, first_step: int, config: dict[str, Any]) -> list[Tracker]:
    """`metrics.jsonl` and the named trackers, in a run folder that goes on after `first_step` steps."""
    trackers: list[Tracker] = [JsonLines(run / "metrics.jsonl", first_step)]
    if "tensorboard" in names:
        trackers.append(TensorBoard(run / "tensorboard", first_step))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(run / "wandb", config))
    return trackers


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The steps of a `metrics.jsonl`, in order."""
    return [json.loads(line) for line in file.read_text().splitlines()]
