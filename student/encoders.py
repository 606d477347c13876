"""Base vision encoders: an image to the patch features that the projector reads.

The encoder is frozen in every stage. Features are a hidden state ahead of the last block, without the class token, as
in LLaVA-1.5 and OLA-VLM (arXiv 2412.09585).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.loading import load_complete, load_errors

Geometry = Literal["square", "pad"]


LONGEST_SIDE = 8192
"""Pixels; a longer picture is made smaller before it is padded to a square, which would be over 200 MB."""


@dataclass(frozen=True)
class EncoderFamily:
    """How a kind of encoder is built, and what stands ahead of its patch tokens."""

    model_class: type[PreTrainedModel]
    num_prefix_tokens: int


ENCODERS = {"clip_vision_model": EncoderFamily(CLIPVisionModel, num_prefix_tokens=1)}
"""Families by the `model_type` of the vision config. Another encoder is another entry."""


@dataclass(frozen=True)
class ImageTransform:
    """An image to the encoder's input, on the CPU with Pillow. Picklable, so that loader workers need no model."""

    size: int
    """Side S of the square input, in pixels."""
    mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    geometry: Geometry = "square"
    """square: the short edge to S, then the centre crop. pad: first pasted centred on a square of the longer side that
    is filled with the mean colour, so that nothing is cut off."""

    def __post_init__(self) -> None:
        if self.geometry not in get_args(Geometry):
            raise RecipeError(f"geometry={self.geometry!r} must be one of {', '.join(get_args(Geometry))}")
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 (3, S, S), normalised, channels RGB."""
        image = image.convert("RGB")
        if self.geometry == "pad":
            image = self._pad_to_square(image)
        image = _without_extremes(image)
        width, height = image.size
        short = min(width, height)
        width, height = (int(self.size * side / short) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        if max(image.size) > LONGEST_SIDE:
            image = image.copy()
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in self.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    def save(self, folder: str | Path) -> None:
        """Writes `preprocessor_config.json`, which the library's image processors read."""
        CLIPImageProcessor(
            size={"shortest_edge": self.size},
            crop_size={"height": self.size, "width": self.size},
            image_mean=list(self.mean),
            image_std=list(self.std),
        ).save_pretrained(folder)


class VisionEncoder(nn.Module):
    """A frozen vision tower: pixels (B, 3, S, S) to patch features (B, num_tokens, width).

    Its parameters never require a gradient and it stays in evaluation mode whatever `train` is told.

    Args:
        tower: a model of a family in `ENCODERS`.
        select_layer: index into the hidden states, of which the first is the embedding; -2 is the output of the last
            block but one.
    """

    def __init__(self, tower: PreTrainedModel, select_layer: int = -2) -> None:
        super().__init__()
        num_layers = tower.config.num_hidden_layers
        self.tower = tower.requires_grad_(False).eval()
        self.select_layer = select_layer
        self._block = (select_layer if select_layer >= 0 else num_layers + 1 + select_layer) - 1
        if not 0 <= self._block < num_layers:
            raise RecipeError(
                f"select_layer={select_layer}: the encoder has {num_layers} blocks; use -{num_layers} to -1, "
                f"or 1 to {num_layers}"
            )
        self._num_prefix_tokens = _family(tower.config.model_type).num_prefix_tokens

    @classmethod
    def from_config(cls, config: PreTrainedConfig, select_layer: int = -2) -> "VisionEncoder":
        """An encoder of random weights, to be filled from a checkpoint."""
        return cls(AutoModel.from_config(config), select_layer)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, select_layer: int = -2, dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> "VisionEncoder":
        """The vision tower of a checkpoint, a hub id or a folder, which may hold a whole CLIP model.

        Raises:
            ModelError: no checkpoint there, another kind of model, or weights missing from it.
        """
        model_class = _family(_vision_config(path).model_type, path).model_class
        return cls(load_complete(model_class, path, dtype=dtype, **kwargs), select_layer)

    @property
    def num_tokens(self) -> int:
        """Patch tokens of an image."""
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    @property
    def width(self) -> int:
        """Width of a patch feature."""
        return self.tower.config.hidden_size

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features (B, num_tokens, width) in the tower's dtype."""
        captured = []
        block = self.tower.encoder.layers[self._block]
        handle = block.register_forward_hook(lambda _module, _inputs, output: captured.append(output))
        try:
            self.tower(pixel_values.to(self.tower.dtype))
        finally:
            handle.remove()
        states = captured[0] if isinstance(captured[0], torch.Tensor) else captured[0][0]
        return states[:, self._num_prefix_tokens :]


def _without_extremes(image: Image.Image) -> Image.Image:
    """The middle of a picture over 16 times as long as it is wide: the rest is cropped, and would only cost memory."""
    width, height = image.size
    longest = 16 * min(width, height)
    if max(width, height) <= longest:
        return image
    if width > height:
        left = (width - longest) // 2
        return image.crop((left, 0, left + longest, height))
    top = (height - longest) // 2
    return image.crop((0, top, width, top + longest))


def load_image_transform(path: str | Path, geometry: Geometry = "square") -> ImageTransform:
    """The transform of an encoder checkpoint: size, mean and std of its `preprocessor_config.json`, else CLIP's.

    Raises:
        ModelError: no checkpoint there, or a preprocessor that does not crop a square of the model's size.
    """
    config = _vision_config(path)
    _family(config.model_type, path)
    size = config.image_size
    try:
        file = cached_file(str(path), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    if file is None:
        return ImageTransform(size, geometry=geometry)
    with load_errors(path):
        fields = json.loads(Path(file).read_text())
    crop = fields.get("crop_size", size)
    sides: Sequence[int] = list(crop.values()) if isinstance(crop, dict) else [crop]
    if any(side != size for side in sides):
        raise ModelError(f"{str(path)!r}: the preprocessor crops to {crop}, the model takes {size} pixels")
    return ImageTransform(
        size,
        tuple(fields.get("image_mean") or OPENAI_CLIP_MEAN),
        tuple(fields.get("image_std") or OPENAI_CLIP_STD),
        geometry,
    )


def _vision_config(path: str | Path) -> PreTrainedConfig:
    with load_errors(path):
        config = AutoConfig.from_pretrained(str(path))
    return getattr(config, "vision_config", config)


def _family(model_type: str, path: str | Path | None = None) -> EncoderFamily:
    if model_type not in ENCODERS:
        where = "" if path is None else f"{str(path)!r}: "
        raise ModelError(f"{where}{model_type!r} is no known encoder; choose one of: {', '.join(ENCODERS)}")
    return ENCODERS[model_type]
