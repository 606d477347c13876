"""Samples to micro-batches: prompts tokenised, images decoded, targets read, all in loader processes.

The loader is not handed to accelerate: which samples a rank sees is the sampler's decision alone.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from olavlm.cache import BadImage, CacheError, Dataset, DatasetError, ImageRoots, Sample
from olavlm.student.config import Recipe
from olavlm.student.errors import SampleError, StudentError, TrainingError
from olavlm.student.model import OlaVLM
from olavlm.student.placement import Inserted, Placement, place
from olavlm.student.text.conversation import IGNORE_INDEX, IMAGE_TOKEN, check_turns, encode
from olavlm.student.vision.image_transform import ImageTransform

from .encoder_features import EncoderFeatures, Stored
from .load_times import LoadTimes, clocked
from .sampler import GlobalBatchSampler
from .shared_tensors import allocate, pack, shared_memory_remedy, unpack
from .targets import CachedTargets, Loaded, OnlineTargets, TargetSource


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


def least_length(tokenizer: PreTrainedTokenizerBase, template: str, inserted: Inserted) -> int:
    """Tokens that a short question about an image takes, up to the first of its answer: a sequence that is cut before
    learns nothing."""
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\nWhat?"}, {"from": "gpt", "value": "This."}]
    labels = encode(tokenizer, turns, template)["labels"]
    return next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1 + inserted.added


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
            max_length=recipe.model.max_length,
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


@contextmanager
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
) -> Iterator[Iterator[list[MicroBatch]]]:
    """Within, for each step its micro-batches on this rank, loaded ahead by `workers` processes, which end with it.

    Bad images are masked and stop nothing. But where none of a step's can be read on this rank, and none of those
    either that `check_images` tried at the start of the run, the roots are gone, and the step is not done.

    Raises:
        StudentError, CacheError: what a loader could not load.
        TrainingError: within, a loader died, whatever the trainer was doing then; or the image roots are gone.
    """
    order = [part.tolist() for step in steps for part in sampler.slices(step, rank, world_size, accumulation)]
    options: dict[str, Any] = {}
    if workers:
        options["prefetch_factor"] = max(2, accumulation)
        atexit.unregister(_kill_loaders)  # once is enough
        atexit.register(_kill_loaders)
    try:
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
        try:
            yield (_checked([next(loader) for _ in range(accumulation)], collator) for _ in steps)
        finally:
            if workers:
                loader._shutdown_workers()
                for process in loader._workers:  # one that waits for a disk is still there
                    process.kill()
    except RuntimeError as e:  # of the library's handler of SIGCHLD, wherever the main thread was
        if not str(e).startswith("DataLoader worker (pid"):
            raise
        raise TrainingError(
            f"a loader process died ({str(e).splitlines()[0]}), perhaps for lack of memory: "
            f"{shared_memory_remedy()}; then run the same command again"
        ) from None


def _checked(loaded: list[Any], collator: Collator) -> list[MicroBatch]:
    for part in loaded:
        if isinstance(part, Exception):
            raise part
    wanted = sum(image is not None for part in loaded for image in part.images)
    if 0 < wanted == sum(len(part.bad_images) for part in loaded) and collator.reads_images:
        try:
            check_images(collator.dataset, collator.roots)
        except DatasetError as e:
            raise TrainingError(f"the images are gone: {e}; then run the same command again") from None
    return loaded


def _kill_loaders() -> None:
    """At exit, before multiprocessing sends its daemons SIGTERM, which loaders ignore, and waits for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the library's handler would raise an error for each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


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
    recipe: Recipe,
    dataset: Dataset,
    source: TargetSource | None,
    global_batch: int,
    *,
    image_tokens: int,
    packed: bool = False,
) -> GlobalBatchSampler:
    """The order in which a recipe's samples are trained on.

    Args:
        image_tokens: those that an image adds to its text.
        packed: whether the LLM runs without padding.
    """
    d = recipe.data
    has_image = np.asarray(dataset.has_image())
    return GlobalBatchSampler(
        has_image=has_image,
        global_batch_size=global_batch,
        seed=recipe.train.seed,
        group_by_modality=d.group_by_modality,
        rows=neighbour_rows(dataset, source) if d.shuffle_block is not None else None,
        block=d.shuffle_block,
        lengths=estimated_tokens(dataset) + image_tokens * has_image,
        packed=packed,
    )


def estimated_tokens(dataset: Dataset) -> np.ndarray:
    """A guess at the tokens of each sample's text, int64: a quarter of its bytes in UTF-8.

    English has some 4.3 bytes a token in Llama-3's vocabulary, Chinese some 4. To count them would take minutes.
    """
    turns = dataset.table.column("conversations").combine_chunks()
    texts = pc.struct_field(pc.list_flatten(turns), "value")
    ends = np.cumsum(np.asarray(pc.list_value_length(turns)))
    totals = np.concatenate([[0], np.cumsum(np.asarray(pc.binary_length(texts), np.int64))])[ends]
    return np.diff(totals, prepend=0) // 4


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
