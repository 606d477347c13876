"""The order in which samples are trained on, by what is known of each ahead of time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from olavlm.cache import Dataset
from olavlm.student.config import Recipe

from .sampler import GlobalBatchSampler
from .targets import CachedTargets, TargetSource


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
