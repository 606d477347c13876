"""Seg features to classes: OneFormer's pixel and transformer decoders (arXiv 2211.06220), asked for semantics.

OneFormer decodes four backbone stages, and a target or a prediction is the last alone. Where the other three come from
decides what a map, or a score on it, says:

- `shrunk`, as the public code of OLA-VLM (arXiv 2412.09585) has it: stages 1 to 3 of the real backbone on the real
  photograph, each resized to the last stage's grid. What is decoded is therefore NOT the prediction's alone: a useless
  prediction still stands beside three good stages.
- `full`: the same stages at their own sizes. With a target of recipe `stage4-768` these are the model's own four maps,
  and the classes are the model's own.
- `zero`: nothing of the photograph; zeros of the last stage's grid. The prediction alone is decoded, by a decoder that
  never saw such input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from olavlm.teachers.base import PixelTeacher
from olavlm.teachers.checkpoint import Checkpoint, load_model, one_line, open_checkpoint, quiet
from olavlm.teachers.decoders.colours import class_legend, class_picture, largest_classes
from olavlm.teachers.decoders.grid import square_grid
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.registry import look_up
from olavlm.teachers.seg import load_seg

Context = Literal["shrunk", "full", "zero"]
TASK = "the task is semantic"
"""What OneFormer is told; its queries depend on it."""
_CLASSES_AT_ONCE = 16  # of which the scores are resized to the photograph together
_NAMED = 8  # classes in a legend


class SegDecoder:
    """Tokens [B, g * g, dim] and photographs -> classes (height, width) of each photograph, int64.

    Args:
        network: a `OneFormerModel` with float32 weights.
        teacher: makes the network's input of a photograph, as the features' own teacher does.
        task: float [1, length], the token ids of `TASK`.
        classes: names by class id.
        context: see the module.
    """

    needs_images = True

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        teacher: PixelTeacher,
        task: torch.Tensor,
        *,
        classes: Sequence[str],
        context: Context,
        weights_sha256: str,
        device: torch.device,
    ) -> None:
        self.name, self.classes, self.context = name, list(classes), context
        self.weights_sha256, self.device = weights_sha256, device
        self._network = network.to(device).eval().requires_grad_(False)
        self._teacher, self._task = teacher, task.to(device)
        self._mean = torch.tensor(teacher.card.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(teacher.card.std, device=device).view(3, 1, 1)
        self.dim = network.pixel_level_module.encoder.channels[-1]

    def decode(self, features: torch.Tensor, images: Sequence[Image.Image] | None = None) -> list[np.ndarray]:
        """Classes of each pixel of the photographs; see `Decoder.decode`.

        Photographs are needed with `zero` too, for their sizes.
        """
        if images is None or len(images) != len(features):
            given = "none" if images is None else len(images)
            raise TeacherError(f"{len(features)} features and {given} photographs: seg decodes each with its own")
        side, decoded, context = square_grid(features, self.dim, self.name), [], []
        for row, image in enumerate(images):
            if row == 0 or image is not images[row - 1]:  # of one photograph, several layers may predict
                context = self._context(image, side)
            logits = self._queries(features[row : row + 1], side, context)
            decoded.append(classes_of(*logits, size=(image.height, image.width)))
        return decoded

    @torch.no_grad()
    def _queries(
        self, features: torch.Tensor, side: int, context: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of classes [1, queries, classes + 1] and of masks [1, queries, h, w] for one photograph."""
        last = features.to(self.device, torch.float32).transpose(1, 2).unflatten(2, (side, side)).contiguous()
        with torch.autocast(self.device.type, enabled=False):
            decoded = self._network.pixel_level_module.decoder([*context, last], output_hidden_states=False)
            output = self._network.transformer_module(
                multi_scale_features=decoded.multi_scale_features,
                mask_features=decoded.mask_features,
                task_token=self._network.task_encoder(self._task),
            )
        return output.prediction_class, output.prediction_masks

    @torch.no_grad()
    def _context(self, image: Image.Image, side: int) -> list[torch.Tensor]:
        """The stages ahead of the last, [1, channels, h, w]."""
        encoder = self._network.pixel_level_module.encoder
        if self.context == "zero":
            return [torch.zeros(1, channels, side, side, device=self.device) for channels in encoder.channels[:-1]]
        pixels = torch.from_numpy(self._teacher.prepare(image))[None].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            stages = list(encoder(pixels.float().div(255).sub(self._mean).div(self._std)).feature_maps[:-1])
        if self.context == "full":
            return stages
        return [F.interpolate(stage, (side, side), mode="bilinear", align_corners=False) for stage in stages]

    def picture(self, decoded: np.ndarray) -> Image.Image:
        """A colour a class, the same in every map."""
        return class_picture(decoded, len(self.classes))

    def legend(self, decoded: Sequence[np.ndarray], width: int) -> Image.Image:
        """The largest classes over all of the maps, with their names."""
        return class_legend(largest_classes(decoded, len(self.classes), _NAMED), self.classes, width)


def classes_of(class_logits: torch.Tensor, mask_logits: torch.Tensor, *, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel, int64 (height, width), as OneFormer's semantic post-processing has it.

    A class scores, at a pixel, the sum over queries of its probability times the mask's; scores are resized to `size`
    (bilinear, with antialiasing where that is smaller) and the best class wins. No-object, the last class, is left out.

    Args:
        class_logits: [1, queries, classes + 1].
        mask_logits: [1, queries, h, w].
    """
    probabilities, masks = class_logits[0].softmax(dim=-1)[:, :-1], mask_logits[0].sigmoid()
    scores = torch.einsum("qc,qhw->chw", probabilities, masks)
    best = torch.full(size, -torch.inf, device=scores.device)
    winner = torch.zeros(size, dtype=torch.long, device=scores.device)
    for first in range(0, len(scores), _CLASSES_AT_ONCE):  # all at once are gigabytes for a large photograph
        part = scores[first : first + _CLASSES_AT_ONCE][None]
        part = F.interpolate(part, size, mode="bilinear", align_corners=False, antialias=True)[0]
        value, index = part.max(dim=0)
        better = value > best
        best, winner = torch.where(better, value, best), torch.where(better, index + first, winner)
    return winner.cpu().numpy()


def load_seg_decoder(
    *,
    name: str,
    model: str,
    revision: str | None,
    device: torch.device,
    recipe: str | None = None,
    context: Context = "shrunk",
) -> SegDecoder:
    """See `load_decoder`.

    Args:
        recipe: of the features, as for `load_teacher`: it says what the photograph is resized to.
        context: see the module.

    Raises:
        TeacherError: the checkpoint cannot be used, or has no tokenizer of its own.
    """
    from transformers import OneFormerModel

    if context not in get_args(Context):
        raise TeacherError(f"context {context!r}: unknown; use one of {', '.join(get_args(Context))}")
    _, recipe = look_up(name, recipe)
    checkpoint = open_checkpoint(model, revision=revision, model_types=("oneformer",))
    teacher = load_seg(
        name=name, model=model, revision=revision, recipe=recipe, geometry="reference",
        device=device, compute_dtype="float32",
    )  # fmt: skip
    network = load_model(OneFormerModel, checkpoint, unused=("swin.layernorm.", "text_mapper."))
    network.pixel_level_module.encoder = teacher.network  # the same weights, once
    labels = network.config.id2label
    return SegDecoder(
        name,
        network,
        teacher,
        task_tokens(checkpoint, network.config.task_seq_len),
        classes=[labels[i] for i in range(len(labels))],
        context=context,
        weights_sha256=teacher.card.weights_sha256,
        device=device,
    )


def task_tokens(checkpoint: Checkpoint, length: int) -> torch.Tensor:
    """`TASK` as float [1, length]: token ids by the checkpoint's own tokenizer, 0 for padding.

    OneFormer's processor class is never built: it may ask the hub even for a local folder.

    Raises:
        TeacherError: the checkpoint has no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    try:
        with quiet():
            if checkpoint.revision is None:
                tokenizer = CLIPTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
            else:
                tokenizer = CLIPTokenizer.from_pretrained(checkpoint.model, revision=checkpoint.revision)
            encoded = tokenizer(TASK, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            said = tokenizer.decode(encoded.input_ids[0], skip_special_tokens=True)
            if said != TASK:  # without files the library makes a tokenizer that knows no word
                raise ValueError(f"it reads {TASK!r} as {said!r}")
    except Exception as error:  # damaged files fail in two libraries, each with errors of its own
        raise TeacherError(
            f"{checkpoint.model}: its tokenizer cannot be used ({one_line(error)}); the decoder needs vocab.json and "
            "merges.txt, or tokenizer.json, beside the weights"
        ) from error
    return (encoded.input_ids * encoded.attention_mask).float()
