"""`open_clip:MODEL/PRETRAINED`: the image tower of any open_clip model as a teacher.

    load_teacher("open_clip:ViT-H-14/laion2b_s32b_b79k")    # unCLIP's image encoder, as `gen`, from open_clip's weights
    load_teacher("open_clip:ViT-H-14/laion2b_s32b_b79k", model="open_clip_model.safetensors")
    load_teacher("open_clip:my-model", model="FOLDER")      # open_clip_config.json and open_clip_model.safetensors

`embedding` is `encode_image`, not normalised. `tokens` are the tower's final patch tokens after its norm, or its last
feature map. Only the image tower is built, and only its tensors are read. Where an odd number of pixels is cut, half of
it is rounded down, as `gen` does it, not to the even number, as open_clip does: so the same weights give the same
features by either name.
"""

from __future__ import annotations

import difflib
from typing import Any

import open_clip
import torch
from safetensors import safe_open

from olavlm.teachers.checkpoint import Checkpoint, fetch_weights, one_line, open_weights
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.generic import GenericTeacher, Preprocessing, make_preprocessing, make_teacher
from olavlm.teachers.geometry import CLIP_MEAN, CLIP_STD

CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "model.safetensors")
MODES = {"shortest": "short edge", "longest": "long edge", "squash": "squash"}
"""open_clip's resize modes."""
PREPROCESSING = {
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
"""open_clip's defaults."""
NO_TEXT = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 1, "context_length": 1}
"""open_clip builds no image tower alone: the text tower beside it is as small as it can be, and dropped."""
PREFIX = "visual."
"""Of the image tower's tensors in the file of a whole model."""


def load_open_clip(
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
        TeacherError: an unknown model or pretrained tag, weights that cannot be used or are of another model, or a
            tower that has no tokens.
    """
    architecture, _, tag = name.partition(":")[2].partition("/")
    trained = registered_training(architecture, tag)
    checkpoint = find_weights(architecture, tag, trained, model, revision)
    registered = open_clip.get_model_config(architecture)
    config = checkpoint.config.get("model_cfg") or registered
    if config is None:
        near = ", ".join(difflib.get_close_matches(architecture, open_clip.list_models(), 3))
        raise TeacherError(
            f"{name}: open_clip {open_clip.__version__} has no model {architecture!r}; "
            f"{f'near are {near}; ' if near else ''}use one of open_clip.list_models(), or a folder with {CONFIG}"
        )
    if registered is not None and (other := differences(config.get("vision_cfg", {}), registered["vision_cfg"])):
        raise TeacherError(
            f"{checkpoint.model}: its {CONFIG} is not that of {architecture} ({', '.join(other)}); name the model that "
            "it is, or any name that open_clip does not know"
        )
    # Some configurations leave it to the tag to say that the weights were trained with QuickGELU.
    quick_gelu = bool(config.get("quick_gelu") or trained.get("quick_gelu"))
    tower = build_tower(config, quick_gelu, checkpoint)
    read, layer = (read_embedding, "encode_image") if recipe == "embedding" else (read_tokens, "last")
    return make_teacher(
        tower,
        read,
        preprocessing_of(tower, checkpoint.config.get("preprocess_cfg") or trained, checkpoint.model),
        checkpoint,
        name=name,
        recipe={"name": recipe, "layers": [layer], "quick_gelu": quick_gelu},
        geometry=geometry,
        device=device,
        compute_dtype=compute_dtype,
        libraries=("open_clip_torch", "timm"),
    )


def registered_training(architecture: str, tag: str) -> dict[str, Any]:
    """How open_clip says that the weights `tag` were trained (normalisation, resizing, activation, hub repository)."""
    trained = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not trained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none, as open_clip lacks the model"
        raise TeacherError(f"open_clip:{architecture}/{tag}: no such pretrained weights; {architecture} has {tags}")
    return trained


def find_weights(
    architecture: str, tag: str, trained: dict[str, Any], model: str | None, revision: str | None
) -> Checkpoint:
    """The file, folder or hub repository `model`; without one, the hub repository that open_clip names for the tag."""
    own = trained.get("hf_hub", "").rpartition("/")[0]
    if model is not None and model != own:
        return open_weights(model, revision=revision, config=CONFIG, weights=WEIGHTS, marker="model_cfg")
    name = f"open_clip:{architecture}/{tag}" if tag else f"open_clip:{architecture}"
    if not own:
        raise TeacherError(f"{name}: open_clip names no weights for it on the hub; name a file, {name}=FILE")
    file, revision = fetch_weights(own, revision, WEIGHTS)
    if file is None:
        raise TeacherError(f"{own}: no {WEIGHTS[0]}, and only safetensors are read; name a file, {name}=FILE")
    return Checkpoint(own, file.parent, {}, (file,), revision)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Settings that two configurations of an image tower have both, and that differ."""
    both = (ours.keys() & theirs.keys()) - {"timm_model_pretrained"}
    return [f"{key} {ours[key]}, not {theirs[key]}" for key in sorted(both) if ours[key] != theirs[key]]


def build_tower(config: dict[str, Any], quick_gelu: bool, checkpoint: Checkpoint) -> torch.nn.Module:
    """The image tower with the file's weights; TeacherError where one of its tensors is missing or of another shape."""
    try:
        vision = config["vision_cfg"] | {"timm_model_pretrained": False}
        with torch.random.fork_rng(devices=[]):
            clip = open_clip.CLIP(config["embed_dim"], vision, NO_TEXT, quick_gelu=quick_gelu)
        with safe_open(checkpoint.weights[0], "pt") as file:
            prefix = PREFIX if any(key.startswith(PREFIX) for key in file.keys()) else ""  # noqa: SIM118 - no mapping
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
        missing = clip.visual.load_state_dict(tensors, strict=False).missing_keys
    except Exception as error:  # a damaged file or a wrong configuration fails in any of several libraries
        raise TeacherError(
            f"{checkpoint.model}: open_clip cannot load it ({one_line(error)}); use weights of that model, or put the "
            f"{CONFIG} that describes them beside them"
        ) from error
    if missing:
        raise TeacherError(
            f"{checkpoint.model}: its weights lack {len(missing)} tensors of the image tower (such as {missing[0]}); "
            "use open_clip weights of that model"
        )
    return clip.visual.eval()


def preprocessing_of(tower: torch.nn.Module, said: dict[str, Any], model: str) -> Preprocessing:
    """open_clip's evaluation transform for a tower, by what the configuration or the tag says of it."""
    pictures = PREPROCESSING | {key: value for key, value in said.items() if value is not None}
    side = tower.image_size
    return make_preprocessing(
        model,
        mode=MODES.get(pictures["resize_mode"], pictures["resize_mode"]),
        side=side,
        edge=side if isinstance(side, int) else side[0],
        interpolation=pictures["interpolation"],
        fill=(pictures["fill_color"],) * 3,
        mean=pictures["mean"],
        std=pictures["std"],
    )


def read_embedding(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    output = tower(pixels)
    return output[0] if isinstance(output, tuple) else output  # CoCa's tower gives its tokens too


def read_tokens(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    output = tower.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
    )
    return output["image_intermediates"][-1]
