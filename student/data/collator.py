"""Dataset indices to a micro-batch: prompts tokenised, images decoded, targets read; in a loader process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from olavlm.cache import BadImage, CacheError, Dataset, ImageRoots, Sample
from olavlm.student.config import Recipe
from olavlm.student.decoder import learned_positions
from olavlm.student.errors import StudentError, TrainingError
from olavlm.student.model import OlaVLM
from olavlm.student.placement import Inserted, place
from olavlm.student.text.conversation import IGNORE_INDEX, IMAGE_TOKEN, encode
from olavlm.student.vision.image_transform import ImageTransform

from .encoder_features import EncoderFeatures
from .load_times import clocked
from .micro_batch import MicroBatch
from .samples import prompt_turns
from .shared_tensors import allocate
from .targets import OnlineTargets, TargetSource


def least_length(tokenizer: PreTrainedTokenizerBase, template: str, inserted: Inserted) -> int:
    """Tokens that a short question about an image takes, up to the first of its answer: a sequence that is cut before
    learns nothing."""
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\nWhat?"}, {"from": "gpt", "value": "This."}]
    labels = encode(tokenizer, turns, template)["labels"]
    return next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1 + inserted.added


def longest_sequence(recipe: Recipe, model: OlaVLM) -> int:
    """Where samples are cut: at `model.max_length`, or where the LLM has no embeddings of positions any more."""
    positions = learned_positions(model.llm)
    return recipe.model.max_length if positions is None else min(recipe.model.max_length, positions)


@dataclass
class Collator:
    """Makes a micro-batch of dataset indices."""

    dataset: Dataset
    roots: ImageRoots
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    template: str
    inserted: Inserted
    max_length: int
    source: TargetSource | None
    features: EncoderFeatures | None = None  # read in place of the images

    def __call__(self, indices: list[int]) -> MicroBatch | StudentError | CacheError:
        """The micro-batch; or the error, to be raised by the training process: the loader would bury it in its own."""
        try:
            return self.collate(indices)
        except (StudentError, CacheError) as e:
            return e
        except OSError as e:
            what = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e
            return TrainingError(f"a loader could not read {what}; make it readable, then run the same command again")

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: OlaVLM,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        roots: ImageRoots,
        source: TargetSource | None,
        features: EncoderFeatures | None = None,
    ) -> Collator:
        """For a recipe's samples and the model that is to see them."""
        return cls(
            dataset=dataset,
            roots=roots,
            tokenizer=tokenizer,
            transform=model.config.image_transform,
            template=recipe.model.template,
            inserted=model.inserted,
            max_length=longest_sequence(recipe, model),
            source=source,
            features=features,
        )

    @property
    def reads_images(self) -> bool:
        """For the base encoder, or for teachers in the loop."""
        return self.features is None or isinstance(self.source, OnlineTargets)

    def collate(self, indices: list[int]) -> MicroBatch:
        """The micro-batch of these samples; raises StudentError, CacheError and OSError."""
        samples = [self.dataset[int(i)] for i in indices]
        images, times = [s.image for s in samples], {}
        with clocked(times, "text"):
            text = self._text(samples)
            placement = place(**text, inserted=self.inserted, max_length=self.max_length, padding_side="right")
        room = allocate({**text, "placement": placement.tensors(), **self._shapes(images)})
        if self.features is None:
            with clocked(times, "images"):
                bad = self._read_pixels(images, room["pixel_values"])
        else:
            with clocked(times, "encoder_features"):
                _, bad = self.features.load(images, room.get("encoder_features"))
        if self.source is not None:
            with clocked(times, "targets"):
                bad |= self.source.load(images, room["targets"])[1]
        room["complete"].copy_(torch.tensor([image is not None for image in images]) & placement.complete)
        micro = MicroBatch(
            **{"pixel_values": None, **room, "placement": replace(placement, **room["placement"])},
            ids=[s.id for s in samples],
            images=images,
            bad_images=list(bad.values()),
            load_times=times,
        )
        # To learn to describe an image that is not there would be to learn to invent one.
        return micro.masked(torch.tensor([row in bad for row in range(len(images))])) if bad else micro

    def _text(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Token ids, mask and labels, padded on the right."""
        texts = [
            encode(self.tokenizer, prompt_turns(sample), self.template, self.max_length, sample.id)
            for sample in samples
        ]
        width = max(len(text["input_ids"]) for text in texts)
        ids = torch.full((len(texts), width), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
        for row, text in enumerate(texts):
            n = len(text["input_ids"])
            ids[row, :n] = torch.tensor(text["input_ids"])
            labels[row, :n] = torch.tensor(text["labels"])
            mask[row, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _shapes(self, images: list[str | None]) -> dict[str, Any]:
        """Shapes and dtypes of the tensors that are read from files, by their fields; and of `complete`."""
        num, size = len(images), self.transform.size
        shapes: dict[str, Any] = {"complete": ((num,), torch.bool)}
        if self.features is None:
            shapes["pixel_values"] = (num, 3, size, size), torch.float32
        elif any(image is not None for image in images):
            shapes["encoder_features"] = self.features.shapes(num)
        if self.source is not None:
            shapes["targets"] = self.source.shapes(num)
        return shapes

    def _read_pixels(self, images: list[str | None], pixels: torch.Tensor) -> dict[int, str]:
        """Fill float32 (b, 3, S, S), with zeros for None and for what cannot be read; by row why it could not."""
        bad = {}
        for row, image in enumerate(images):
            try:
                pixels[row] = 0 if image is None else torch.from_numpy(self.transform(self.roots.open(image)))
            except BadImage as e:
                pixels[row] = 0
                bad[row] = str(e)
        return bad
