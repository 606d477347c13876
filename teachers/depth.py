"""The depth teacher: patch features of Depth-Anything-V2's DINOv2 backbone (arXiv 2406.09414).

`mean4`, the distillation target, averages the four layers that feed the model's depth decoder, each after the shared
final LayerNorm (Depth-Anything-V2-Large: blocks 4, 11, 17 and 23, counted from 0). `last` is the final layer alone,
as OLA-VLM (arXiv 2412.09585) probes it. Layers, tokens and width come from the loaded model.
"""

from __future__ import annotations

import torch
from PIL import Image

from olavlm.teachers.base import PixelTeacher, library_versions
from olavlm.teachers.card import Card
from olavlm.teachers.checkpoint import load_model, open_checkpoint, weights_digest
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import IMAGENET_MEAN, IMAGENET_STD, squash

SIDE = 336  # 24 x 24 patches of 14 pixels, the grid of the paper's base encoder and targets


class DepthTeacher(PixelTeacher):
    """Patch tokens [B, grid[0] * grid[1], dim], row-major; the class token is dropped."""

    def resize(self, image: Image.Image) -> Image.Image:
        return squash(image, SIDE, Image.Resampling.BICUBIC)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        # Block by block: the backbone's own forward would keep the output of every block, and make feature maps.
        layers, total = self.card.recipe["layers"], 0
        hidden = self.network.embeddings(pixels)
        for index, block in enumerate(self.network.encoder.layer):
            hidden = block(hidden)
            if index in layers:
                total = total + self.network.layernorm(hidden).float()
        return total[:, -self.card.tokens :] / len(layers)


def load_depth(
    *, name: str, model: str, revision: str | None, recipe: str, geometry: str, device: torch.device, compute_dtype: str
) -> DepthTeacher:
    """See `registry.load_teacher`, which checks the arguments.

    Raises:
        TeacherError: the checkpoint cannot be used, its patches do not divide the 336-pixel input, or its decoder is
            fed with the embeddings.
    """
    from transformers import DepthAnythingForDepthEstimation

    checkpoint = open_checkpoint(model, revision=revision, model_types=("depth_anything",))
    backbone = load_model(
        DepthAnythingForDepthEstimation,
        checkpoint,
        part="backbone.",
        unused=("mask_token",),
    ).backbone
    config = backbone.config
    if SIDE % config.patch_size:
        raise TeacherError(
            f"{model}: its patches of {config.patch_size} pixels do not divide the recipe's {SIDE}-pixel input; "
            "name a model with 14-pixel patches"
        )
    if recipe == "mean4":
        # Stage 0 is the embeddings, i the output of block i - 1. A config may count its indices from the end.
        layers = [backbone.stage_names.index(name) - 1 for name in backbone.out_features]
        if min(layers) < 0:
            raise TeacherError(
                f"{model}: its backbone's out_features {backbone.out_features} begin with the embeddings; mean4 "
                "averages outputs of blocks; take recipe last or name another model"
            )
    else:
        layers = [config.num_hidden_layers - 1]
    del backbone.encoder.layer[max(layers) + 1 :]  # what comes after the last layer that is read
    rows = SIDE // config.patch_size
    card = Card(
        name=name,
        model=checkpoint.model,
        revision=checkpoint.revision,
        weights_sha256=weights_digest(checkpoint.weights),
        recipe={
            "name": recipe,
            "layers": layers,
            "layer_norm": "final",
            "averaging": "mean" if len(layers) > 1 else "none",
            "resize": f"squash to {SIDE} bicubic",
            "interpolation": "none",
        },
        geometry=geometry,
        size=(SIDE, SIDE),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        compute_dtype=compute_dtype,
        tokens=rows * rows,
        dim=config.hidden_size,
        grid=(rows, rows),
        versions=library_versions("transformers"),
    )
    return DepthTeacher(card, backbone, device)
