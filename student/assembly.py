"""Sequences: text, image tokens and task tokens put together, and what of them a task's predictors attend to."""

from dataclasses import dataclass
from typing import get_args

import torch

from olavlm.student.choices import KeyBlocks
from olavlm.student.errors import RecipeError
from olavlm.student.placement import AFTER, BEFORE, FIRST_TASK, IMAGE, Placement
from olavlm.student.text.conversation import IGNORE_INDEX


def check_key_blocks(key_blocks: str) -> None:
    """RecipeError for a name that is none of `KeyBlocks`."""
    if key_blocks not in get_args(KeyBlocks):
        raise RecipeError(f"key_blocks={key_blocks!r} must be one of {', '.join(get_args(KeyBlocks))}")


@dataclass
class AssembledBatch:
    """A batch of assembled samples, padded to one length L."""

    embeds: torch.Tensor
    """[B, L, H], zeros at padding."""
    placement: Placement
    """On the same device."""


def assemble(text: torch.Tensor, images: torch.Tensor, tasks: torch.Tensor, placement: Placement) -> AssembledBatch:
    """Puts the pieces of each sample in their places.

    Without any image, projector and task tokens are part of the graph all the same, as of every rank's in every step.

    Args:
        text: (W, H), embeddings of the text tokens that the placement keeps.
        images: (samples with an image, P, H), or (0, ., H).
        tasks: (T*N, H), those of each sample with an image.
    """
    b, length = placement.shape
    of_samples = tasks.expand(len(images), -1, -1)
    pieces = torch.cat([text, images.flatten(0, 1), of_samples.flatten(0, 1)])
    embeds = text.new_zeros(b * length + placement.cuts, text.shape[-1]).index_copy_(0, placement.places, pieces)
    if placement.cuts:
        embeds = embeds[:-1]
    return AssembledBatch(embeds.view(b, length, -1), placement)


def key_mask(placement: Placement, task: int, key_blocks: KeyBlocks, include_answer: bool) -> torch.Tensor:
    """bool [B, L]: the positions that the predictors of a task attend to.

    The tokens of other tasks and padding never belong to it. A sample without an image keeps all its tokens.

    Args:
        task: index of the task in the order of insertion.
        key_blocks: `img+t`: image and own tokens. `sys+img+t`: also what stands ahead of the image. `sys+img+t+txt`:
            also what follows the task tokens (arXiv 2412.09585, table I).
        include_answer: whether supervised positions, the answers, belong to the text. The public code includes them.
    """
    kinds = [IMAGE, FIRST_TASK + task]
    kinds += [BEFORE] if key_blocks != "img+t" else []
    kinds += [AFTER] if key_blocks == "sys+img+t+txt" else []
    mask = torch.zeros_like(placement.parts, dtype=torch.bool)
    for kind in kinds:
        mask |= placement.parts == kind
    return mask if include_answer else mask & (placement.labels == IGNORE_INDEX)
