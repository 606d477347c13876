"""Base encoders of transformers: CLIP, SigLIP, DINOv2, DINOv3 and ViT, from a hub id or a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from olavlm.student.choices import Geometry
from olavlm.student.errors import ModelError
from olavlm.student.loading import load_complete, load_errors

from .encoder_name import EncoderName
from .image_transform import ImageTransform
from .preprocessor import Preprocessor
from .select_layer import FeatureShape, block_of, check_patches


@dataclass(frozen=True)
class TransformersFamily:
    """A kind of ViT: how it is built, and what stands ahead of its patch tokens."""

    model_class: type[PreTrainedModel]
    blocks: str
    """Path of the list of blocks."""
    num_prefix_tokens: int
    """Class token; register tokens, which the config counts, come on top."""
    any_side: bool = False
    """Whether positions follow whatever picture comes, by resized embeddings or rotation; if not, embeddings have to be
    told to."""
    mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    """Mean and std of pixels where the checkpoint has no image processor."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's constructor."""

    def feature_shape(self, tower: PreTrainedModel, select_layer: int, side: int) -> FeatureShape:
        """RecipeError for a layer that the tower has not, or pictures that its patches do not divide."""
        block_of(select_layer, tower.config.num_hidden_layers)
        patch = tower.config.patch_size
        if side != tower.config.image_size:  # its own may leave a rest, as 384 pixels do with patches of 14
            check_patches(side, patch)
        return FeatureShape(side // patch, side // patch, tower.config.hidden_size)

    def features(self, tower: PreTrainedModel, pixels: torch.Tensor, select_layer: int) -> torch.Tensor:
        """Patch tokens [B, tokens, width] of a hidden state ahead of the final norm."""
        captured = []
        block = tower.get_submodule(self.blocks)[block_of(select_layer, tower.config.num_hidden_layers)]
        handle = block.register_forward_hook(lambda _module, _inputs, output: captured.append(output))
        resized = not self.any_side and pixels.shape[-1] != tower.config.image_size
        try:
            tower(pixels, **({"interpolate_pos_encoding": True} if resized else {}))
        finally:
            handle.remove()
        states = captured[0] if isinstance(captured[0], torch.Tensor) else captured[0][0]
        return states[:, self.num_prefix_tokens + getattr(tower.config, "num_register_tokens", 0) :]


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_IMAGENET = {"mean": tuple(IMAGENET_DEFAULT_MEAN), "std": tuple(IMAGENET_DEFAULT_STD)}

FAMILIES = {
    "clip_vision_model": TransformersFamily(CLIPVisionModel, "encoder.layers", 1),
    "siglip_vision_model": TransformersFamily(SiglipVisionModel, "encoder.layers", 0, **_HALF),
    "dinov2": TransformersFamily(Dinov2Model, "encoder.layer", 1, any_side=True, **_IMAGENET),
    "dinov2_with_registers": TransformersFamily(
        Dinov2WithRegistersModel, "encoder.layer", 1, any_side=True, **_IMAGENET
    ),
    "dinov3_vit": TransformersFamily(DINOv3ViTModel, "model.layer", 1, any_side=True, **_IMAGENET),
    # Not every checkpoint has the pooler, which stands behind the features.
    "vit": TransformersFamily(ViTModel, "layers", 1, options={"add_pooling_layer": False}, **_HALF),
}
"""By the `model_type` of the vision config. Another one is another entry."""


def load(name: EncoderName, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """The vision tower of a checkpoint, which may hold a whole CLIP or SigLIP model.

    Raises:
        ModelError: no checkpoint there, another kind of model, or weights missing from it.
    """
    family = _family(_vision_config(name).model_type, name)
    return load_complete(family.model_class, name.model, dtype=dtype, **family.options, **kwargs)


def load_config(name: EncoderName) -> PreTrainedConfig:
    """The config of the vision tower; no weights are read. ModelError as `load`."""
    config = _vision_config(name)
    _family(config.model_type, name)
    return config


def load_transform(name: EncoderName, geometry: Geometry) -> ImageTransform:
    """Size, mean, std and interpolation of the checkpoint's image processor, else of its model.

    Raises:
        ModelError: no checkpoint there, or a preprocessor that does not give a square of the model's size.
    """
    config = _vision_config(name)
    family = _family(config.model_type, name)
    said, size = Preprocessor.of(name.model), config.image_size
    field = "crop_size" if "crop_size" in said.fields else "size"
    given = said.fields.get(field, size)
    sides = [side for side in given.values() if side is not None] if isinstance(given, dict) else [given]
    if not all(type(side) is int and side > 0 for side in sides):
        raise said.wrong(field, "give whole numbers of pixels")
    if len(set(sides)) != 1 or (sides[0] != size and not family.any_side):
        raise ModelError(f"{name.text!r}: the preprocessor crops to {given}, the model takes {size} pixels")
    mean, std = said.normalisation(family.mean, family.std)
    interpolation = said.resample(Image.Resampling.BICUBIC).name.lower()
    return ImageTransform(name.side or sides[0], mean, std, geometry, interpolation)


def _vision_config(name: EncoderName) -> PreTrainedConfig:
    with load_errors(name.model):
        config = AutoConfig.from_pretrained(name.model)
    return getattr(config, "vision_config", config)


def _family(model_type: str, name: EncoderName) -> TransformersFamily:
    if model_type not in FAMILIES:
        raise ModelError(
            f"{name.text!r}: {model_type!r} is no known encoder; choose one of: {', '.join(FAMILIES)}, or any model "
            "of timm:MODEL or open_clip:MODEL/PRETRAINED"
        )
    return FAMILIES[model_type]
