"""The order of samples: a function of seed, epoch, step and global batch size alone."""

import numpy as np
import pytest

from olavlm.student.sampler import GlobalBatchSampler


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
