"""Where each piece of a batch's sequences lies, worked out on the host ahead of the forward.

`<image>` is one token of the text. Its place is taken, sample by sample and by token id, by the image tokens followed
by the task tokens:  sys | image | g | d | s | text  (arXiv 2412.09585). A loader process knows the token ids, and so
every index that the forward needs: a GPU is never asked where something is, which would make it wait for its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from olavlm.student.errors import SampleError
from olavlm.student.text.conversation import IGNORE_INDEX

PaddingSide = Literal["right", "left"]

PADDING, IMAGE, BEFORE, AFTER, FIRST_TASK = range(-1, 4)
"""What a position holds: nothing, an image token, text ahead of the image, text behind the task tokens, or a token of
task k as FIRST_TASK + k. All tokens of a sample without an image are marked IMAGE: each task may attend to them."""


@dataclass(frozen=True)
class Inserted:
    """What takes the place of `<image>`."""

    image_token_id: int
    num_image_tokens: int
    num_tasks: int
    num_task_tokens: int
    """N, tokens of each task."""

    @property
    def added(self) -> int:
        """Tokens that an image adds to its text, less the `<image>` they replace."""
        return self.num_image_tokens + self.num_tasks * self.num_task_tokens - 1


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


@dataclass(frozen=True)
class Placement:
    """A batch of b samples, padded to one length L; places count through the flattened [b, L]."""

    layouts: list[SampleLayout]
    padding_side: PaddingSide
    attention_mask: torch.Tensor
    """long [b, L], 1 for tokens, 0 for padding."""
    labels: torch.Tensor
    """long [b, L], -100 at padding and at inserted tokens."""
    parts: torch.Tensor
    """int8 [b, L], what each position holds."""
    text_tokens: torch.Tensor
    """long (W,): where the text tokens that are kept stand in the flattened `input_ids`."""
    places: torch.Tensor
    """long (W + I·P + I·T·N,): places of text tokens, then of the I samples' image tokens, then of their task tokens.
    What is cut off has the place behind the last, b·L."""
    image_rows: torch.Tensor
    """long (I,): samples with an image."""
    task_starts: torch.Tensor
    """long [b, T]: in its row, the first token of each task; 0 where the sample is not complete."""
    complete: torch.Tensor
    """bool [b]: samples with an image, whole."""
    tokens: torch.Tensor
    """long (tokens,): all but padding, sample after sample."""
    positions: torch.Tensor
    """long (tokens,): of each of them, counted from the start of its sample."""
    predicting: torch.Tensor
    """long (supervised tokens,): the positions whose next token has a label."""
    predicted: torch.Tensor
    """long (supervised tokens,): that label."""

    @property
    def shape(self) -> tuple[int, int]:
        """b and L."""
        return tuple(self.labels.shape)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(layout.length for layout in self.layouts)

    @property
    def starts(self) -> list[int]:
        """Position of the first token of each row's sample, from which its layout counts."""
        width = self.labels.shape[1]
        return [0 if self.padding_side == "right" else width - length for length in self.lengths]

    @property
    def cuts(self) -> bool:
        """Whether anything to be inserted was cut off."""
        return any(layout.image is not None and not layout.complete for layout in self.layouts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of its fields that are."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Placement:
        """With every tensor changed."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device) -> Placement:
        """On the device, without waiting for it."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def without_labels(self, samples: torch.Tensor) -> Placement:
        """With nothing to learn from the text of these samples, bool (b,)."""
        kept = ~samples[self.predicting // max(1, self.labels.shape[1])]
        return replace(
            self,
            labels=self.labels.masked_fill(samples[:, None], IGNORE_INDEX),
            predicting=self.predicting[kept],
            predicted=self.predicted[kept],
        )


def place(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor | None,
    inserted: Inserted,
    max_length: int | None,
    padding_side: PaddingSide | None = None,
) -> Placement:
    """The placement of a text batch (B, L), on the host, after insertion and cut to `max_length`.

    Args:
        attention_mask: 1 for text and 0 for padding, which may be on either side of a row, or on both.
        labels: long (B, L), or None for none.
        padding_side: of the result; by default that of the text: the left if any row has padding ahead of it.

    Raises:
        SampleError: more than one `<image>` in a sample, or padding within text.
    """
    ids = input_ids.cpu().numpy()
    given = np.full_like(ids, IGNORE_INDEX) if labels is None else labels.cpu().numpy()
    texts = [np.flatnonzero(row) for row in attention_mask.cpu().numpy()]
    layouts = [_layout(row, ids[row, text], text, inserted, max_length) for row, text in enumerate(texts)]
    if padding_side is None:
        padding_side = "left" if any(len(text) and text[0] > 0 for text in texts) else "right"
    b, length = len(layouts), max((layout.length for layout in layouts), default=0)
    parts, all_labels = np.full((b, length), PADDING, np.int8), np.full((b, length), IGNORE_INDEX)
    task_starts = np.zeros((b, inserted.num_tasks), np.int64)
    text_tokens, text_places, image_places, task_places, positions = [], [], [], [], []
    for row, (layout, text) in enumerate(zip(layouts, texts, strict=True)):
        start = 0 if padding_side == "right" else length - layout.length
        offsets = np.arange(len(text))
        if layout.image is not None:
            offsets[layout.image.start] = layout.length  # `<image>` itself is dropped, as is what is cut off
            offsets[layout.image.start + 1 :] += inserted.added
            behind = layout.tasks[-1].stop if layout.tasks else layout.image.stop
            for places, of in (
                (image_places, np.arange(layout.image.start, layout.image.stop)),
                (task_places, np.arange(layout.image.stop, behind)),
            ):
                places.append(np.where(of < layout.length, row * length + start + of, b * length))
            if layout.complete:
                task_starts[row] = [start + tokens.start for tokens in layout.tasks]
        kept = offsets < layout.length
        text_tokens.append(row * ids.shape[1] + text[kept])
        text_places.append(row * length + start + offsets[kept])
        all_labels[row, start + offsets[kept]] = given[row, text[kept]]
        positions.append(np.arange(layout.length))
        _mark(parts[row, start : start + layout.length], layout)
    is_token = parts != PADDING
    predicting = np.flatnonzero(np.pad((all_labels[:, 1:] != IGNORE_INDEX) & is_token[:, :-1], ((0, 0), (0, 1))))
    return Placement(
        layouts=layouts,
        padding_side=padding_side,
        attention_mask=torch.from_numpy(is_token.astype(np.int64)),
        labels=torch.from_numpy(all_labels),
        parts=torch.from_numpy(parts),
        text_tokens=_joined(text_tokens),
        places=_joined([*text_places, *image_places, *task_places]),
        image_rows=torch.tensor([row for row, x in enumerate(layouts) if x.image is not None], dtype=torch.long),
        task_starts=torch.from_numpy(task_starts),
        complete=torch.tensor([layout.complete for layout in layouts], dtype=torch.bool),
        tokens=torch.from_numpy(np.flatnonzero(is_token)),
        positions=_joined(positions),
        predicting=torch.from_numpy(predicting),
        predicted=torch.from_numpy(all_labels.reshape(-1)[predicting + 1]),
    )


def _layout(row: int, ids: np.ndarray, text: np.ndarray, inserted: Inserted, max_length: int | None) -> SampleLayout:
    """The layout of a row's token ids without padding, and their columns."""
    if len(text) and text[-1] - text[0] >= len(text):
        raise SampleError("attention_mask has a 0 with text on either side of it; pad at the ends of the text alone")
    (images,) = np.nonzero(ids == inserted.image_token_id)
    if len(images) > 1:
        raise SampleError(f"row {row} has {len(images)} image tokens; one is the most")
    longest = len(text) + inserted.added if max_length is None else max_length
    if not len(images):
        return SampleLayout(min(len(text), longest))
    image = slice(int(images[0]), int(images[0]) + inserted.num_image_tokens)
    bounds = [image.stop + k * inserted.num_task_tokens for k in range(inserted.num_tasks + 1)]
    tasks = tuple(slice(*pair) for pair in pairwise(bounds))
    return SampleLayout(min(len(text) + inserted.added, longest), image, tasks)


def _mark(parts: np.ndarray, layout: SampleLayout) -> None:
    """Writes what a sample's positions hold."""
    if layout.image is None:
        parts[:] = IMAGE
        return
    parts[:] = AFTER
    parts[: layout.image.start] = BEFORE
    parts[layout.image] = IMAGE
    for index, tokens in enumerate(layout.tasks):
        parts[tokens] = FIRST_TASK + index


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))
