"""Samples to micro-batches: prompts tokenised, images decoded, targets read, all in loader processes.

The loader is not handed to accelerate: which samples a rank sees is the sampler's decision alone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from olavlm.cache import BadImage, CacheError, Dataset, DatasetError, ImageRoots, Sample
from olavlm.student.assembly import count_supervised
from olavlm.student.config import Recipe
from olavlm.student.errors import SampleError, StudentError, TrainingError
from olavlm.student.model import OlaVLM
from olavlm.student.text.conversation import IGNORE_INDEX, IMAGE_TOKEN, check_turns, encode
from olavlm.student.vision.image_transform import ImageTransform

from .encoder_features import EncoderFeatures, Stored
from .sampler import GlobalBatchSampler
from .targets import CachedTargets, Loaded, TargetSource


@dataclass
class MicroBatch:
    """What a loader process hands over; tensors on the host, targets still as the source loaded them."""

    input_ids: torch.Tensor  # long (b, L)
    labels: torch.Tensor  # long (b, L)
    attention_mask: torch.Tensor  # long (b, L)
    pixel_values: torch.Tensor | None  # float32 (b, 3, S, S), zeros without an image
    supervised: torch.Tensor  # long (b,): tokens of each sample that the text loss counts
    complete: torch.Tensor  # bool (b,): has an image, and its tokens fit into the sequence
    ids: list[str]
    images: list[str | None]
    bad_images: list[str]  # images that could not be read, or lack features to be fused; their samples train nothing
    targets: Loaded = field(default_factory=dict)
    encoder_features: Stored | None = None  # in place of `pixel_values`, unless no sample has an image

    @property
    def supervised_tokens(self) -> int:
        """Tokens that the text loss counts."""
        return int(self.supervised.sum())

    def without(self, samples: torch.Tensor) -> MicroBatch:
        """With these samples, bool (b,), training nothing. Those that did count as bad images from now on."""
        trained = samples & (self.labels != IGNORE_INDEX).any(dim=1)
        named = [f"{self.images[row]}: no features" for row in trained.nonzero().flatten().tolist()]
        return replace(
            self,
            labels=self.labels.masked_fill(samples[:, None], IGNORE_INDEX),
            supervised=self.supervised.masked_fill(samples, 0),
            complete=self.complete & ~samples,
            bad_images=[*self.bad_images, *named],
        )

    def pin_memory(self) -> MicroBatch:
        """With its tensors in pinned memory, which the loader asks for by this name. Targets are the source's own."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        if self.encoder_features is not None:
            pinned["encoder_features"] = {name: part.pin_memory() for name, part in self.encoder_features.items()}
        return replace(self, **pinned)


@dataclass
class Collator:
    """Makes a micro-batch of dataset indices."""

    dataset: Dataset
    roots: ImageRoots
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    template: str
    image_token_id: int
    num_inserted_tokens: int  # by an image, beside its `<image>`
    max_length: int
    source: TargetSource | None
    features: EncoderFeatures | None = None  # read in place of the images

    def __call__(self, indices: list[int]) -> MicroBatch | StudentError | CacheError:
        """The micro-batch; or the error, to be raised by the training process: the loader would bury it in its own."""
        try:
            return self.collate(indices)
        except (StudentError, CacheError) as e:
            return e

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
            image_token_id=model.config.image_token_id,
            num_inserted_tokens=model.num_inserted_tokens,
            max_length=recipe.model.max_length,
            source=source,
            features=features,
        )

    def collate(self, indices: list[int]) -> MicroBatch:
        """The micro-batch of these samples; raises StudentError and CacheError."""
        samples = [self.dataset[int(i)] for i in indices]
        images = [s.image for s in samples]
        pixels, features = None, None
        if self.features is None:
            pixels, bad = self._pixels(images)
        else:
            features, bad = self.features.load(images)
        texts = []
        for row, sample in enumerate(samples):
            text = encode(self.tokenizer, prompt_turns(sample), self.template, self.max_length, sample.id)
            if row in bad:  # learning to describe an image that is not there would teach to invent one
                text["labels"] = [IGNORE_INDEX] * len(text["labels"])
            texts.append(text)
        width = max(len(t["input_ids"]) for t in texts)
        ids = torch.full((len(texts), width), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
        for row, text in enumerate(texts):
            n = len(text["input_ids"])
            ids[row, :n] = torch.tensor(text["input_ids"])
            labels[row, :n] = torch.tensor(text["labels"])
            mask[row, :n] = 1
        return MicroBatch(
            input_ids=ids,
            labels=labels,
            attention_mask=mask,
            pixel_values=pixels,
            supervised=torch.tensor(
                [
                    count_supervised(
                        t["input_ids"], t["labels"], self.image_token_id, self.num_inserted_tokens, self.max_length
                    )
                    for t in texts
                ]
            ),
            complete=torch.tensor(
                [
                    image is not None and row not in bad and self._fits(text["input_ids"])
                    for row, (image, text) in enumerate(zip(images, texts, strict=True))
                ]
            ),
            ids=[s.id for s in samples],
            images=images,
            bad_images=list(bad.values()),
            targets=self.source.load(images) if self.source is not None else {},
            encoder_features=features,
        )

    def _pixels(self, images: list[str | None]) -> tuple[torch.Tensor, dict[int, str]]:
        """float32 (b, 3, S, S), zeros for None and for what cannot be read; and by row why it could not."""
        pixels, bad = torch.zeros(len(images), 3, self.transform.size, self.transform.size), {}
        for row, image in enumerate(images):
            if image is not None:
                try:
                    pixels[row] = torch.from_numpy(self.transform(self.roots.open(image)))
                except BadImage as e:
                    bad[row] = str(e)
        return pixels, bad

    def _fits(self, input_ids: list[int]) -> bool:
        """Whether image and task tokens lie within the longest sequence."""
        if self.image_token_id not in input_ids:
            return False
        return input_ids.index(self.image_token_id) + 1 + self.num_inserted_tokens <= self.max_length


def prompt_turns(sample: Sample) -> list[dict[str, str]]:
    """A sample's turns, of which one has `<image>` if and only if there is an image.

    In a sample without one, `<image>` is text about HTML or the like, and loses its meaning. SampleError for an image
    whose place the text does not name.
    """
    if sample.image is None:
        return [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, "< image>")} for turn in sample.conversations]
    if not any(IMAGE_TOKEN in turn["value"] for turn in sample.conversations if turn["from"] == "human"):
        raise SampleError(f"sample {sample.id}: it has an image, {sample.image}, and no {IMAGE_TOKEN} in a human turn")
    return sample.conversations


def check_samples(dataset: Dataset, template: str) -> None:
    """SampleError for the first sample whose turns do not make a prompt: at the start of a run, not hours into it."""
    for sample in dataset:
        check_turns(prompt_turns(sample), template, sample.id)


def check_images(dataset: Dataset, roots: ImageRoots, tries: int = 16) -> None:
    """DatasetError if none of some images, spread over the dataset, can be read: a wrong root, not bad images."""
    images = dataset.images()
    failures = []
    for i in np.linspace(0, len(images) - 1, min(tries, len(images))).round().astype(int):
        try:
            roots.open(images[int(i)].as_py())
            return
        except BadImage as e:
            failures.append(e)
    if failures:
        raise DatasetError(
            f"none of {len(failures)} images tried can be read, the first: {failures[0]}; check data.images"
        )


class _Indices(torch.utils.data.Dataset):
    """Hands indices through, so that the collator makes a micro-batch as a whole."""

    def __getitem__(self, index: int) -> int:
        return index


def batches(
    collator: Collator,
    sampler: GlobalBatchSampler,
    steps: range,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[list[MicroBatch]]:
    """For each step its micro-batches on this rank, loaded ahead by `workers` processes."""
    order = [part.tolist() for step in steps for part in sampler.slices(step, rank, world_size, accumulation)]
    options: dict[str, Any] = {"prefetch_factor": max(2, accumulation)} if workers else {}
    loader = iter(
        DataLoader(
            _Indices(),
            batch_sampler=order,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_trainer,
            **options,
        )
    )
    for _ in steps:
        try:
            loaded = [next(loader) for _ in range(accumulation)]
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise TrainingError(
                f"a loader process died, perhaps for lack of memory ({str(e).splitlines()[0]}); run the same command "
                "again, or with fewer data.workers"
            ) from None
        for part in loaded:
            if isinstance(part, Exception):
                raise part
        yield loaded


_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C, or a scheduler, signals the whole process group: loaders go on until the trainer has saved and leaves.

    Of a trainer that is killed they would wait for ever to be rid of what they have loaded, so they die with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # A trainer that was dead already will not die again. Under a fork server, that server is the parent.
        if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def make_sampler(
    recipe: Recipe, dataset: Dataset, source: TargetSource | None, global_batch: int
) -> GlobalBatchSampler:
    """The order in which a recipe's samples are trained on."""
    d = recipe.data
    return GlobalBatchSampler(
        has_image=np.asarray(dataset.has_image()),
        global_batch_size=global_batch,
        seed=recipe.train.seed,
        group_by_modality=d.group_by_modality,
        rows=neighbour_rows(dataset, source) if d.shuffle_block is not None else None,
        block=d.shuffle_block,
        lengths=word_counts(dataset) if d.group_by_modality else None,
    )


def word_counts(dataset: Dataset) -> np.ndarray:
    """Words of each sample over its turns, int64: its length, as the public code's grouping has it."""
    turns = dataset.table.column("conversations").combine_chunks()
    words = np.asarray(pc.count_substring_regex(pc.struct_field(pc.list_flatten(turns), "value"), r"\S+"), np.int64)
    ends = np.cumsum(np.asarray(pc.list_value_length(turns)))
    totals = np.concatenate([[0], np.cumsum(words)])[ends]
    return np.diff(totals, prepend=0)


def neighbour_rows(dataset: Dataset, source: TargetSource | None) -> np.ndarray:
    """For each sample the row that its image has in the store that is read from, int64; -1 without an image.

    Where no store is read, the place of the image among those of the dataset.
    """
    images = dataset.table.column("image")
    rows = np.full(len(dataset), -1, np.int64)
    place = source.store.rows.rows_of if isinstance(source, CachedTargets) else _places_in(dataset.images())
    rows[np.asarray(images.is_valid())] = place(images.drop_null())
    return rows


def _places_in(distinct: pa.Array) -> Callable[[pa.ChunkedArray], np.ndarray]:
    return lambda images: np.asarray(pc.index_in(images, distinct), np.int64)


def choose_samples(num_samples: int, fraction: float, seed: int) -> np.ndarray:
    """Indices of a random part of a dataset, ascending, int64; the same for the same seed."""
    if fraction == 1.0:
        return np.arange(num_samples)
    generator = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
    return np.sort(generator.permutation(num_samples)[: max(1, round(num_samples * fraction))])
