"""The seg teacher: the last feature map of OneFormer's Swin backbone (arXiv 2211.06220).

`stage4`, the distillation target of OLA-VLM (arXiv 2412.09585): the picture is squashed to 768 x 768, resized as
OneFormer's processor does (800 x 800), and the stage-4 map after its LayerNorm, 25 x 25, is interpolated to the
24 x 24 grid of a 768-pixel input. `stage4-768` feeds the 768 x 768 picture directly, which gives that grid exactly.

Only the backbone is kept, and the processor's class is never built: a configuration that names `class_info_file` makes
it ask the hub even for a local folder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image

from olavlm.teachers.base import PixelTeacher, library_versions
from olavlm.teachers.card import Card
from olavlm.teachers.checkpoint import load_model, open_checkpoint, weights_digest
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.geometry import IMAGENET_MEAN, IMAGENET_STD, squash
from olavlm.teachers.preprocessor import Preprocessor

SIDE = 768  # both recipes squash to this first; it sets the token grid: 768 / 32 = 24


class SegTeacher(PixelTeacher):
    """Tokens [B, grid[0] * grid[1], dim], row-major, of the last stage."""

    def __init__(self, card: Card, network: torch.nn.Module, device: torch.device, resample: Image.Resampling) -> None:
        super().__init__(card, network, device)
        self._resample = resample

    def resize(self, image: Image.Image) -> Image.Image:
        image = squash(image, SIDE, Image.Resampling.BICUBIC)
        side = self.card.size[0]
        return image if side == SIDE else squash(image, side, self._resample)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        # The backbone's own forward would normalise and keep the maps of the other stages too.
        swin = self.network.swin
        hidden = swin.encoder(*swin.embeddings(pixels), always_partition=True).last_hidden_state
        tokens = self.network.hidden_states_norms[self.card.recipe["layers"][0]](hidden).float()
        if tokens.shape[1] == self.card.tokens:
            return tokens
        maps = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        maps = F.interpolate(maps, size=self.card.grid, mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2).contiguous()


def load_seg(
    *, name: str, model: str, revision: str | None, recipe: str, geometry: str, device: torch.device, compute_dtype: str
) -> SegTeacher:
    """See `registry.load_teacher`, which checks the arguments.

    Raises:
        TeacherError: the checkpoint cannot be used, or its backbone is not a Swin.
    """
    # The model without its training loss, which alone would need scipy.
    from transformers import OneFormerModel

    checkpoint = open_checkpoint(model, revision=revision, model_types=("oneformer",))
    backbone = load_model(
        OneFormerModel,
        checkpoint,
        part="pixel_level_module.encoder.",
        unused=("swin.layernorm.",),  # the classifier's norm; each stage has its own
    ).pixel_level_module.encoder
    config = backbone.config
    if config.model_type != "swin":
        raise TeacherError(f"{model}: its backbone is a {config.model_type}, seg runs a swin; name a Swin OneFormer")
    if backbone.out_features[-1] != (last := backbone.stage_names[-1]):
        raise TeacherError(
            f"{model}: its backbone ends with {backbone.out_features[-1]}, not {last}; name another model"
        )
    stride = config.patch_size * 2 ** (len(config.depths) - 1)
    processor = Preprocessor.of(checkpoint)
    resample = processor.resample(Image.Resampling.BILINEAR)
    mean, std = processor.normalisation(IMAGENET_MEAN, IMAGENET_STD)
    side = processed_side(processor, SIDE) if recipe == "stage4" else SIDE
    rows = SIDE // stride
    card = Card(
        name=name,
        model=checkpoint.model,
        revision=checkpoint.revision,
        weights_sha256=weights_digest(checkpoint.weights),
        recipe={
            "name": recipe,
            "layers": [last],
            "layer_norm": "stage",
            "averaging": "none",
            "resize": f"squash to {SIDE} bicubic"
            + (f", then to {side} {resample.name.lower()}" if side != SIDE else ""),
            "interpolation": "none" if side == SIDE else "bilinear, align_corners=False",
        },
        geometry=geometry,
        size=(side, side),
        mean=mean,
        std=std,
        compute_dtype=compute_dtype,
        tokens=rows * rows,
        dim=backbone.channels[-1],
        grid=(rows, rows),
        versions=library_versions("transformers"),
    )
    return SegTeacher(card, backbone, device, resample)


def processed_side(processor: Preprocessor, side: int) -> int:
    """Side in pixels to which OneFormer's image processor resizes a square picture of `side` pixels.

    Args:
        processor: without a `size` the library's default: short edge 800, long edge at most 1333. Older files write
            `size` as a number, with `max_size` beside it.

    Raises:
        TeacherError: a `size` that does not say what becomes of a square.
    """
    if not processor.flag("do_resize"):
        return side
    size = processor.fields.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    if not isinstance(size, dict):
        size = {"shortest_edge": size, "longest_edge": processor.fields.get("max_size")}
    edges = {name: edge for name, edge in size.items() if edge is not None}
    if all(type(edge) is int and edge > 0 for edge in edges.values()):
        if "shortest_edge" in edges:
            return min(edges["shortest_edge"], edges.get("longest_edge", edges["shortest_edge"]))
        if "height" in edges and edges["height"] == edges.get("width"):
            return edges["height"]
    raise processor.wrong(
        "size",
        "it must keep a square picture square: give shortest_edge and longest_edge in pixels, or use recipe stage4-768",
    )
