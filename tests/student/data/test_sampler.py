"""The order of samples: a function of seed, epoch, step and global batch size alone."""

import itertools
import json

import numpy as np
import pytest

from olavlm.cache import Dataset
from olavlm.student.data.order import estimated_tokens, make_sampler, neighbour_rows
from olavlm.student.data.sampler import GlobalBatchSampler
from olavlm.student.data.targets import CachedTargets


def sampler(has_image, size=4, seed=0, grouped=False):
    return GlobalBatchSampler(np.asarray(has_image, bool), size, seed, grouped)


def epoch(s, number=0):
    return np.concatenate([s.batch(number * len(s) + k) for k in range(len(s))])


def test_an_epoch_sees_every_sample_and_fills_the_last_batch_from_its_start():
    order = epoch(sampler([True] * 10))
    assert len(order) == 12
    assert sorted(order[:10]) == list(range(10))
    assert (order[10:] == order[:2]).all()


def test_epochs_and_seeds_differ_and_repeat():
    a = sampler([True] * 50)
    assert (epoch(a, 0) == epoch(sampler([True] * 50), 0)).all()
    assert (epoch(a, 0) != epoch(a, 1)).any()
    assert (epoch(a, 0) != epoch(sampler([True] * 50, seed=1), 0)).any()


def test_fewer_samples_than_a_batch():
    _, counts = np.unique(sampler([True] * 3, size=8).batch(5), return_counts=True)
    assert sorted(counts) == [2, 3, 3]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_only_slice_the_global_batch(world, accumulation):
    s = sampler([True] * 40, size=8)
    parts = [part for rank in range(world) for part in s.slices(3, rank, world, accumulation)]
    assert len(parts) == world * accumulation
    assert (np.concatenate(parts) == s.batch(3)).all()


def test_grouped_batches_are_of_one_modality_except_the_last():
    has_image = np.arange(50) % 5 != 0  # 40 with, 10 without
    s = sampler(has_image, size=8, grouped=True)
    kinds = [set(has_image[s.batch(k)]) for k in range(len(s))]
    assert all(len(kind) == 1 for kind in kinds[:-1])
    assert {True} in kinds[:-1]
    assert {False} in kinds[:-1]
    assert sorted(epoch(s)[:50]) == list(range(50))
    rest = epoch(s)[48:50]
    assert (rest == np.sort(rest)).all()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1), (8, 2)])
@pytest.mark.parametrize("image_tokens", [0, 576])
def test_packed_micro_batches_have_as_many_tokens_and_the_batch_stays(world, accumulation, image_tokens):
    """Lengths as broad as those of dialogues; dealt out in turn, longest first, the first would have 15 % too many."""
    lengths = image_tokens + np.random.default_rng(0).lognormal(5, 0.8, 2048).astype(int)
    s = GlobalBatchSampler(np.ones(2048, bool), 256, 0, lengths=lengths, packed=True)
    for step in range(8):
        parts = [part for rank in range(world) for part in s.slices(step, rank, world, accumulation)]
        assert sorted(np.concatenate(parts)) == sorted(sampler([True] * 2048, size=256).batch(step))
        assert {len(part) for part in parts} == {256 // (world * accumulation)}
        tokens = np.array([lengths[part].sum() for part in parts])
        assert tokens.max() <= 1.02 * tokens.mean()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1), (2, 4)])
def test_padded_micro_batches_are_of_like_lengths_and_the_batch_stays(world, accumulation):
    lengths = np.random.default_rng(0).permutation(40) + 1
    s = GlobalBatchSampler(np.ones(40, bool), 16, 0, lengths=lengths)
    parts = {(r, a): part for r in range(world) for a, part in enumerate(s.slices(3, r, world, accumulation))}
    assert sorted(np.concatenate(list(parts.values()))) == sorted(sampler([True] * 40, size=16).batch(3))
    longest = np.sort(lengths[s.batch(3)])[::-1]
    blocks = longest.reshape(world * accumulation, -1)
    found = sorted((sorted(lengths[part], reverse=True) for part in parts.values()), reverse=True)
    assert found == blocks.tolist(), "each micro-batch is a run of the sorted lengths"
    for a in range(accumulation):  # there, and back again
        order = range(world) if a % 2 == 0 else reversed(range(world))
        firsts = [lengths[parts[r, a]].max() for r in order]
        assert firsts == sorted(firsts, reverse=True)
        assert a == 0 or firsts[0] < min(lengths[parts[r, a - 1]].min() for r in range(world))


def test_estimated_length_is_the_bytes_of_all_turns(tmp_path):
    turns = [[("human", "one two "), ("gpt", "thrée fo")], [("human", ""), ("gpt", "x")], [("human", "a b c d ")]]
    records = [{"id": str(i), "conversations": [{"from": f, "value": v} for f, v in t]} for i, t in enumerate(turns)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    dataset = Dataset([tmp_path / "data.json"])
    assert estimated_tokens(dataset).tolist() == [17 // 4, 0, 2]
    assert estimated_tokens(dataset.take(np.array([2, 0]))).tolist() == [2, 4]


def test_a_recipes_samples_are_dealt_out_by_length_and_an_image_counts(recipe, ift_json):
    """Without grouping too: the two without an image, of 8, are together in the last micro-batch."""
    dataset = Dataset([ift_json])
    s = make_sampler(recipe(**{"data.file": ift_json}), dataset, None, 8, image_tokens=600)
    has_image = np.asarray(dataset.has_image())
    assert (s.lengths >= 600).tolist() == has_image.tolist()
    assert s.lengths[~has_image].tolist() == estimated_tokens(dataset)[~has_image].tolist()
    parts = s.slices(0, 0, 1, 4)
    assert [has_image[part].tolist() for part in parts] == [[True, True]] * 3 + [[False, False]]
    lengths = [s.lengths[part] for part in parts]
    assert all(now.min() >= later.max() for now, later in itertools.pairwise(lengths))
    assert (s.batch(0) == sampler(has_image, size=8).batch(0)).all(), "which samples are in it does not depend on it"


def blocks_of(order, rows, block):
    """Lengths of the stretches in which consecutive samples share a block."""
    ids = rows[order] // block
    return np.diff(np.flatnonzero(np.diff(ids, prepend=-2, append=-2)))


def test_block_shuffle_keeps_neighbouring_rows_together_and_shuffles_both():
    rows = np.random.default_rng(3).permutation(64)  # the dataset is in another order than the store
    s = GlobalBatchSampler(np.ones(64, bool), 16, 0, rows=rows, block=8)
    order = epoch(s)
    assert sorted(order) == list(range(64))
    assert (blocks_of(order, rows, 8) == 8).all()
    blocks = rows[order].reshape(8, 8)
    assert (blocks // 8 == blocks[:, :1] // 8).all()
    assert list(blocks[:, 0] // 8) != sorted(blocks[:, 0] // 8)  # blocks are shuffled
    assert all(list(block) != sorted(block) for block in blocks)  # and so is what is in them
    other = GlobalBatchSampler(np.ones(64, bool), 16, 1, rows=rows, block=8)
    assert (epoch(s, 1) != order).any()
    assert (epoch(other) != order).any()
    assert (epoch(GlobalBatchSampler(np.ones(64, bool), 16, 0, rows=rows, block=8)) == order).all()


def test_block_shuffle_spreads_samples_without_an_image_like_blocks_of_one():
    rows = np.where(np.arange(60) % 3 == 0, -1, np.arange(60))
    s = GlobalBatchSampler(rows >= 0, 12, 0, rows=rows, block=20)
    order = epoch(s)
    assert sorted(order) == list(range(60))
    text = np.flatnonzero(rows[order] < 0)
    assert len(text) == 20
    assert len(np.flatnonzero(np.diff(text) > 1)) >= 2  # not one block of 20
    with_image = order[rows[order] >= 0]
    assert len(blocks_of(with_image, rows, 20)) == 3


def test_block_shuffle_within_each_modality():
    has_image = np.arange(80) % 5 != 0
    rows = np.where(has_image, np.arange(80), -1)
    s = GlobalBatchSampler(has_image, 8, 0, True, rows, 16)
    kinds = [set(has_image[s.batch(k)]) for k in range(len(s))]
    assert all(len(kind) == 1 for kind in kinds)
    assert {True} in kinds
    assert {False} in kinds
    for k in range(len(s)):
        if has_image[s.batch(k)[0]]:
            assert len(set(rows[s.batch(k)] // 16)) <= 2  # a block has 12 or 13 images here, a batch 8
    assert sorted(epoch(s)) == list(range(80))


def test_block_of_one_row_is_an_ordinary_shuffle_of_images():
    """Several samples of an image stay together, as their one row does."""
    rows = np.repeat(np.arange(10), 3)
    order = epoch(GlobalBatchSampler(np.ones(30, bool), 5, 0, rows=rows, block=1))
    assert (blocks_of(order, rows, 1) == 3).all()
    assert sorted(order) == list(range(30))


def test_rows_are_the_stores_or_places_among_the_datasets_images(recipe, tmp_path, pt_json):
    samples = json.loads(pt_json.read_text())
    mixed = [samples[4], {**samples[0], "id": "text", "image": ""}, samples[1], {**samples[4], "id": "again"}]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    dataset = Dataset([tmp_path / "mixed.json"])
    assert neighbour_rows(dataset, None).tolist() == [0, -1, 1, 0]
    assert neighbour_rows(dataset, CachedTargets(recipe())).tolist() == [4, -1, 1, 4]  # the store is in pt_json's order


def test_fewer_samples_of_a_kind_than_blocks_can_be_made_of():
    s = GlobalBatchSampler(np.ones(3, bool), 2, 0, True, np.arange(3), 8)  # no text-only sample at all
    assert sorted(epoch(s)[:3]) == [0, 1, 2]
