"""What a loader process hands to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from olavlm.student.placement import Placement
from olavlm.student.text.conversation import IGNORE_INDEX

from .encoder_features import Stored
from .load_times import LoadTimes
from .shared_tensors import pack, unpack
from .targets import Loaded


@dataclass
class MicroBatch:
    """What a loader process hands over: tensors on the host, all in one buffer, targets as the source loaded them."""

    input_ids: torch.Tensor  # long (b, L)
    labels: torch.Tensor  # long (b, L)
    attention_mask: torch.Tensor  # long (b, L)
    pixel_values: torch.Tensor | None  # float32 (b, 3, S, S), zeros without an image
    placement: Placement  # where the model puts the pieces of each sample
    complete: torch.Tensor  # bool (b,): has an image, and its tokens fit into the sequence
    ids: list[str]
    images: list[str | None]
    bad_images: list[str]  # images that could not be read, or lack features to be fused; their samples train nothing
    targets: Loaded = field(default_factory=dict)
    encoder_features: Stored | None = None  # in place of `pixel_values`, unless no sample has an image
    load_times: LoadTimes = field(default_factory=dict)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that the text loss counts."""
        return len(self.placement.predicted)

    def without(self, samples: torch.Tensor) -> MicroBatch:
        """With these samples, bool (b,), training nothing. Those that did count as bad images from now on."""
        trained = samples & (self.labels != IGNORE_INDEX).any(dim=1)
        named = [f"{self.images[row]}: no features" for row in trained.nonzero().flatten().tolist()]
        return replace(self.masked(samples), bad_images=[*self.bad_images, *named])

    def masked(self, samples: torch.Tensor) -> MicroBatch:
        """With nothing to learn from these samples, bool (b,)."""
        return replace(
            self,
            labels=self.labels.masked_fill(samples[:, None], IGNORE_INDEX),
            placement=self.placement.without_labels(samples),
            complete=self.complete & ~samples,
        )

    def pin_memory(self) -> MicroBatch:
        """With its tensors in pinned memory, which the loader asks for by this name."""
        buffer, content = pack(self._content())
        return _unpacked(buffer.pin_memory(), content)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, pack(self._content())

    def _content(self) -> dict[str, Any]:
        return {**vars(self), "placement": vars(self.placement)}


def _unpacked(buffer: torch.Tensor, content: dict[str, Any]) -> MicroBatch:
    content = unpack(buffer, content)
    return MicroBatch(**{**content, "placement": Placement(**content["placement"])})
