"""The gen teacher: the CLIP image embedding that conditions Stable Diffusion unCLIP (an OpenCLIP ViT-H/14).

One token a picture: the projected embedding, not L2-normalised, as the target of OLA-VLM (arXiv 2412.09585). The same
weights in open_clip's layout give the same features as `open_clip:ViT-H-14/laion2b_s32b_b79k`.
"""

from __future__ import annotations

import torch
from PIL import Image

from olavlm.teachers.base import PixelTeacher, library_versions
from olavlm.teachers.card import Card
from olavlm.teachers.checkpoint import load_model, open_checkpoint, weights_digest
from olavlm.teachers.geometry import CLIP_MEAN, CLIP_STD, short_edge_crop


class GenTeacher(PixelTeacher):
    """Image embeddings [B, 1, dim]."""

    def resize(self, image: Image.Image) -> Image.Image:
        return short_edge_crop(image, self.card.size[0])

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(pixels).image_embeds[:, None]


def load_gen(
    *, name: str, model: str, revision: str | None, recipe: str, geometry: str, device: torch.device, compute_dtype: str
) -> GenTeacher:
    """See `registry.load_teacher`, which checks the arguments.

    Raises:
        TeacherError: the checkpoint cannot be used.
    """
    from transformers import CLIPVisionModelWithProjection

    checkpoint = open_checkpoint(
        model, revision=revision, model_types=("clip_vision_model",), subfolder="image_encoder"
    )
    network = load_model(CLIPVisionModelWithProjection, checkpoint)
    side = network.config.image_size
    card = Card(
        name=name,
        model=checkpoint.model,
        revision=checkpoint.revision,
        weights_sha256=weights_digest(checkpoint.weights),
        recipe={
            "name": recipe,
            "layers": ["image_embeds"],
            "averaging": "none",
            "resize": f"short edge to {side} bicubic, centre crop",
            "interpolation": "none",
        },
        geometry=geometry,
        size=(side, side),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        compute_dtype=compute_dtype,
        tokens=1,
        dim=network.config.projection_dim,
        grid=(1, 1),
        versions=library_versions("transformers"),
    )
    return GenTeacher(card, network, device)
