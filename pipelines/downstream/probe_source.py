"""The probes of a model as a source of features to be decoded and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from olavlm.cache import ImageRoots
from olavlm.pipelines.cli import JobFailed
from olavlm.student.probing.bank import ProbeRun
from olavlm.student.probing.model import TURNS
from olavlm.student.probing.predictions import ProbePredictions


class ProbeSource:
    """The probes of one teacher's features, of every layer that has one.

    Args:
        folder: run folder of `olavlm-probe train`, finished.
        teacher: whose features are predicted.
        key: of the store that the probes were trained on, where several of them are this teacher's.
        turns: what stands around each image, by default what did in the probes' training.

    Raises:
        JobFailed: the run has no probes of the teacher, or of several keys.
        ModelError: no such run, or a model that has changed since.
    """

    def __init__(
        self,
        folder: Path,
        teacher: str,
        roots: ImageRoots,
        device: torch.device,
        key: str | None,
        turns: Sequence[dict[str, str]] = TURNS,
        model_path: str | None = None,
    ) -> None:
        run = ProbeRun.load(folder)
        alike = [
            task for task in run.tasks
            if run.teachers[task.name].card.get("name") == teacher and key in (None, run.teachers[task.name].key)
        ]  # fmt: skip
        if len(alike) != 1:
            held = ", ".join(f"{of.key} of {of.card.get('name')}" for of in run.teachers.values())
            raise JobFailed(
                f"{folder} has probes of {held}, and one of {teacher} is scored; train that, or name it by --key"
            )
        (self.task,) = alike
        self.card = run.teachers[self.task.name].card
        self.name, self.layers = f"{folder}/{self.task.name}", tuple(f"layer {layer}" for layer in self.task.layers)
        self.predict = ProbePredictions(folder, roots, device, turns, model_path)

    def read(self, images: Sequence[str]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        predictions, valid = self.predict(images, [self.task])
        return {f"layer {layer}": values for layer, values in predictions[self.task.name].items()}, valid
