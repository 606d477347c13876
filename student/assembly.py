"""Sequences: text, image tokens and task tokens put together, and where each piece lies.

`<image>` is one token of the text. Its place is taken, sample by sample and by token id, by the image tokens followed
by the task tokens:  sys | image | g | d | s | text  (arXiv 2412.09585).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

from olavlm.student.choices import KeyBlocks
from olavlm.student.errors import RecipeError, SampleError
from olavlm.student.text.conversation import IGNORE_INDEX

PaddingSide = Literal["right", "left"]


def check_key_blocks(key_blocks: str) -> None:
    """RecipeError for a name that is none of `KeyBlocks`."""
    if key_blocks not in get_args(KeyBlocks):
        raise RecipeError(f"key_blocks={key_blocks!r} must be one of {', '.join(get_args(KeyBlocks))}")


@dataclass(frozen=True)
class SampleLayout:
    """Where the pieces of one sample lie, counted from its own first token, so that packing can shift them."""

    length: int
    """Tokens of the sample, padding excluded."""
    image: slice | None = None
    """The image tokens; None without an image."""
    tasks: tuple[slice, ...] = ()
    """The tokens of each task, in the order of insertion; empty without an image."""

    @property
    def complete(self) -> bool:
        """Whether there is an image of which, as of the task tokens, nothing was cut off."""
        last = self.tasks[-1] if self.tasks else self.image
        return last is not None and last.stop <= self.length


@dataclass
class AssembledBatch:
    """A batch of assembled samples, padded to one length L."""

    embeds: torch.Tensor
    """[B, L, H], zeros at padding."""
    attention_mask: torch.Tensor
    """long [B, L], 1 for tokens, 0 for padding."""
    labels: torch.Tensor
    """long [B, L], -100 at padding and at inserted tokens."""
    layouts: list[SampleLayout]
    padding_side: PaddingSide = "right"

    @property
    def starts(self) -> list[int]:
        """Of each row, the position of the sample's first token, from which its layout counts."""
        if self.padding_side == "right":
            return [0] * len(self.layouts)
        return [self.embeds.shape[1] - layout.length for layout in self.layouts]

    @property
    def complete(self) -> torch.Tensor:
        """bool [B]: samples with an image, whole."""
        return torch.tensor([layout.complete for layout in self.layouts], device=self.embeds.device)


def padded_right(
    attention_mask: torch.Tensor, *tensors: torch.Tensor | None
) -> tuple[PaddingSide, list[torch.Tensor | None]]:
    """The side that a batch is padded on, and its tensors with the padding on the right, the mask first.

    It is left when any row has padding ahead of its text. A row may be padded on the other side, or on both.

    Args:
        attention_mask: (B, L), 1 for text and 0 for padding.
        tensors: (B, L) each, or None.
    """
    ahead = (attention_mask != 0).int().argmax(dim=1)
    if not ahead.any():
        return "right", [attention_mask, *tensors]
    length = attention_mask.shape[1]
    places = (torch.arange(length, device=ahead.device) + ahead[:, None]) % length
    return "left", [None if tensor is None else tensor.gather(1, places) for tensor in (attention_mask, *tensors)]


def locate(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_token_id: int,
    num_image_tokens: int,
    num_tasks: int,
    num_task_tokens: int,
    max_length: int | None,
) -> list[SampleLayout]:
    """The layout of each sample of a right-padded text batch (B, L), after insertion and cut to `max_length`.

    Raises:
        SampleError: more than one `<image>` in a sample, or padding ahead of text (`padded_right`) or within it.
    """
    mask = attention_mask.cpu().bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise SampleError("attention_mask has a 0 with text on either side of it; pad at the ends of the text alone")
    is_image = (input_ids.cpu() == image_token_id) & mask
    counts = is_image.sum(dim=1).tolist()
    if max(counts, default=0) > 1:
        raise SampleError(f"row {counts.index(max(counts))} has {max(counts)} image tokens; one is the most")
    starts = is_image.int().argmax(dim=1).tolist()
    layouts = []
    for count, start, length in zip(counts, starts, mask.sum(dim=1).tolist(), strict=True):
        if not count:
            layouts.append(SampleLayout(length if max_length is None else min(length, max_length)))
            continue
        image = slice(start, start + num_image_tokens)
        bounds = [image.stop + k * num_task_tokens for k in range(num_tasks + 1)]
        tasks = tuple(slice(*pair) for pair in pairwise(bounds))
        length += num_image_tokens + num_tasks * num_task_tokens - 1
        layouts.append(SampleLayout(length if max_length is None else min(length, max_length), image, tasks))
    return layouts


def assemble(
    text_embeds: torch.Tensor,
    labels: torch.Tensor | None,
    layouts: Sequence[SampleLayout],
    image_embeds: torch.Tensor,
    task_embeds: torch.Tensor,
    padding_side: PaddingSide = "right",
) -> AssembledBatch:
    """Puts the pieces of each sample together and pads the batch.

    A sample without an image takes zero-length slices of `image_embeds` and `task_embeds` along, so that projector and
    task tokens are part of every rank's graph in every step.

    Args:
        text_embeds: (B, L, H), right-padded, with one row for `<image>` where there is an image.
        labels: long (B, L), or None for none.
        layouts: of `locate`.
        image_embeds: (samples with an image, num_image_tokens, H), or (0, ., H).
        task_embeds: (T*N, H).
        padding_side: of the result; left for generation.
    """
    images = iter(image_embeds)
    none = torch.cat([image_embeds.flatten(0, 1)[:0], task_embeds[:0]])
    embed_rows, label_rows = [], []
    for row, layout in enumerate(layouts):
        words = text_embeds[row]
        row_labels = words.new_full((len(words),), IGNORE_INDEX, dtype=torch.long)
        if labels is not None:
            row_labels = labels[row]
        if layout.image is None:
            pieces = [none, words]
            label_pieces = [row_labels]
        else:
            start = layout.image.start
            image = next(images)
            inserted = row_labels.new_full((len(image) + len(task_embeds),), IGNORE_INDEX)
            pieces = [words[:start], image, task_embeds, words[start + 1 :]]
            label_pieces = [row_labels[:start], inserted, row_labels[start + 1 :]]
        embed_rows.append(torch.cat(pieces)[: layout.length])
        label_rows.append(torch.cat(label_pieces)[: layout.length])
    lengths = [torch.ones(layout.length, dtype=torch.long, device=text_embeds.device) for layout in layouts]
    return AssembledBatch(
        embeds=pad_sequence(embed_rows, batch_first=True, padding_side=padding_side),
        attention_mask=pad_sequence(lengths, batch_first=True, padding_side=padding_side),
        labels=pad_sequence(label_rows, True, IGNORE_INDEX, padding_side=padding_side),
        layouts=list(layouts),
        padding_side=padding_side,
    )


def key_mask(batch: AssembledBatch, task: int, key_blocks: KeyBlocks, include_answer: bool) -> torch.Tensor:
    """bool [B, L]: the positions that the predictors of a task attend to.

    The tokens of other tasks and padding never belong to it. A sample without an image keeps all its tokens.

    Args:
        task: index of the task in the order of insertion.
        key_blocks: `img+t`: image and own tokens. `sys+img+t`: also what stands ahead of the image. `sys+img+t+txt`:
            also what follows the task tokens (arXiv 2412.09585, table I).
        include_answer: whether supervised positions, the answers, belong to the text. The public code includes them.
    """
    mask = torch.zeros(batch.embeds.shape[:2], dtype=torch.bool)
    for row, (start, layout) in enumerate(zip(batch.starts, batch.layouts, strict=True)):
        own = mask[row, start : start + layout.length]
        own[:] = True
        if layout.image is None:
            continue
        if key_blocks == "img+t":
            own[: layout.image.start] = False
        for index, place in enumerate(layout.tasks):
            if index != task:
                own[place] = False
        if key_blocks != "sys+img+t+txt":
            own[(layout.tasks[-1] if layout.tasks else layout.image).stop :] = False
    mask = mask.to(batch.embeds.device)
    return mask if include_answer else mask & (batch.labels == IGNORE_INDEX)


def count_supervised(
    input_ids: Sequence[int],
    labels: Sequence[int],
    image_token_id: int,
    num_inserted_tokens: int,
    max_length: int | None,
) -> int:
    """Tokens of one sample that the text loss counts once images are inserted and the sequence is cut.

    Known ahead of the forward, so that the loss can be divided by the count of the whole batch. The first token is
    never counted, since nothing predicts it.

    Args:
        num_inserted_tokens: `OlaVLM.num_inserted_tokens`.
        max_length: `OlaVLMConfig.max_sequence_length`.
    """
    count, shift = 0, 0
    for position, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if token == image_token_id:
            shift = num_inserted_tokens
        elif label != IGNORE_INDEX and position > 0:
            count += max_length is None or position + shift < max_length
    return count
