"""Many threads and processes read one store, while others write it."""

import errno
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from olavlm.cache import FeatureStore, MissingFeatures, ShardTask, TeacherFeatures


def test_many_shards_few_descriptors(small, monkeypatch):
    monkeypatch.setattr("olavlm.cache.row_reader._OPEN_FILES", 4)
    store = small(rows=60, shard_rows=2).fill()
    depth = store.group
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    values, _ = depth.read(list(range(60)) * 2)
    np.testing.assert_array_equal(values, np.concatenate([store.features] * 2))
    assert len(os.listdir("/proc/self/fd")) - before <= 4  # noqa: PTH208
    del depth
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_too_many_open_files_is_not_damage(store, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    depth = store.group
    monkeypatch.setattr("olavlm.cache.row_reader._OpenFile", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        depth[0]


def read_all(group: TeacherFeatures, rows: np.ndarray) -> bytes:
    return group.read(rows)[0].tobytes()


def test_threads_read_one_teacher(small, rng, monkeypatch):
    """Few descriptors, so that threads push each other's out; and one forgets everything again and again."""
    monkeypatch.setattr("olavlm.cache.row_reader._OPEN_FILES", 2)
    store = small(rows=60, shard_rows=4).fill()
    for _ in range(3):
        depth, stop = store.group, threading.Event()
        batches = [rng.integers(0, 60, 30) for _ in range(64)]

        def forget(depth=depth, stop=stop):
            while not stop.is_set():
                depth.reload()

        watcher = threading.Thread(target=forget)
        watcher.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                for rows, values in zip(batches, pool.map(depth.read, batches), strict=True):
                    np.testing.assert_array_equal(values[0], store.features[rows])
        finally:
            stop.set()
            watcher.join()


def test_forked_processes_read_what_their_parent_opened(small, start, rng):
    store = small(rows=60).fill()
    depth = store.group
    depth.read([0, 30, 59])
    batches = [rng.integers(0, 60, 500) for _ in range(3)]

    def work(child, rows):
        child.hear()
        np.testing.assert_array_equal(depth.read(rows)[0], store.features[rows])

    children = [start(lambda child, rows=rows: work(child, rows)) for rows in batches]
    for child in children:
        child.tell("go")
    np.testing.assert_array_equal(depth.read(batches[0])[0], store.features[batches[0]])
    assert [child.wait() for child in children] == [0, 0, 0]


def test_a_teacher_is_sent_to_other_processes(small):
    store = small(rows=20).fill()
    depth = store.group
    depth.read([0, 7])
    again = pickle.loads(pickle.dumps(depth))
    np.testing.assert_array_equal(again.read([19, 0])[0], store.features[[19, 0]])
    pickle.loads(pickle.dumps(FeatureStore(store.path)))["depth"][3]
    rows = np.arange(20)[::-1]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for values in pool.starmap(TeacherFeatures.read, [(depth, rows)] * 4):
            np.testing.assert_array_equal(values[0], store.features[rows])


def test_what_is_committed_meanwhile_is_seen(small):
    store = small()
    depth = store.group
    assert depth.coverage().covered == 0
    store.fill(limit=4)
    np.testing.assert_array_equal(depth[3], store.features[3])  # an absent shard is looked for again
    store.fill(limit=6)
    with pytest.raises(MissingFeatures):
        FeatureStore(store.path)["depth"][6]
    store.fill()
    depth.reload()
    np.testing.assert_array_equal(depth.read(range(10))[0], store.features)
    assert depth.coverage().complete


def test_a_shard_that_grows_or_is_replaced_under_a_reader(small, storage):
    """The rows' places in the file change. The reader sees the old shard or the new one, never damage."""
    store = small(rows=4, **storage).fill({0: "missing"}, limit=2)
    expected = store.expected
    holding, looking = store.group, store.group
    for reader in (holding, looking):
        np.testing.assert_array_equal(reader[1], expected[1])
    store.fill()
    store.fill(retry_failed=True)
    np.testing.assert_array_equal(holding[1], expected[1])  # from the file it has open
    looking._reader._files.clear()  # another thread or 64 other shards pushed the file out
    np.testing.assert_array_equal(looking[1], expected[1])
    for reader in (holding, looking):
        reader.reload()
        np.testing.assert_array_equal(reader.read(range(4))[0], expected)


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_row_s_features_and_scales_are_of_one_record(small, compress):
    """The file of one array is pushed out and the shard replaced by other features: both are read again."""
    store = small(rows=4, dtype="int8", compress=compress).fill()
    for array in store.arrays:
        old, new = store.features, store.features * 3 + 1
        depth = store.group
        np.testing.assert_array_equal(depth[1], store.expected[1])
        store.writer().sweep(0, withdraw_all=True)
        store.features = new
        store.fill()
        depth._reader._files.pop((array, 0))
        np.testing.assert_array_equal(depth[1], store.expected[1])
        assert (store.codec.encode(old[1])[0][array] != store.codec.encode(new[1])[0][array]).any()  # the control


def test_a_reader_of_a_shard_that_is_replaced_again_and_again_sees_whole_versions(small, start):
    versions, rows = 30, range(4)
    store = small(rows=4, shape=(3, 64), dtype="int8").fill()
    features = store.features
    expected = []
    for version in range(versions):
        store.features = features * (version + 1) + version
        expected.append(store.expected)

    def work(child):
        for version in range(1, versions):
            store.features = features * (version + 1) + version
            task = ShardTask("depth", 0, 0, 4, store.builder.plan().segments[0].hash)
            store.commit(task)

    store.features, seen = features, set()
    child, held = start(work), store.group
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        for depth in (held, store.group):
            try:
                values = depth.read(rows)[0]
            except MissingFeatures:
                continue
            for row in rows:
                seen.add(next(v for v in range(versions) if (values[row] == expected[v][row]).all()))
        held._reader._files.clear()  # but not what it knows of the record
    assert child.wait() == 0
    print(f"{len(seen)} versions seen")
    np.testing.assert_array_equal(store.group.read(rows)[0], expected[-1])


def test_a_row_whose_shard_is_being_replaced_is_missing_for_that_moment(small):
    store = small(rows=4).fill({0: "missing"})
    depth, seen = store.group, []
    np.testing.assert_array_equal(depth[1], store.features[1])

    def look(step):
        if step == "place":
            depth._reader._files.clear()
            with pytest.raises(MissingFeatures):
                depth[1]
            seen.append(step)

    store.commit(store.task(0, retry_failed=True), on_step=look)
    assert seen == ["place"]
    np.testing.assert_array_equal(depth[1], store.features[1])


def test_readers_during_commits_see_right_values_or_nothing(small, start):
    store = small(rows=60, shard_rows=2)

    def work(child):
        for limit in (10, 30, 60):
            store.fill({r: "missing" for r in range(0, limit, 7)}, limit=limit)
        store.fill(retry_failed=True)

    child, depth, reads = start(work), store.group, 0
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None or not reads:
        for row in range(60):
            try:
                values, valid = depth.read([row])
            except MissingFeatures:
                continue
            reads += 1
            if valid[0]:
                np.testing.assert_array_equal(values[0], store.features[row])
        depth.coverage()
        depth.reload()
    assert child.wait() == 0
    np.testing.assert_array_equal(store.group.read(range(60))[0], store.features)
    print(f"{reads} rows read meanwhile")
