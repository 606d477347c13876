"""Opening a store, its coverage and its to-do list ask the file system for what grows with the shards, no faster."""

import os
import pathlib
from collections import Counter

import pytest

from olavlm.cache import FeatureStore, pending


@pytest.fixture
def operations(monkeypatch):
    """operations(work) -> how often `work` asked the file system, and how many names it was told."""
    counts = Counter()

    def counted(name: str, real):
        def call(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        return call

    def names(real):
        def call(*args, **kwargs):
            for name in real(*args, **kwargs):
                counts["names"] += 1
                yield name

        return call

    for name in ("stat", "open", "exists", "is_file", "read_bytes", "rename", "unlink"):
        monkeypatch.setattr(pathlib.Path, name, counted(name, getattr(pathlib.Path, name)))
    for name in ("iterdir", "glob"):
        monkeypatch.setattr(pathlib.Path, name, names(getattr(pathlib.Path, name)))
    monkeypatch.setattr(os, "open", counted("os.open", os.open))

    def measure(work) -> int:
        counts.clear()
        work()
        print(dict(counts))
        return counts.total()

    return measure


SIZES = (150, 1200)


@pytest.fixture(scope="module")
def stores(small_store, tmp_path_factory):
    """Shards of one row each."""
    folder = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda fd: None)
        return [small_store(folder / str(rows), rows, shape=(1, 1), shard_rows=1).fill() for rows in SIZES]


def test_reading_costs_what_the_shards_are(stores, operations):
    def open_and_cover(store):
        depth = FeatureStore(store.path)["depth"]
        assert depth.coverage().complete
        assert pending(depth) == []
        assert pending(depth, retry_failed=True) == []
        depth.failures()

    few, many = (operations(lambda s=s: open_and_cover(s)) for s in stores)
    assert few > SIZES[0]  # the counter counts
    assert many / few < 1.1 * SIZES[1] / SIZES[0]
    assert many < 20 * SIZES[1]


def test_committing_a_shard_costs_the_same_in_a_large_store(stores, operations):
    """A row more is wanted of each: the last shard is retried among 149 and among 1,199 others."""
    costs = []
    for store in stores:
        last = len(store.features) - 1
        store.record_file(last).unlink()
        task, writer = store.task(last), store.writer()

        def commit(store=store, task=task, writer=writer):
            with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
                store.append(shard, task)
                shard.commit()

        costs.append(operations(commit))
    assert costs[0] == costs[1]


def test_one_row_costs_the_same_in_a_large_store(stores, operations):
    few, many = (operations(lambda s=s: FeatureStore(s.path)["depth"][7]) for s in stores)
    assert few == many
