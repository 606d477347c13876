"""Checkpoints with random weights, in the true architectures and sizes, that the package's own code then loads.

Speed does not depend on the weights' values; published ones would need the network. Of OneFormer only the backbone is
run, so only the backbone is of full size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from olavlm.teachers import Teacher, load_teacher
from olavlm.teachers.checkpoint import quiet
from olavlm.teachers.tiny import make_tiny


@dataclass(frozen=True)
class Architecture:
    title: str
    teacher: str
    """Name in the teachers' registry."""
    write: Callable[[Path], Path]
    """Write the checkpoint below a folder of its own, unless it is there; where it lies."""


def _depth(hidden: int, layers: int, out_indices: list[int], neck: list[int], fusion: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

        backbone = Dinov2Config(
            image_size=518,
            patch_size=14,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            out_indices=out_indices,
            reshape_hidden_states=False,
        )
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=hidden,
            neck_hidden_sizes=neck,
            fusion_hidden_size=fusion,
        )
        return _save(lambda: DepthAnythingForDepthEstimation(config), folder)

    return write


def _seg(embed_dim: int, depths: list[int], window: int, image_size: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from transformers import OneFormerConfig, OneFormerModel, SwinConfig

        config = OneFormerConfig.from_pretrained(Path(_all_tiny().name, "seg"))
        config.backbone_config = SwinConfig(
            image_size=image_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=[embed_dim // 32 * 2**stage for stage in range(4)],
            window_size=window,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return _save(lambda: OneFormerModel(config), folder)

    return write


def _gen(hidden: int, layers: int, patch: int, projection: int, act: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(
            image_size=224,
            patch_size=patch,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // (80 if hidden == 1280 else 64),
            projection_dim=projection,
            hidden_act=act,
        )
        return _save(lambda: CLIPVisionModelWithProjection(config), folder)

    return write


def _save(make: Callable[[], torch.nn.Module], folder: Path) -> Path:
    model = folder / "model"
    if not model.exists():
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make().save_pretrained(model)
    return model


def _tiny(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(_all_tiny().name, name)


@cache
def _all_tiny() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    make_tiny(folder.name)
    return folder


ARCHITECTURES: dict[str, Architecture] = {
    "depth-large": Architecture(
        "Depth-Anything-V2-L (DINOv2-L/14 at 336)",
        "depth",
        _depth(1024, 24, [5, 12, 18, 24], [256, 512, 1024, 1024], 256),
    ),
    "depth-small": Architecture(
        "Depth-Anything-V2-S (DINOv2-S/14 at 336)", "depth", _depth(384, 12, [3, 6, 9, 12], [48, 96, 192, 384], 64)
    ),
    "seg-large": Architecture("OneFormer's Swin-L at 800", "seg", _seg(192, [2, 2, 18, 2], 12, 384)),
    "seg-small": Architecture("OneFormer's Swin-T at 800", "seg", _seg(96, [2, 2, 6, 2], 7, 224)),
    "gen-large": Architecture("unCLIP's ViT-H/14 at 224", "gen", _gen(1280, 32, 14, 1024, "gelu")),
    "gen-small": Architecture("CLIP ViT-B/16 at 224", "gen", _gen(768, 12, 16, 512, "quick_gelu")),
    **{f"{name}-tiny": Architecture(f"a tiny {name}", name, _tiny(name)) for name in ("depth", "seg", "gen")},
}


def load(name: str, *, device: str, compute_dtype: str) -> Teacher:
    """The teacher of one of `ARCHITECTURES`. Its checkpoint is written once, and removed when Python ends."""
    kind = ARCHITECTURES[name]
    model = kind.write(Path(_folder(name).name))
    return load_teacher(kind.teacher, model=model, device=device, compute_dtype=compute_dtype)


@cache
def _folder(name: str) -> TemporaryDirectory:
    return TemporaryDirectory()
