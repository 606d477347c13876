"""What the probes of a model predict of any images, as a source of features to be decoded and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from olavlm.cache import BadImage, ImageRoots, Sample
from olavlm.pipelines.cli import JobFailed
from olavlm.student.errors import ModelError
from olavlm.student.fused_teachers import encode_fused
from olavlm.student.probing.bank import ProbeRun
from olavlm.student.probing.model import TURNS, check_layout, load_probed, probe_collator
from olavlm.student.training.trainer import DTYPES, start_digest


class ProbeSource:
    """The probes of one teacher's features, of every layer that has one. The prompt is that of their training.

    Args:
        folder: run folder of `olavlm-probe train`, finished.
        teacher: whose features are predicted.
        key: of the store that the probes were trained on, where several of them are this teacher's.

    Raises:
        JobFailed: the run has no probes of the teacher, or of several keys.
        ModelError: no such run, or a model that has changed since.
    """

    def __init__(self, folder: Path, teacher: str, roots: ImageRoots, device: torch.device, key: str | None) -> None:
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
        if start_digest(run.model) != run.weights:
            raise ModelError(
                f"{run.model} has other weights than when the probes in {folder} were trained; train them again"
            )
        (self.task,) = alike
        self.card = run.teachers[self.task.name].card
        self.name, self.layers = f"{folder}/{self.task.name}", tuple(f"layer {layer}" for layer in self.task.layers)
        self.roots, self.device = roots, device
        self.bank = run.bank(folder).to(device)
        self.model, _ = load_probed(run.model, dtype=DTYPES[run.dtype], template=run.template)
        check_layout(self.model, run.layout, folder)
        self.model.to(device)
        if self.model.fused_teachers:
            self.model.load_teachers()
        self.collator = probe_collator(self.model, [], roots, None)

    @torch.no_grad()
    def read(self, images: Sequence[str]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        samples = [Sample(image, image, list(TURNS)) for image in images]
        micro = replace(self.collator, dataset=samples).collate(list(range(len(samples))))
        states, mask = self.model.states(
            set(self.task.layers),
            micro.input_ids.to(self.device),
            pixel_values=micro.pixel_values.to(self.device),
            teacher_features=self._fed(images),
            placement=micro.placement.to(self.device),
        )
        features = {
            name: self.bank(self.task.name, layer, states[layer], mask).float().cpu()
            for name, layer in zip(self.layers, self.task.layers, strict=True)
        }
        return features, micro.complete.numpy()

    def _fed(self, images: Sequence[str]) -> dict[str, torch.Tensor] | None:
        """What a fusion baseline reads: its teachers are run. An image that cannot be read is black, and not valid."""
        if not self.model.fused_teachers:
            return None
        by_image = [encode_fused(self.model._teachers, self._open(image), self.device) for image in images]
        return {name: torch.cat([features[name] for features in by_image]) for name in by_image[0]}

    def _open(self, image: str) -> Image.Image:
        try:
            return self.roots.open(image)
        except BadImage:
            return Image.new("RGB", (8, 8))
