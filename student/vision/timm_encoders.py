"""`timm:MODEL`: any network of timm as a base encoder, such as `timm:vit_large_patch14_dinov2.lvd142m`.

A ViT gives the patch tokens of `select_layer`, a network of stages its last feature map. `encoder_name` says how a
model is named. Size, mean, std and interpolation are those of timm's evaluation transform.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn
from transformers import AutoModel
from transformers.utils import cached_file

from olavlm.student.choices import Geometry
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.loading import load_errors, why_not_loaded

from .encoder_name import EncoderName
from .image_transform import ImageTransform
from .library_tower import Blocks, LibraryFamily, LibraryTower
from .tower_configs import TimmTowerConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_SHAPING = ("num_classes", "input_size", "fixed_input_size")
"""What of a configuration of weights decides how timm builds the network."""
_OF_WEIGHTS = (*_SHAPING, "classifier", "label_offset", "mean", "std", "interpolation")
"""What of it matters here: not where timm would look for the weights, nor what it cuts off pictures."""


class TimmTower(LibraryTower):
    """A network of timm, its classifier included, so that its weights are all there or refused."""

    config_class = TimmTowerConfig

    @staticmethod
    def build(config: TimmTowerConfig) -> nn.Module:
        return timm.create_model(
            config.architecture, pretrained=False, pretrained_cfg=config.pretrained_cfg, **config.model_args or {}
        )

    @property
    def blocks(self) -> Blocks | None:
        return blocks_of_one_grid(self.network)

    def feature_map(self, pixels: torch.Tensor, block: int) -> torch.Tensor:
        return map_behind(self.network, pixels, block)


def blocks_of_one_grid(network: nn.Module) -> Blocks | None:
    """`LibraryTower.blocks` of a network of timm, from what it declares of its features."""
    stages = getattr(network, "feature_info", None)
    if not stages:
        raise RecipeError(f"{type(network).__name__} of timm declares no features; use another encoder")
    reductions = {stage["reduction"] for stage in stages}
    return Blocks(len(stages), reductions.pop()) if len(reductions) == 1 else None


def map_behind(network: nn.Module, pixels: torch.Tensor, block: int) -> torch.Tensor:
    """`LibraryTower.feature_map` of a network of timm."""
    options = {"indices": [block], "norm": False, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
    return network.forward_intermediates(pixels, **options)[-1]


def load(name: EncoderName, dtype: torch.dtype) -> TimmTower:
    """The network with weights of a hub repository, a folder or a file; safetensors, strictly.

    Raises:
        ModelError: an unknown model, or weights that cannot be had or are of another one.
    """
    config, place = _describe(name)
    if place is None:
        raise ModelError(f"{name.text!r}: timm names no weights on the hub; use timm:{name.model}=FILE")
    file = Path(place) if Path(place).is_file() else _file(place, WEIGHTS)
    try:
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(
                config.architecture,
                pretrained=True,
                pretrained_cfg=config.pretrained_cfg | {"file": str(file)},
                **config.model_args,
            )
    except Exception as error:  # a damaged file or a wrong configuration fails in any of several libraries
        reason = why_not_loaded(name.text, error)
        raise ModelError(
            f"{name.text!r}: timm cannot load it ({reason}); use safetensors of {config.architecture}"
        ) from error
    config.pretrained_cfg = {key: value for key, value in config.pretrained_cfg.items() if key in _SHAPING}
    return TimmTower(config, network).to(dtype)


def load_config(name: EncoderName) -> TimmTowerConfig:
    """The config of the tower; no weights are read. ModelError as `load`."""
    return _describe(name)[0]


def load_transform(name: EncoderName, geometry: Geometry) -> ImageTransform:
    """The pictures of timm's evaluation transform; no weights are read. ModelError as `load`."""
    config, _ = _describe(name)
    data = resolve_data_config(pretrained_cfg=config.pretrained_cfg)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise ModelError(f"{name.text!r} takes pictures of {channels} x {height} x {width}; ours are RGB squares")
    interpolation = "bicubic" if data["interpolation"] == "random" else data["interpolation"]
    return ImageTransform(name.side or height, data["mean"], data["std"], geometry, interpolation)


def _describe(name: EncoderName) -> tuple[TimmTowerConfig, str | None]:
    """The tower's config, with timm's whole configuration of the weights, and where these are: file, folder, hub id."""
    place, said = name.weights, {}
    names_itself = place is None and ("/" in name.model or Path(name.model).is_dir())
    if names_itself:
        place = name.model
    if place is not None and not Path(place).is_file():
        file = _file(place, CONFIG, required=names_itself)
        said = {} if file is None else _read_config(file, place)
    variant = said["architecture"] if names_itself else name.model
    architecture = variant.partition(".")[0]
    if said and said["architecture"].partition(".")[0] != architecture:
        raise ModelError(f"{name.text!r}: {place} says architecture {said['architecture']}; use timm:{place}")
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), 3)) or "timm.list_models()"
        raise ModelError(f"{name.text!r}: timm {timm.__version__} has no model {architecture!r}; there are {near}")
    try:
        registered = timm.get_pretrained_cfg(variant)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise ModelError(f"{name.text!r}: timm has no such weights; there are {tags}") from error
    cfg = {} if registered is None else registered.to_dict()
    place = place or cfg.get("hf_hub_id")
    cfg = {key: value for key, value in (cfg | said).items() if key in _OF_WEIGHTS and value is not None}
    model_args = dict(said.get("model_args") or {})
    if name.side is not None and cfg.get("fixed_input_size"):  # other networks take any size and need no telling
        model_args["img_size"] = name.side
    return TimmTowerConfig(architecture=architecture, pretrained_cfg=cfg, model_args=model_args), place


def _read_config(file: Path, place: str) -> dict[str, Any]:
    """A folder's configuration; in older ones, that of the weights is not apart from the rest."""
    with load_errors(place):
        said = json.loads(file.read_text())
    if not isinstance(said, dict) or "architecture" not in said:
        raise ModelError(f"{place}: its {CONFIG} is not one of timm's, as it names no architecture; name a file")
    of_weights = said.get("pretrained_cfg", said)
    return said | of_weights | {key: said[key] for key in ("architecture", "num_classes") if key in said}


def _file(place: str, filename: str, required: bool = True) -> Path | None:
    with load_errors(place):
        file = cached_file(place, filename, _raise_exceptions_for_missing_entries=required)
    return None if file is None else Path(file)


AutoModel.register(TimmTowerConfig, TimmTower, exist_ok=True)

FAMILIES = {TimmTowerConfig.model_type: LibraryFamily()}
