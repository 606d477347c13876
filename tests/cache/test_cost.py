"""Opening a store, its coverage and its to-do list ask the file system for what grows with the shards, no faster."""

import io
import os
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

    def listed(*args):
        found = listdir(*args)
        counts["names"] += len(found)
        return found

    class Scanned:
        def __init__(self, *args):
            self.entries = scandir(*args)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                counts["names"] += 1
                yield entry

    listdir, scandir = os.listdir, os.scandir
    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.setattr(os, "scandir", Scanned)
    monkeypatch.setattr(io, "open", counted("open", io.open))  # which pathlib calls
    for name in ("stat", "open", "link", "unlink", "rename", "replace", "mkdir", "utime", "pread", "preadv"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))

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

    def cover(store):
        assert FeatureStore(store.path)["depth"].coverage().complete

    without = operations(lambda: cover(stores[1]))
    stores[1].builder.index()
    with_index = operations(lambda: cover(stores[1]))
    (stores[1].path / "depth" / "index").unlink()
    assert with_index < 2.1 * SIZES[1]  # the names of the records, and the size of each shard file
    assert without > 4 * SIZES[1]  # the control


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
    assert 5 < few == many < 30


@pytest.mark.parametrize(
    ("dtype", "compress", "reads"), [("float16", "zstd", 1), ("int8", "none", 2), ("int8", "zstd", 2)]
)
def test_a_row_is_read_once(small, monkeypatch, dtype, compress, reads):
    """One read an array, however many arrays and whether its rows are compressed."""
    store = small(dtype=dtype, compress=compress).fill()
    depth, made = store.group, []
    depth.read(range(10))  # which checks the index
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda *args: made.append(args) or pread(*args))
    monkeypatch.setattr(os, "preadv", lambda *args: made.append(args) or preadv(*args))
    depth.read([0, 5, 9])
    assert len(made) == 3 * reads
