"""What the probes of a finished run predict of any images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from olavlm.cache import BadImage, ImageRoots, Sample
from olavlm.student.loading import DTYPES
from olavlm.student.tokens import TaskSpec

from .bank import ProbeRun
from .model import TURNS, check_layout, load_probed, probe_collator


class ProbePredictions:
    """Probes and the model that they read, on a device.

    Args:
        folder: run folder of `olavlm-probe train`.
        roots: where the images are.
        turns: what stands around each image, by default what did in their training.
        model_path: where the probed model lies now, if it has moved.

    Raises:
        ModelError: no finished run of probes, or a model that has changed since.
    """

    def __init__(
        self,
        folder: Path,
        roots: ImageRoots,
        device: torch.device,
        turns: Sequence[dict[str, str]] = TURNS,
        model_path: str | None = None,
    ) -> None:
        self.run, self.roots, self.device, self.turns = ProbeRun.load(folder), roots, device, list(turns)
        path = self.run.find_model(folder, model_path)
        self.bank = self.run.bank(folder).to(device)
        self.model, _ = load_probed(path, dtype=DTYPES[self.run.dtype], template=self.run.template)
        check_layout(self.model, self.run.layout, folder)
        self.model.to(device)
        if self.model.fused_teachers:
            self.model.load_teachers()
        self._collator = probe_collator(self.model, [], roots, None)

    @torch.no_grad()
    def __call__(
        self, images: Sequence[str], tasks: Sequence[TaskSpec]
    ) -> tuple[dict[str, dict[int, torch.Tensor]], np.ndarray]:
        """By task and layer float32 (B, n, D) on the host, and bool (B,): whether the image reached the model whole.

        Args:
            tasks: some of `run.tasks`; one forward serves them all.
        """
        samples = [Sample(image, image, self.turns) for image in images]
        micro = replace(self._collator, dataset=samples).collate(list(range(len(samples))))
        states, mask = self.model.states(
            {layer for task in tasks for layer in task.layers},
            micro.input_ids.to(self.device),
            pixel_values=micro.pixel_values.to(self.device),
            teacher_features=self._fed(images),
            placement=micro.placement.to(self.device),
        )
        predictions = {
            task.name: {layer: self.bank(task.name, layer, states[layer], mask).float().cpu() for layer in task.layers}
            for task in tasks
        }
        return predictions, micro.complete.numpy()

    def _fed(self, images: Sequence[str]) -> dict[str, torch.Tensor] | None:
        """What a fusion baseline reads: its teachers are run. An image that cannot be read is black, and not valid."""
        if not self.model.fused_teachers:
            return None
        return self.model.encode_teachers(*map(self._open, images))

    def _open(self, image: str) -> Image.Image:
        try:
            return self.roots.open(image)
        except BadImage:
            return Image.new("RGB", (8, 8))
