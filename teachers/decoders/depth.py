"""Depth features to depth maps: the DPT neck and head of Depth-Anything-V2 (arXiv 2406.09414).

The head was trained on four layers of its backbone. A target or a prediction is one feature map, which takes the place
of all four, as the public code of OLA-VLM (arXiv 2412.09585) does: so even the map of a true target is not the map of
the photograph, but what the head makes of one layer, or of the mean of four, given four times. `decode_layers` takes
the four.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from olavlm.teachers.checkpoint import load_model, open_checkpoint, weights_digest
from olavlm.teachers.decoders.colours import depth_legend, depth_picture
from olavlm.teachers.decoders.grid import square_grid
from olavlm.teachers.errors import TeacherError


class DepthDecoder:
    """Tokens [B, g * g, dim] -> maps [g * patch, g * patch], float32; larger is closer (inverse depth, without unit).

    Args:
        neck, head: the library's modules, with float32 weights.
        patch: pixels of the map a token gives in each direction.
        num_layers: of the backbone that the neck takes.
    """

    needs_images = False

    def __init__(
        self,
        name: str,
        neck: torch.nn.Module,
        head: torch.nn.Module,
        *,
        dim: int,
        patch: int,
        num_layers: int,
        weights_sha256: str,
        device: torch.device,
    ) -> None:
        self.name, self.dim, self.patch, self.num_layers = name, dim, patch, num_layers
        self.weights_sha256, self.device = weights_sha256, device
        self._neck = neck.to(device).eval().requires_grad_(False)
        self._head = head.to(device).eval().requires_grad_(False)

    def decode(self, features: torch.Tensor, images: Sequence[Image.Image] | None = None) -> list[np.ndarray]:
        """Maps of features that stand for every layer; see `Decoder.decode`. `images` are not read."""
        return self.decode_layers([features] * self.num_layers)

    @torch.no_grad()
    def decode_layers(self, layers: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Maps of the backbone's own layers, in its order, each [B, g * g, dim] after the final LayerNorm.

        Raises:
            TeacherError: another number of layers, or features that are not of this model.
        """
        if len(layers) != self.num_layers:
            raise TeacherError(f"{len(layers)} layers: the decoder of {self.name} takes {self.num_layers}")
        sides = {square_grid(layer, self.dim, self.name) for layer in layers}
        if len(sides) != 1:
            raise TeacherError(f"layers with grids of sides {sorted(sides)}: give layers of one picture size")
        (side,) = sides
        tokens = [layer.to(self.device, torch.float32) for layer in layers]
        # The neck drops the first token, which is the class token of the backbone's own features.
        states = [torch.cat([layer.new_zeros(len(layer), 1, self.dim), layer], dim=1) for layer in tokens]
        with torch.autocast(self.device.type, enabled=False):
            depth = self._head(self._neck(states, side, side), side, side)
        return list(depth.float().cpu().numpy())

    def picture(self, decoded: np.ndarray) -> Image.Image:
        """Spectral_r from the map's least to its largest value: red is close."""
        return depth_picture(decoded)

    def legend(self, decoded: Sequence[np.ndarray], width: int) -> Image.Image:
        """The colours from far to close; each map has its own least and largest value."""
        return depth_legend(width)


def load_depth_decoder(*, name: str, model: str, revision: str | None, device: torch.device) -> DepthDecoder:
    """See `load_decoder`.

    Raises:
        TeacherError: the checkpoint cannot be used, or holds no neck and head.
    """
    from transformers import DepthAnythingForDepthEstimation

    checkpoint = open_checkpoint(model, revision=revision, model_types=("depth_anything",))
    network = load_model(DepthAnythingForDepthEstimation, checkpoint, part=("neck.", "head."))
    return DepthDecoder(
        name,
        network.neck,
        network.head,
        dim=network.backbone.config.hidden_size,
        patch=network.config.patch_size,
        num_layers=len(network.config.neck_hidden_sizes),
        weights_sha256=weights_digest(checkpoint.weights),
        device=device,
    )
