"""Base vision encoders: an image to the patch features that the projector reads.

The encoder is frozen in every stage. Features of a ViT are a hidden state ahead of the last block, without the class
token, as in LLaVA-1.5; those of a network of stages are its last stage's, as arXiv 2412.09585 takes them from
CLIP-ConvNeXt-XXL. CLIP, SigLIP, DINOv2, DINOv3 and ViT come from transformers, any other network from timm or
open_clip; see `encoder_name` for how they are named. Another library is another module.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from olavlm.student.choices import Geometry
from olavlm.student.errors import ModelError

from .encoder_name import EncoderName, Library
from .image_transform import ImageTransform
from .select_layer import FeatureShape
from .tower_configs import OpenClipTowerConfig, TimmTowerConfig


class EncoderFamily(Protocol):
    """How towers of one kind are built, and features read from them."""

    options: Mapping[str, Any]
    """Of the tower's constructor, beside its config."""

    def feature_shape(self, tower: PreTrainedModel, select_layer: int, side: int) -> FeatureShape:
        """The shape of what pictures of `side` pixels give; RecipeError for a layer or side the tower cannot take."""
        ...

    def features(self, tower: PreTrainedModel, pixels: torch.Tensor, select_layer: int) -> torch.Tensor:
        """Pixels (B, 3, S, S) in the tower's dtype to patch features (B, rows * columns, width), row-major."""
        ...


class EncoderLibrary(Protocol):
    """A module of encoders, `LIBRARY_encoders`."""

    FAMILIES: dict[str, EncoderFamily]
    """By the `model_type` of the vision config."""

    def load(self, name: EncoderName, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
        """The tower with its weights; ModelError if they cannot be had."""
        ...

    def load_config(self, name: EncoderName) -> PreTrainedConfig:
        """The tower's config, without reading weights; ModelError if it cannot be had."""
        ...

    def load_transform(self, name: EncoderName, geometry: Geometry) -> ImageTransform:
        """How its pictures are made; ModelError if nothing says so."""
        ...


def _library(name: Library) -> EncoderLibrary:
    """Imported when it is asked for: timm and open_clip take a second each."""
    return import_module(f"olavlm.student.vision.{name}_encoders")


def _family_of(config: PreTrainedConfig) -> EncoderFamily:
    own: dict[str, Library] = {TimmTowerConfig.model_type: "timm", OpenClipTowerConfig.model_type: "open_clip"}
    families = _library(own.get(config.model_type, "transformers")).FAMILIES
    if config.model_type not in families:
        raise ModelError(f"{config.model_type!r} is no known encoder; choose one of: {', '.join([*families, *own])}")
    return families[config.model_type]


class VisionEncoder(nn.Module):
    """A frozen vision tower: pixels (B, 3, S, S) to patch features (B, num_tokens, width).

    Its parameters never require a gradient and it stays in evaluation mode whatever `train` is told.

    Args:
        tower: a model of a library's `FAMILIES`.
        select_layer: index into the hidden states, of which the first is the embedding; -2 is the output of the last
            block but one. A network of stages, such as a ConvNeXt, gives its last stage's output whatever it is.
        image_size: side S of the pictures in pixels; None for the one in the tower's config.
    """

    def __init__(self, tower: PreTrainedModel, select_layer: int = -2, image_size: int | None = None) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.select_layer = select_layer
        self.image_size = image_size or tower.config.image_size
        self._family = _family_of(tower.config)
        self._shape = self._family.feature_shape(tower, select_layer, self.image_size)
        self._aside: list[PreTrainedModel] = []  # in a list, so that it is no part of the module

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, select_layer: int = -2, image_size: int | None = None
    ) -> "VisionEncoder":
        """An encoder of random weights, to be filled from a checkpoint."""
        family = _family_of(config)  # whose module registers its towers
        return cls(AutoModel.from_config(config, **family.options), select_layer, image_size)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        select_layer: int = -2,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
    ) -> "VisionEncoder":
        """The vision tower that `encoder_name` describes: a hub id or folder of transformers, `timm:` or `open_clip:`.

        Args:
            attn_implementation: of a tower of transformers; the others choose themselves.

        Raises:
            ModelError: no checkpoint there, another kind of model, or weights missing from it.
            RecipeError: a layer or size that the tower has not.
        """
        parsed = EncoderName.parse(name)
        options: dict[str, Any] = {"dtype": dtype}
        if parsed.library == "transformers":
            options["attn_implementation"] = attn_implementation
        tower = _library(parsed.library).load(parsed, **options)
        return cls(tower, select_layer, load_image_transform(name).size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patch tokens, which are row-major."""
        return self._shape.rows, self._shape.columns

    @property
    def num_tokens(self) -> int:
        """Patch tokens of an image."""
        return self._shape.rows * self._shape.columns

    @property
    def width(self) -> int:
        """Width of a patch feature."""
        return self._shape.width

    def set_tower_aside(self, *, keep: bool) -> None:
        """Leaves shapes alone, for a model that is given features: no memory on the device, nothing in the state dict.

        Args:
            keep: whether the tower stays on the host, for `restore_tower`.
        """
        self._aside = [self.tower] if keep else []
        self.tower = None

    def restore_tower(self) -> None:
        """Puts back what was set aside and kept."""
        if self._aside:
            self.tower = self._aside.pop()

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features (B, num_tokens, width) in the tower's dtype; ModelError when the tower was set aside."""
        if self.tower is None:
            raise ModelError("the encoder's weights were set aside, as its features come from a store; give those")
        return self._family.features(self.tower, pixel_values.to(self.tower.dtype), self.select_layer)


def load_encoder_config(name: str | Path) -> PreTrainedConfig:
    """The config of an encoder's tower, of which `VisionEncoder.from_config` makes one; no weights are read.

    Raises:
        ModelError: no checkpoint there, or no known encoder.
    """
    parsed = EncoderName.parse(name)
    return _library(parsed.library).load_config(parsed)


def load_image_transform(name: str | Path, geometry: Geometry = "square") -> ImageTransform:
    """What turns an image into an encoder's pixels, from its checkpoint's own description; no weights are read.

    Raises:
        ModelError: no checkpoint there, or a description of pictures that are not RGB squares of one size.
    """
    parsed = EncoderName.parse(name)
    return _library(parsed.library).load_transform(parsed, geometry)
