"""Tiny checkpoints, pictures and teachers that the tests of this folder share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported: no test may ask the network

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from olavlm.teachers import load_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {
    "vit_small_patch14_reg4_dinov2": VIT | {"img_size": 56},
    "vit_small_patch16_dinov3": VIT,
    "vit_base_patch16_siglip_224": VIT | {"img_size": 64},
    "vit_intern300m_patch14_448": VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
}
"""True architectures, made tiny by these arguments."""


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """On networks this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def timm_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as timm's `save_for_hf` writes them, by architecture."""
    root, state = tmp_path_factory.mktemp("timm"), torch.get_rng_state()
    for architecture, arguments in TIMM.items():
        torch.manual_seed(0)
        network = timm.create_model(architecture, **arguments)
        for parameter in network.parameters():
            if (
                parameter.ndim > 1
            ):  # drawn wider than usual, or so narrow a network adds next to nothing to its residuals
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if side := arguments.get("img_size"):  # timm 1.0.24 does not see to that itself
            network.pretrained_cfg["input_size"] = (3, side, side)
        timm.models.save_for_hf(
            network, root / architecture, model_config={"model_args": arguments}, safe_serialization=True
        )
    torch.set_rng_state(state)
    return {architecture: root / architecture for architecture in TIMM}


@pytest.fixture(scope="session")
def open_clip_folder(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny gen checkpoint as open_clip keeps it: open_clip_config.json and open_clip_model.safetensors."""
    folder, clip = tmp_path_factory.mktemp("open_clip"), CLIPVisionConfig.from_pretrained(tiny["gen"])
    config = {
        "embed_dim": clip.projection_dim,
        "quick_gelu": clip.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": clip.image_size,
            "patch_size": clip.patch_size,
            "width": clip.hidden_size,
            "head_width": clip.hidden_size // clip.num_attention_heads,
            "layers": clip.num_hidden_layers,
            "mlp_ratio": clip.intermediate_size / clip.hidden_size,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    weights = as_open_clip(load_file(tiny["gen"] / "model.safetensors"))
    weights["logit_scale"] = torch.ones(())  # of the rest of the model, which is not read
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def as_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a transformers CLIP image tower under open_clip's names, in its layout."""
    names = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm.": "ln_pre.",
        "vision_model.post_layernorm.": "ln_post.",
        "vision_model.encoder.layers.": "transformer.resblocks.",
        ".layer_norm1.": ".ln_1.",
        ".layer_norm2.": ".ln_2.",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
        ".self_attn.out_proj.": ".attn.out_proj.",
    }
    converted = {}
    for name, tensor in weights.items():
        if name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:  # open_clip has the three in one tensor
            tensor = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        if name == "visual_projection.weight":
            name, tensor = "proj", tensor.T.contiguous()
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        converted[f"visual.{name}"] = tensor
    return converted


@pytest.fixture(scope="session")
def checkpoints(tiny, timm_folders, open_clip_folder) -> dict[str, Path]:
    """A checkpoint for every teacher, by the teacher's name."""
    generic = {f"timm:{architecture}": folder for architecture, folder in timm_folders.items()}
    return {name: tiny[name] for name in ("depth", "seg", "gen")} | generic | {"open_clip:tiny": open_clip_folder}


@pytest.fixture(scope="session")
def teachers(checkpoints):
    """The teachers with their default recipes."""
    return {name: load_teacher(name, model=folder, device="cpu") for name, folder in checkpoints.items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub cache; returns a function that puts a repository into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(repository: str, source, subfolder: str = "", leave_out: tuple[str, ...] = ()):
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = root / "snapshots" / COMMIT
        shutil.copytree(source, snapshot / subfolder, ignore=shutil.ignore_patterns(*leave_out))
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
        return snapshot

    return add


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Wide, tall and square RGB pictures with structure at several scales."""
    return [picture(640, 480, 1), picture(213, 517, 2), picture(336, 336, 3), picture(90, 61, 4)]


def picture(width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 2)
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))
