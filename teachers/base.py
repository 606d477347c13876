"""What every teacher offers, and what those that are a frozen PyTorch network on RGB pixels share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from olavlm.teachers.card import Card
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import frame

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@runtime_checkable
class Teacher(Protocol):
    """A frozen vision expert: image -> features.

    Extraction overlaps `prepare`, in threads, with `forward`, on the device; `encode` does both for a few images.
    """

    card: Card
    """What identifies the features, shapes included."""

    def prepare(self, image: Image.Image) -> np.ndarray:
        """One picture as the array `forward` takes a stack of: same shape and dtype for every picture.

        Runs on the CPU, is deterministic and may be called from several threads.
        """
        ...

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Features of a stack of prepared pictures, on the teacher's device: [B, tokens, dim], float32, no gradient."""
        ...

    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of pictures of any size, of any mode but float: [B, tokens, dim], float32, on the CPU."""
        ...


class PixelTeacher:
    """A teacher whose network takes normalised RGB pixels of one fixed size.

    `prepare` gives uint8 pixels and `forward` normalises them, so that what crosses to the device is a quarter of
    the size of float32 and the preparing threads only resize.

    Subclasses say how a picture becomes pixels (`resize`) and pixels become features (`features`).

    Args:
        card: its compute dtype says what the network computes in: `bfloat16` and `float16` are autocast, so that norms,
            position embeddings and, on CUDA, the residual stream stay float32.
        network: with float32 weights.
        device: where it is put.
    """

    def __init__(self, card: Card, network: torch.nn.Module, device: torch.device) -> None:
        self.card = card
        self.device = device
        self.network = network.to(device).eval().requires_grad_(False)
        self._dtype = COMPUTE_DTYPES[card.compute_dtype]
        for module in network.modules():
            # Autocast would round these weights again in every forward. A subclass may compute with its weights first.
            if type(module) in (torch.nn.Linear, torch.nn.Conv2d):
                module.to(self._dtype)
        self._mean = torch.tensor(card.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(card.std, device=device).view(3, 1, 1)

    def resize(self, image: Image.Image) -> Image.Image:
        """An RGB picture at the network's input size."""
        raise NotImplementedError

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised float32 pixels [B, 3, H, W] -> [B, tokens, dim], under autocast where the card says so."""
        raise NotImplementedError

    def prepare(self, image: Image.Image) -> np.ndarray:
        """One picture of any size, of any mode but float -> uint8 [3, H, W], RGB, at the network's input size."""
        image = self.resize(frame(image, self.card.geometry, self.card.mean))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    @torch.no_grad()
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Prepared pictures [B, 3, H, W] -> [B, tokens, dim] float32 on the teacher's device.

        Raises:
            TeacherError: the batch is not a stack of what `prepare` gives.
        """
        if batch.dtype != torch.uint8 or batch.shape[1:] != (3, *self.card.size):
            raise TeacherError(
                f"batch of {batch.dtype} {tuple(batch.shape)}: {self.card.name} takes uint8 "
                f"(B, 3, {self.card.size[0]}, {self.card.size[1]}); stack what prepare() returns"
            )
        pixels = batch.to(self.device, non_blocking=True).float().div_(255).sub_(self._mean).div_(self._std)
        # The card's compute dtype holds inside a trainer's autocast region too.
        reduced = self._dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._dtype if reduced else None, enabled=reduced):
            return self.features(pixels).float()

    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pictures of any size, of any mode but float -> [B, tokens, dim] float32 on the CPU."""
        if not images:
            return torch.empty(0, self.card.tokens, self.card.dim)
        return self.forward(torch.from_numpy(np.stack([self.prepare(image) for image in images]))).cpu()


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; anything else is torch's own name for a device.

    Raises:
        TeacherError: not a device, or CUDA asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise TeacherError(f"device {device!r}: unknown; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise TeacherError(f"device {device!r}: this machine offers no CUDA device; use auto or cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise TeacherError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices, from 0")
    return resolved


def library_versions(*libraries: str) -> dict[str, str]:
    """Versions, for the card, of what resizes the pictures and runs the networks: Pillow, PyTorch and `libraries`."""
    return {name: version(name) for name in ("pillow", "torch", *libraries)}
