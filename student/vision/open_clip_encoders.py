"""`open_clip:MODEL/PRETRAINED`: the image tower of any open_clip model as a base encoder.

    open_clip:convnext_xxlarge/laion2b_s34b_b82k_augreg_soup-res768    # CLIP-ConvNeXt-XXL of arXiv 2412.09585

That one gives the output of its last stage, not normalised: 24 x 24 tokens of 3072 at 768 pixels. `encoder_name` says
how a model is named. Only the image tower is built, and only its tensors are read.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from olavlm.student.choices import Geometry
from olavlm.student.errors import ModelError
from olavlm.student.loading import find_file, load_errors, why_not_loaded

from .encoder_name import EncoderName
from .image_transform import ImageTransform
from .library_tower import Blocks, LibraryFamily, LibraryTower
from .timm_encoders import blocks_of_one_grid, map_behind
from .tower_configs import OpenClipTowerConfig

CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "model.safetensors")
PREFIX = "visual."
"""Of the image tower's tensors in the file of a whole model."""
NO_TEXT = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 1, "context_length": 1}
"""open_clip builds no image tower alone: the text tower beside it is as small as it can be, and dropped."""


class OpenClipTower(LibraryTower):
    """An image tower of open_clip."""

    config_class = OpenClipTowerConfig

    @staticmethod
    def build(config: OpenClipTowerConfig) -> nn.Module:
        vision = config.vision_cfg | {"timm_model_pretrained": False}
        return open_clip.CLIP(config.embed_dim, vision, NO_TEXT, quick_gelu=config.quick_gelu).visual

    @property
    def blocks(self) -> Blocks | None:
        if (trunk := getattr(self.network, "trunk", None)) is not None:
            return blocks_of_one_grid(trunk)
        transformer = getattr(self.network, "transformer", None)
        return None if transformer is None else Blocks(len(transformer.resblocks), self.network.patch_size[0])

    def feature_map(self, pixels: torch.Tensor, block: int) -> torch.Tensor:
        if (trunk := getattr(self.network, "trunk", None)) is not None:
            return map_behind(trunk, pixels, block)
        options = {"indices": [block], "stop_early": True, "intermediates_only": True, "output_fmt": "NCHW"}
        return self.network.forward_intermediates(pixels, **options)["image_intermediates"][-1]


def load(name: EncoderName, dtype: torch.dtype) -> OpenClipTower:
    """The image tower with weights of a hub repository, a folder or a file; safetensors only.

    Raises:
        ModelError: an unknown model or tag, or weights that cannot be had, lack some of its tensors or do not fit.
    """
    config, _, place = _describe(name)
    if place is None:
        raise ModelError(
            f"{name.text!r}: open_clip names no weights for it on the hub; use open_clip:{name.model}=FILE"
        )
    file = Path(place) if Path(place).is_file() else find_file(place, *WEIGHTS)
    if file is None:
        raise ModelError(f"{name.text!r}: {place} has no {WEIGHTS[0]}, and only safetensors are read; name a file")
    try:
        with torch.random.fork_rng(devices=[]):
            tower = OpenClipTower(config)
        tensors = load_file(file)
        if any(key.startswith(PREFIX) for key in tensors):
            tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
        else:
            tensors = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
        if name.side is not None:
            resize_pos_embed(tensors, _Whole(tower.network))
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        missing = tower.network.load_state_dict(tensors, strict=False).missing_keys
    except Exception as error:  # a damaged file or a wrong configuration fails in any of several libraries
        reason = why_not_loaded(name.text, error)
        raise ModelError(
            f"{name.text!r}: open_clip cannot load it ({reason}); use safetensors of {config.architecture}"
        ) from error
    if missing:
        raise ModelError(
            f"{name.text!r}: the weights lack {len(missing)} tensors of the image tower, such as {missing[0]!r}; "
            f"use safetensors of {config.architecture}"
        )
    return tower.to(dtype)


def load_config(name: EncoderName) -> OpenClipTowerConfig:
    """The config of the tower; no weights are read. ModelError as `load`."""
    return _describe(name)[0]


def load_transform(name: EncoderName, geometry: Geometry) -> ImageTransform:
    """Size, mean, std and interpolation of the model's configuration; no weights are read. ModelError as `load`."""
    config, preprocessing, _ = _describe(name)
    side = preprocessing.get("size") or config.vision_cfg["image_size"]
    if name.side is not None:
        side = name.side
    if isinstance(side, list | tuple):
        if len(set(side)) != 1:
            raise ModelError(f"{name.text!r} takes pictures of {side[0]} x {side[1]}; ours are squares")
        side = side[0]
    return ImageTransform(
        side,
        tuple(preprocessing.get("mean") or OPENAI_CLIP_MEAN),
        tuple(preprocessing.get("std") or OPENAI_CLIP_STD),
        geometry,
        preprocessing.get("interpolation") or "bicubic",
    )


class _Whole(nn.Module):
    """A whole model in the eyes of open_clip's `resize_pos_embed`."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual


def _describe(name: EncoderName) -> tuple[OpenClipTowerConfig, dict[str, Any], str | None]:
    """The tower's config, how its pictures are prepared, and where its weights are: file, folder or hub id."""
    model, slash, tag = name.model.partition("/")
    known = open_clip.get_model_config(model)
    place, described = name.weights, {}
    names_itself = Path(name.model).is_dir() or (known is None and bool(slash))
    if names_itself:
        place, model, tag, known = name.model, name.model, "", None
    if place is not None and not Path(place).is_file() and (file := find_file(place, CONFIG)) is not None:
        with load_errors(place):
            described = json.loads(file.read_text())
    trained = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if tag and not trained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ModelError(f"{name.text!r}: open_clip has no weights {tag!r} of {model}; there are {tags}")
    architecture = described.get("model_cfg") or known
    if architecture is None:
        near = ", ".join(difflib.get_close_matches(model, open_clip.list_models(), 3)) or "open_clip.list_models()"
        reason = f"there is no {CONFIG}" if names_itself else f"open_clip {open_clip.__version__} has no such model"
        raise ModelError(f"{name.text!r}: {reason}; there are {near}, or folders with that file")
    vision = dict(architecture["vision_cfg"])
    if name.side is not None:
        vision["image_size"] = name.side
    config = OpenClipTowerConfig(
        architecture=model,
        embed_dim=architecture["embed_dim"],
        vision_cfg=vision,
        # Some configurations leave it to the tag to say that the weights were trained with QuickGELU.
        quick_gelu=bool(architecture.get("quick_gelu") or trained.get("quick_gelu")),
    )
    place = place or (trained.get("hf_hub", "").rpartition("/")[0] or None)
    return config, described.get("preprocess_cfg") or trained, place


AutoModel.register(OpenClipTowerConfig, OpenClipTower, exist_ok=True)

FAMILIES = {OpenClipTowerConfig.model_type: LibraryFamily()}
