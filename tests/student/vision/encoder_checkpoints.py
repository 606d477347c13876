"""Tiny checkpoints of every family of base encoders, in true architectures, with random weights."""

import json
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {**VIT, "intermediate_size": 32, "vocab_size": 99, "num_hidden_layers": 1}
TIMM = {
    "vit": ("test_vit", {}),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}),  # rotary position embeddings
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2)}),
    "convnext": ("test_convnext", {}),
}
OPEN_CLIP_TEXT = {"layers": 1, "width": 16, "heads": 1, "vocab_size": 9, "context_length": 4}
OPEN_CLIP_VIT = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
OPEN_CLIP_CONVNEXT = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}


def write(root: Path) -> dict[str, str]:
    """Encoder names as recipes have them, by family; each names a folder below `root`."""
    torch.manual_seed(0)
    vision = {**VIT, "intermediate_size": 48, "image_size": 48, "patch_size": 8}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    names = {
        "siglip": _transformers(
            root / "siglip",
            SiglipModel(SiglipConfig(vision_config=vision, text_config={**TEXT, "max_position_embeddings": 8})),
            half | {"size": {"height": 48, "width": 48}},
        ),
        "siglip tower": _transformers(root / "siglip-tower", _spread(SiglipVisionConfig(**vision)), half),
        "dinov2": _transformers(
            root / "dinov2",
            Dinov2Model(Dinov2Config(**VIT, image_size=70, patch_size=14, initializer_range=0.2)),
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "resample": 2},
        ),
        "dinov2 with registers": _transformers(
            root / "dinov2-registers",
            Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(**VIT, image_size=56, patch_size=14, num_register_tokens=4)
            ),
            {},
        ),
        "dinov3": _transformers(
            root / "dinov3",
            DINOv3ViTModel(
                DINOv3ViTConfig(**VIT, intermediate_size=48, image_size=64, patch_size=16, num_register_tokens=4)
            ),
            {"size": {"height": 48, "width": 48}, "resample": 2},
        ),
        "vit": _transformers(
            root / "vit-classifier",  # without the pooler, and with a classifier
            ViTForImageClassification(ViTConfig(**vision | VIT)),
            half | {"size": 48, "resample": 2},
        ),
    }
    for name, (architecture, settings) in TIMM.items():
        model = timm.create_model(architecture, **settings)
        timm.models.save_for_hf(model, root / name, model_config={"model_args": settings}, safe_serialization=True)
        names[f"timm {name}"] = f"timm:{root / name}"
    for name, config in {"vit": OPEN_CLIP_VIT, "convnext": OPEN_CLIP_CONVNEXT}.items():
        folder = root / f"open_clip-{name}"
        folder.mkdir()
        model = open_clip.CLIP(24, config, OPEN_CLIP_TEXT)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        described = {"embed_dim": 24, "vision_cfg": config, "text_cfg": OPEN_CLIP_TEXT}
        pictures = {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3, "interpolation": "bilinear"}
        content = {"model_cfg": described, "preprocess_cfg": pictures}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        names[f"open_clip {name}"] = f"open_clip:{folder}"
    return names


def _spread(config: SiglipVisionConfig) -> PreTrainedModel:
    from transformers import SiglipVisionModel

    return SiglipVisionModel(config)


def _transformers(folder: Path, model: PreTrainedModel, preprocessor: dict) -> str:
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)
