"""Any encoder of a model library as a teacher: what `timm:MODEL` and `open_clip:MODEL/PRETRAINED` share.

The two libraries describe their models, so that tokens, width, grid, input size, normalisation and resizing are the
model's own and no list of models is kept here. A library's loader (`timm_models.py`, `open_clip_models.py`) finds the
weights, builds the network and says how features are read from it; what comes out is measured on one blank picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from PIL import Image

from olavlm.teachers.base import PixelTeacher, library_versions
from olavlm.teachers.card import Card
from olavlm.teachers.checkpoint import Checkpoint, one_line, weights_digest
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import HalfPixel, ResizeMode, Resizing

Read = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""(network, normalised pixels [B, 3, H, W]) -> a feature map [B, dim, rows, columns] or an embedding [B, dim]."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model's configuration says about its pictures."""

    resizing: Resizing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class GenericTeacher(PixelTeacher):
    """Tokens of a feature map [B, rows * columns, dim], row-major, or an embedding [B, 1, dim]."""

    def __init__(
        self, card: Card, network: torch.nn.Module, device: torch.device, resizing: Resizing, read: Read
    ) -> None:
        super().__init__(card, network, device)
        self._resizing, self._read = resizing, read

    def resize(self, image: Image.Image) -> Image.Image:
        return self._resizing(image)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self._read(self.network, pixels)
        return features.reshape(*features.shape[:2], -1).transpose(1, 2).contiguous()


def make_teacher(
    network: torch.nn.Module,
    read: Read,
    preprocessing: Preprocessing,
    checkpoint: Checkpoint,
    *,
    name: str,
    recipe: dict[str, Any],
    geometry: str,
    device: torch.device,
    compute_dtype: str,
    libraries: Sequence[str],
) -> GenericTeacher:
    """The teacher around a network with loaded weights, in evaluation mode.

    Args:
        recipe: of the card, without how pictures are resized.
        libraries: distributions whose versions the card records.

    Raises:
        TeacherError: the network does not give what `read` asks for.
    """
    resizing = preprocessing.resizing.within(geometry)
    size = (resizing.side, resizing.side)
    network = network.to(device)
    features = probe(network, read, size, what := f"{checkpoint.model}: recipe {recipe['name']!r}")
    if not isinstance(features, torch.Tensor) or features.ndim not in (2, 4):
        raise TeacherError(f"{what}: the network gives neither a feature map nor an embedding; use another recipe")
    dim, *grid = features.shape[1:]
    rows, columns = grid or (1, 1)
    card = Card(
        name=name,
        model=checkpoint.model,
        revision=checkpoint.revision,
        weights_sha256=weights_digest(checkpoint.weights),
        recipe=recipe | {"averaging": "none", "resize": str(resizing), "interpolation": "none"},
        geometry=geometry,
        size=size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        compute_dtype=compute_dtype,
        tokens=rows * columns,
        dim=dim,
        grid=(rows, columns),
        versions=library_versions(*libraries),
    )
    return GenericTeacher(card, network, device, resizing, read)


@torch.no_grad()
def probe(network: torch.nn.Module, read: Read, size: tuple[int, int], what: str) -> Any:
    """What is read from the network for one blank picture of this size; TeacherError, begun by `what`, if it fails."""
    pixels = torch.zeros(1, 3, *size, device=next(network.parameters()).device)
    try:
        return read(network, pixels)
    except Exception as error:  # whatever a network raises that was not built for this
        raise TeacherError(f"{what}: the network does not offer it ({one_line(error)}); use another recipe") from error


def make_preprocessing(
    model: str, *, mode: str, side: int | Sequence[int], edge: int, interpolation: str, fill: Sequence[int],
    mean: Sequence[float], std: Sequence[float], half: HalfPixel = "down",
) -> Preprocessing:  # fmt: skip
    """A configuration's preprocessing, checked.

    Args:
        mode, edge, fill, half: as in `Resizing`.
        side: of the input, or height and width.
        interpolation: Pillow's name, small letters; `random` is of training, and bicubic here.

    Raises:
        TeacherError: pictures that are not RGB or not square, an unknown mode or interpolation.
    """
    if mode not in get_args(ResizeMode):
        modes = ", ".join(get_args(ResizeMode))
        raise TeacherError(f"{model}: resize mode {mode!r} is none of {modes}; name another model")
    if len(mean) != 3 or len(std) != 3:
        raise TeacherError(f"{model}: its pictures have {len(mean)} channels, teachers see RGB; name another model")
    height, width = (side, side) if isinstance(side, int) else side
    if height != width:
        raise TeacherError(f"{model}: its input is {height} x {width}, teachers see squares; name another model")
    try:
        resample = Image.Resampling["BICUBIC" if interpolation == "random" else interpolation.upper()]
    except KeyError:
        names = ", ".join(known.name.lower() for known in Image.Resampling)
        raise TeacherError(f"{model}: interpolation {interpolation!r} is none of Pillow's ({names})") from None
    resizing = Resizing(mode, height, max(edge, height), resample, tuple(fill), half)
    return Preprocessing(resizing, tuple(mean), tuple(std))
