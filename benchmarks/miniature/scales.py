"""What networks hand on, moved and scaled to about 0 and 1, where what they make of a picture stays as it is.

Networks this small say mostly the same of every picture: of the depth teacher's features as they are learnt, a
constant alone has a cosine of 0.95 with each. What a picture adds would hardly count in a loss or a similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import CLIPVisionModel, DepthAnythingForDepthEstimation, OneFormerModel


@torch.no_grad()
def at_unit_scale(model: CLIPVisionModel, pixel_values: torch.Tensor) -> None:
    """Divides all that is written into the states by one number, so that the features are about 1.

    Training lets states grow, which the blocks' normalisations hide and a projector would see. What the model makes of
    a picture stays, but for these normalisations' epsilon.
    """
    scale = model(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:].square().mean().sqrt()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("pre_layrnorm", "self_attn.out_proj", "mlp.fc2")):
            parameter /= scale


@torch.no_grad()
def standardize_depth(model: DepthAnythingForDepthEstimation, pixel_values: torch.Tensor) -> None:
    """Depth-Anything-V2's layers, between their mean, which is distilled, and the last, which is probed."""
    layers = torch.stack([layer[:, 1:] for layer in model.backbone(pixel_values).feature_maps])
    readers = [layer.projection for layer in model.neck.reassemble_stage.layers]
    _standardize(model.backbone.layernorm, torch.stack([layers.mean(0), layers[-1]]), readers)


@torch.no_grad()
def standardize_seg(model: OneFormerModel, pixel_values: torch.Tensor) -> None:
    """The last stage of OneFormer's Swin backbone."""
    encoder, decoder = model.pixel_level_module.encoder, model.pixel_level_module.decoder
    features = encoder(pixel_values).feature_maps[-1].movedim(1, -1)
    _standardize(encoder.hidden_states_norms[encoder.out_features[-1]], features, [decoder.input_projections[0][0]])


def _standardize(norm: nn.LayerNorm, features: torch.Tensor, readers: Sequence[nn.Conv2d]) -> None:
    """Features [..., C] to mean 0 in each channel and root mean square 1 over all, by the normalisation that they leave
    last; those who read them, by a convolution of 1 x 1, are given the opposite."""
    mean = features.flatten(0, -2).mean(0)
    scale = (features - mean).square().mean().sqrt()
    norm.weight /= scale
    norm.bias.sub_(mean).div_(scale)
    for reader in readers:
        reader.bias += reader.weight[:, :, 0, 0] @ mean
        reader.weight *= scale
