"""`timm:MODEL`: any image encoder of timm as a teacher, such as `timm:vit_small_patch14_dinov2.lvd142m`.

    load_teacher("timm:vit_base_patch16_siglip_224.webli")                        # weights of timm's own hub repository
    load_teacher("timm:vit_small_patch14_dinov2.lvd142m", model="weights.safetensors")
    load_teacher("timm:convnext_base", model="FOLDER")      # config.json and model.safetensors, as timm's save_for_hf

`tokens` is what `forward_features` gives: a ViT's patch tokens after its norm, without class and register tokens, or
the last feature map. `embedding` is the pooled vector that the classifier reads.
"""

from __future__ import annotations

import difflib
import math

import timm
import torch

from olavlm.teachers.checkpoint import Checkpoint, fetch_weights, one_line, open_weights
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.generic import GenericTeacher, Preprocessing, Read, make_preprocessing, make_teacher, probe

WEIGHTS = ("model.safetensors",)
MODES = {"center": "short edge", "squash": "squash", "border": "long edge"}
"""timm's crop modes."""


def load_timm(
    *,
    name: str,
    model: str | None,
    revision: str | None,
    recipe: str,
    geometry: str,
    device: torch.device,
    compute_dtype: str,
) -> GenericTeacher:
    """See `registry.load_teacher`, which checks the arguments.

    Raises:
        TeacherError: an unknown model, weights that cannot be used or are of another one, or a network that has no
            feature map.
    """
    variant = name.partition(":")[2]
    architecture = variant.partition(".")[0]
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), 3))
        raise TeacherError(
            f"{name}: timm {timm.__version__} has no model {architecture!r}; "
            f"{f'near are {near}; ' if near else ''}timm.list_models() names them all"
        )
    checkpoint = find_weights(variant, model, revision)
    network = build(variant, checkpoint).to(device)
    preprocessing = preprocessing_of(network, checkpoint.model)
    if recipe == "tokens":
        side = preprocessing.resizing.side
        read, source = token_reader(network, side, checkpoint.model), {"layers": ["forward_features"]}
    else:
        read, source = read_embedding, {"layers": ["forward_head"]}
        if isinstance(pooling := getattr(network, "global_pool", None), str):  # a setting that the weights do not show
            source["pooling"] = pooling
    return make_teacher(
        network,
        read,
        preprocessing,
        checkpoint,
        name=name,
        recipe={"name": recipe, "architecture": architecture, **source},
        geometry=geometry,
        device=device,
        compute_dtype=compute_dtype,
        libraries=("timm",),
    )


def find_weights(variant: str, model: str | None, revision: str | None) -> Checkpoint:
    """The file, folder or hub repository `model`; without one, timm's own hub repository of the variant."""
    try:
        registered = timm.get_pretrained_cfg(variant)
    except RuntimeError as error:  # a tag that the architecture does not have
        tags = ", ".join(timm.list_pretrained(f"{variant.partition('.')[0]}.*"))
        raise TeacherError(f"timm:{variant}: {one_line(error)} Use one of {tags}") from error
    own = registered.hf_hub_id if registered is not None else None
    if model is None or model == own:
        if own is None:
            raise TeacherError(f"timm:{variant}: timm names no weights on the hub; name a file, timm:{variant}=FILE")
        file, revision = fetch_weights(own, revision, WEIGHTS)
        if file is None:
            raise TeacherError(f"{own}: no {WEIGHTS[0]}, and nothing else is read; name a file, timm:{variant}=FILE")
        return Checkpoint(own, file.parent, {}, (file,), revision)
    checkpoint = open_weights(model, revision=revision, config="config.json", weights=WEIGHTS, marker="architecture")
    there, here = (str(name).partition(".")[0] for name in (checkpoint.config.get("architecture", variant), variant))
    if there != here:
        raise TeacherError(f"{model}: its config.json says architecture {there}, not {here}; use timm:{there}={model}")
    return checkpoint


def build(variant: str, checkpoint: Checkpoint) -> torch.nn.Module:
    """The network with the file's weights, all of them: timm loads strictly as long as it keeps the classifier."""
    source = f"local-dir:{checkpoint.folder}" if checkpoint.config else variant
    overlay = {"file": str(checkpoint.weights[0]), "source": "", "custom_load": False}
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except Exception as error:  # a damaged file or a wrong configuration fails in any of several libraries
        raise TeacherError(
            f"{checkpoint.model}: timm cannot load it as {variant} ({one_line(error)}); use weights of that model, or "
            "put the config.json that describes them beside them"
        ) from error


def preprocessing_of(network: torch.nn.Module, model: str) -> Preprocessing:
    """timm's evaluation transform for the network."""
    config = timm.data.resolve_model_data_config(network)
    side = config["input_size"][1]
    return make_preprocessing(
        model,
        mode=MODES.get(config["crop_mode"], config["crop_mode"]),
        side=config["input_size"][1:],
        edge=math.floor(side / config["crop_pct"]),
        interpolation=config["interpolation"],
        fill=[round(255 * value) for value in config["mean"]],
        mean=config["mean"],
        std=config["std"],
        half="even",
    )


def token_reader(network: torch.nn.Module, side: int, model: str) -> Read:
    """How the final tokens become a feature map.

    `forward_features` may give a map, with channels first or last. What else it gives may hold class and register
    tokens, or patches in the order of windows; `forward_intermediates` then knows the way back to a map.
    """
    features = probe(network, read_map, (side, side), model)
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        return read_intermediates
    return read_map_of_channels_last if getattr(network, "output_fmt", "NCHW") == "NHWC" else read_map


def read_map(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return network.forward_features(pixels)


def read_map_of_channels_last(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return network.forward_features(pixels).permute(0, 3, 1, 2)


def read_intermediates(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return network.forward_intermediates(pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]


def read_embedding(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return network.forward_head(network.forward_features(pixels), pre_logits=True)
