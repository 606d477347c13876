"""FeatureStore, the contract of DESIGN's "Python": every value is right, absent with a reason, or an error."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import (
    BadImage,
    CacheError,
    CorruptFeatures,
    FeatureStore,
    MissingFeatures,
    PlanError,
    ShardTask,
    StoreError,
    TeacherFeatures,
    pending,
)

BAD = {1: "truncated", 6: "missing"}
STORAGE = [("float16", "none"), ("float32", "zstd"), ("int8", "none"), ("int8", "zstd"), ("int4", "none")]


@pytest.fixture
def store(small):
    """Ten rows in three shards, two of them quarantined."""
    return small(dtype="float16").fill(BAD)


def test_what_a_store_says_of_itself(store):
    opened = FeatureStore(str(store.path))
    assert opened.teachers == list(opened) == ["depth"]
    assert opened.plan.to_pydict() == {"row": list(range(10)), "image": [f"photos/{i:05d}.jpg" for i in range(10)]}
    assert isinstance(opened.plan, pa.Table)
    depth = opened["depth"]
    assert depth is opened["depth"]
    assert (depth.card, depth.shape, depth.dtype) == (store.card, (10, 3, 4), np.float16)
    coverage = depth.coverage()
    assert (coverage.images, coverage.valid, coverage.quarantined, coverage.covered) == (10, 8, 2, 10)
    assert (coverage.missing, coverage.complete, coverage.reasons) == (0, True, {"truncated": 1, "missing": 1})
    assert str(coverage) == "10 of 10 images: 8 valid, 2 quarantined (1 missing, 1 truncated)"
    assert "FeatureStore(" in repr(opened)
    assert str(coverage) in repr(opened)
    assert str(coverage) in repr(depth)
    info = json.loads(json.dumps(depth.info()))
    assert (info["shape"], info["shard_rows"], info["row_bytes"], info["coverage"]["missing"]) == ([10, 3, 4], 4, 24, 0)


def test_teachers_are_sorted_and_private_folders_are_none(store):
    for key in ("seg", "a"):
        store.builder.ensure_teacher(key, store.card, dtype="float32")
    (store.path / ".private").mkdir()
    shutil.copytree(store.path / "seg", store.path / ".dropped.seg")
    (store.path / "notes").mkdir()
    assert FeatureStore(store.path).teachers == ["a", "depth", "seg"]


def test_one_row_by_path_and_by_number(store):
    depth = store.group
    for row in (0, 4, 9):
        for key in (row, f"photos/{row:05d}.jpg", np.int64(row)):
            values = depth[key]
            assert (values.shape, values.dtype) == ((3, 4), np.float32)
            np.testing.assert_array_equal(values, store.features[row])


def test_a_batch_in_the_order_asked_for_with_repeats(store):
    rows = [9, 1, 0, 9, 6, 4, 0]
    values, valid = store.group.read(rows)
    assert (values.shape, values.dtype, valid.dtype) == ((7, 3, 4), np.float32, bool)
    assert valid.tolist() == [r not in BAD for r in rows]
    np.testing.assert_array_equal(values[valid], store.features[[9, 0, 9, 4, 0]])
    assert np.isnan(values[~valid]).all()
    for none in ([], np.array([], np.int64)):
        values, valid = store.group.read(none)
        assert (values.shape, valid.shape) == ((0, 3, 4), (0,))


def test_into_the_caller_s_buffer_in_the_storage_dtype(store):
    out = np.full((3, 3, 4), 7, np.float16)
    values, valid = store.group.read(np.array([2, 1, 9]), out=out)
    assert values is out
    np.testing.assert_array_equal(out[[0, 2]], store.features[[2, 9]].astype(np.float16))
    assert np.isnan(out[1]).all()
    assert valid.tolist() == [True, False, True]
    big = np.empty((6, 3, 4), np.float16)
    store.group.read([2, 3, 4], out=big[1:4])  # a part of a larger buffer
    np.testing.assert_array_equal(big[1:4], store.features[2:5])
    for wrong in (np.empty((3, 3, 4), np.float32), np.empty((2, 3, 4), np.float16), big[::2]):
        with pytest.raises(ValueError, match=r"out must be a contiguous \(3, 3, 4\) array of float16"):
            store.group.read([2, 3, 4], out=wrong)


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_as_stored_for_a_device_that_decodes(small, dtype, compress):
    store = small(dtype=dtype, compress=compress).fill(BAD)
    depth, rows = store.group, [9, 1, 0, 9]
    stored, valid = depth.read_stored(rows)
    assert list(stored) == store.arrays
    assert valid.tolist() == [True, False, True, True]
    for name, part in stored.items():
        assert (part.shape[0], part.dtype) == (4, depth.layout.arrays[name].dtype)
        for i in (0, 2, 3):
            np.testing.assert_array_equal(part[i], store.codec.encode(store.features[rows[i]])[0][name])
    np.testing.assert_array_equal(depth.layout.codec.decode(stored), depth.read(rows)[0])
    if dtype == "int8":
        np.testing.assert_array_equal(stored["features"] * stored["scales"][..., None], depth.read(rows)[0])
        assert np.isnan(stored["scales"][1]).all()
    out = depth.layout.empty(4)
    again, _ = depth.read_stored(rows, out=out)
    assert again is out
    for name in out:
        np.testing.assert_array_equal(out[name], stored[name])
        wrong = {**depth.layout.empty(4), name: np.empty((5, *out[name].shape[1:]), out[name].dtype)}
        with pytest.raises(ValueError, match="out must be a contiguous"):
            depth.read_stored(rows, out=wrong)
    if store.codec.has_scales:
        with pytest.raises(ValueError, match="are nothing without scales; use read_stored"):
            depth.read(rows, out=out["features"])


def test_a_quarantined_row_says_why(store):
    depth = store.group
    failure = depth.failure(1)
    assert isinstance(failure, BadImage)
    assert (failure.image, failure.reason, failure.detail) == ("photos/00001.jpg", "truncated", "detail of 1")
    assert depth.failure("photos/00006.jpg").reason == "missing"
    assert depth.failure(0) is None
    assert [(row, e.reason) for row, e in depth.failures()] == list(BAD.items())
    with pytest.raises(BadImage, match=r"photos/00001.jpg: truncated \(detail of 1\)"):
        depth[1]


def test_what_is_not_there_is_a_key_error_that_reads_well(small):
    store = small().fill(limit=4)
    depth = store.group
    for call in (
        lambda: depth[5],
        lambda: depth["photos/00005.jpg"],
        lambda: depth.read([0, 5]),
        lambda: depth.failure(5),
    ):
        with pytest.raises(MissingFeatures) as e:
            call()
        assert isinstance(e.value, KeyError)
        assert "not committed" in str(e.value)
        assert "run olavlm-extract again" in str(e.value)
        assert str(e.value)[0] not in "\"'"  # a KeyError would show a repr
    with pytest.raises(MissingFeatures, match=r"6 of 10 rows are not committed \(first: \[4, 5, 6, 7, 8\]\)"):
        depth.read(range(10))
    for row in (10, -1, 4096):
        with pytest.raises(MissingFeatures, match=f"row {row} holds no image: the plan has 10 images, last row 9"):
            depth[row]
    with pytest.raises(MissingFeatures, match=r"image 'x\.jpg' is not in the plan of 10 images"):
        depth["x.jpg"]
    with pytest.raises(MissingFeatures, match="has no features 'seg'; it has depth"):
        FeatureStore(store.path)["seg"]
    assert "seg" not in FeatureStore(store.path)
    for row in (2.0, None, [1]):
        with pytest.raises(TypeError):
            depth[row]


def test_coverage_of_some_rows(small):
    store = small().fill({1: "empty", 9: "missing"}, limit=6)
    depth = store.group
    assert str(depth.coverage()) == "6 of 10 images: 5 valid, 1 quarantined (1 empty), 4 missing"
    part = depth.coverage(np.array([9, 1, 0, 1]))
    assert (part.images, part.valid, part.quarantined, part.missing, part.reasons) == (3, 1, 1, 1, {"empty": 1})
    assert depth.missing_rows().tolist() == [6, 7, 8, 9]
    assert depth.missing_rows(np.array([9, 5, 7])).tolist() == [7, 9]
    assert depth.missing_rows(np.array([], np.int64)).tolist() == []


def flip(file, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def raised(group: TeacherFeatures, rows, expected: np.ndarray) -> dict[int, str]:
    """The rows that raise `CorruptFeatures`, read one by one in this order; the others have their right value."""
    found = {}
    for row in rows:
        try:
            np.testing.assert_array_equal(group[int(row)], expected[row])
        except CorruptFeatures as e:
            found[int(row)] = str(e)
    return found


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_a_flipped_bit_in_any_byte_is_found_and_no_wrong_value_is_read(small, rng, dtype, compress):
    """In a row or its checksum by reading that row; in the index by reading any row of the shard, the first time."""
    store = small(rows=8, shape=(2, 4), dtype=dtype, compress=compress).fill({1: "missing"})
    valid, expected = [0, 2, 3, 4, 5, 6, 7], store.expected
    assert raised(store.group, valid, expected) == {}  # the control
    for array in store.arrays:
        file, record = store.shard_file(0, array), store.group.record(0).files[array]
        lengths = record.rows_bytes or [store.group.layout.arrays[array].row_bytes] * 4
        place = np.repeat([0, 2, 3], [lengths[r] + 4 for r in (0, 2, 3)]).tolist()  # which row a byte is of
        assert len(place) + 4 * 16 + 4 == record.size == file.stat().st_size
        for at in range(record.size):
            bit = 8 * at + int(rng.integers(8))
            flip(file, bit)
            group = store.group
            found = raised(group, rng.permutation(valid), expected)
            if at < len(place):
                assert set(found) == {place[at]}
                assert (
                    f"row {place[at]} (photos/{place[at]:05d}.jpg) is damaged: its bytes in {file}" in found[place[at]]
                )
                assert raised(group, valid, expected).keys() == {place[at]}  # in a reader that has read the others
            else:
                assert set(found) == {0, 2, 3}
                assert f"is damaged: the index of {file}" in found[0]
            for rows in (np.arange(8), [place[at] if at < len(place) else 3]):
                for reader in (group, store.group):
                    with pytest.raises(CorruptFeatures):
                        reader.read(rows)
            flip(file, bit)
            assert raised(group, valid, expected) == {}  # what was found is not remembered
    assert raised(store.group, valid, expected) == {}


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_an_index_damaged_under_a_reader_is_found_by_the_next(small, dtype, compress):
    """Who has checked it reads by the record, and every row's own checksum."""
    store = small(rows=4, dtype=dtype, compress=compress).fill()
    holding = store.group
    holding.read([0])
    for array in store.arrays:
        flip(store.shard_file(0, array), 8 * (store.shard_file(0, array).stat().st_size - 20))
        np.testing.assert_array_equal(holding.read(range(4))[0], store.expected)
        with pytest.raises(CorruptFeatures, match="the index of"):
            store.group[0]
        flip(store.shard_file(0, array), 8 * (store.shard_file(0, array).stat().st_size - 20))


def test_two_hundred_flipped_bits_in_larger_rows(small, rng):
    store = small(rows=40, shape=(20, 100), shard_rows=8, dtype="float16").fill({3: "missing"})
    valid, expected = [row for row in range(40) if row != 3], store.expected
    for _ in range(200):
        shard = int(rng.integers(5))
        file = store.shard_file(shard)
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        slot = bit // 8 // 4004
        rows = [row for row in valid if row // 8 == shard]
        found = raised(store.group, rng.permutation(valid), expected)
        assert set(found) == ({rows[slot]} if slot < len(rows) else set(rows))
        flip(file, bit)


def test_truncation_is_found_before_and_after_opening(store):
    depth, opened_before = store.group, store.group
    opened_before.read([0])
    size = store.shard_file(0).stat().st_size
    for length in (size - 1, 100, 50, 0):
        os.truncate(store.shard_file(0), length)
        with pytest.raises(CorruptFeatures):
            store.group[0]
        if length < 3 * 28:  # the three valid rows and their checksums; behind them lies the index alone
            with pytest.raises(CorruptFeatures):
                opened_before.read([0, 2, 3])
        else:
            np.testing.assert_array_equal(opened_before.read([0, 2, 3])[0], store.features[[0, 2, 3]])
    np.testing.assert_array_equal(depth[4], store.features[4])


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_two_shards_with_their_files_exchanged(small, dtype, compress):
    store = small(rows=8, dtype=dtype, compress=compress, shape=(3, 8))
    store.features[4:] = store.features[[2, 3, 0, 1]]  # of which the compressed lengths are the same together
    store.fill()
    for array in store.arrays:
        a, b, aside = store.shard_file(0, array), store.shard_file(1, array), store.path / "aside"
        a.rename(aside), b.rename(a), aside.rename(b)
        for row in range(8):
            with pytest.raises(CorruptFeatures, match="do not match its commit record"):
                store.group[row]
        a.rename(aside), b.rename(a), aside.rename(b)
    np.testing.assert_array_equal(store.group.read(range(8))[0], store.expected)


def test_a_stale_file_from_an_earlier_run(small):
    store = small(rows=4)
    store.commit(store.task(0), features=store.features + 1)
    stale = store.shard_file(0).read_bytes()
    store.record_file(0).unlink()
    store.fill()
    assert len(stale) == store.shard_file(0).stat().st_size
    store.shard_file(0).write_bytes(stale)
    with pytest.raises(CorruptFeatures):
        store.group[2]


def test_a_file_that_is_gone(store):
    depth = store.group
    np.testing.assert_array_equal(depth[0], store.features[0])
    shutil.rmtree(store.path / "depth" / "features" / "c")
    depth._files.clear()
    for reader in (depth, store.group):
        with pytest.raises(CorruptFeatures):
            reader[0]


def test_many_shards_few_descriptors(small, monkeypatch):
    monkeypatch.setattr("olavlm.cache.features._OPEN_FILES", 4)
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
    monkeypatch.setattr("olavlm.cache.features._OpenFile", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        depth[0]


def read_all(group: TeacherFeatures, rows: np.ndarray) -> bytes:
    return group.read(rows)[0].tobytes()


def test_threads_read_one_teacher(small, rng, monkeypatch):
    """Few descriptors, so that threads push each other's out; and one forgets everything again and again."""
    monkeypatch.setattr("olavlm.cache.features._OPEN_FILES", 2)
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


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_a_shard_that_grows_or_is_replaced_under_a_reader(small, dtype, compress):
    """The rows' places in the file change. The reader sees the old shard or the new one, never damage."""
    store = small(rows=4, dtype=dtype, compress=compress).fill({0: "missing"}, limit=2)
    expected = store.expected
    holding, looking = store.group, store.group
    for reader in (holding, looking):
        np.testing.assert_array_equal(reader[1], expected[1])
    store.fill()
    store.fill(retry_failed=True)
    np.testing.assert_array_equal(holding[1], expected[1])  # from the file it has open
    looking._files.clear()  # another thread or 64 other shards pushed the file out
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
        depth._files.pop((array, 0))
        np.testing.assert_array_equal(depth[1], store.expected[1])
        assert (store.codec.encode(old[1])[0][array] != store.codec.encode(new[1])[0][array]).any()  # the control


def test_a_shard_replaced_between_every_look_and_every_read_is_no_damage(small, monkeypatch):
    """The reader looks again as often as there is a newer record, and not once more."""
    store = small(rows=4).fill()
    depth, features, left = store.group, store.features, [5]
    read = TeacherFeatures._read_range

    def replaced_first(self, *where):
        if left[0]:
            left[0] -= 1
            store.commit(ShardTask("depth", 0, 0, 4, depth.plan.segments[0].hash), features=features + left[0])
        return read(self, *where)

    monkeypatch.setattr(TeacherFeatures, "_read_range", replaced_first)
    np.testing.assert_array_equal(depth[1], features[1])
    assert (left, store.group.record(0).revision) == ([0], 5)
    flip(store.shard_file(0), 400)  # row 1: real damage
    left[0] = 3
    np.testing.assert_array_equal(store.group[1], features[1])
    flip(store.shard_file(0), 500)
    with pytest.raises(CorruptFeatures):
        store.group[1]


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
        held._files.clear()  # but not what it knows of the record
    assert child.wait() == 0
    print(f"{len(seen)} versions seen")
    np.testing.assert_array_equal(store.group.read(rows)[0], expected[-1])


def test_a_row_whose_shard_is_being_replaced_is_missing_for_that_moment(small):
    store = small(rows=4).fill({0: "missing"})
    depth, seen = store.group, []
    np.testing.assert_array_equal(depth[1], store.features[1])

    def look(step):
        if step == "place":
            depth._files.clear()
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


def test_a_plan_that_has_grown_since_the_store_was_opened(small):
    store = small(rows=10).fill()
    depth = store.group
    images = pa.concat_arrays([depth.plan.images, pa.array(["new"], pa.large_string())])
    store.builder.extend_plan(images)
    store.features = np.concatenate([store.features, np.zeros((4087, 3, 4), np.float32)])
    store.fill()
    assert depth.coverage().complete  # of the plan it knows
    assert len(depth.failures()) == 0
    assert depth.missing_rows().tolist() == []
    assert store.group.coverage().images == 11
    np.testing.assert_array_equal(store.group["new"], 0)
    with pytest.raises(MissingFeatures):
        store.group[10]  # between the segments


def test_unicode_image_paths(small):
    names = ["ünï/日本 語.jpg", "e\u0301.jpg", "é.jpg", "🐘 a%20b?.png", "a\nb.jpg"]
    store = small(rows=0)
    store.builder.extend_plan(pa.array(names, pa.large_string()))
    store.features = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    store.fill({4: "missing"})
    for row, name in enumerate(names[:4]):
        np.testing.assert_array_equal(store.group[name], store.features[row])
    assert store.group.failure(names[4]).image == names[4]


def test_an_empty_plan(small):
    store = small(rows=0)
    depth = store.group
    assert depth.shape == (0, 3, 4)
    assert depth.coverage().images == 0
    assert pending(depth) == []
    assert depth.failures() == []
    assert len(FeatureStore(store.path).plan) == 0
    with pytest.raises(MissingFeatures):
        depth[0]


def test_a_path_that_is_no_store(tmp_path, store):
    zarr_group = tmp_path / "group"
    zarr_group.mkdir()
    (zarr_group / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    file = tmp_path / "file"
    file.write_text("x")
    for path, rule in (
        (tmp_path / "absent", "is not a feature store: it has no zarr.json; make one with olavlm-extract"),
        (tmp_path, "is not a feature store"),
        (file, "is not a feature store"),
        (zarr_group, "is a Zarr group but not a feature store"),
    ):
        with pytest.raises(StoreError, match=rule) as e:
            FeatureStore(path)
        assert str(path) in str(e.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b'{"zarr_format": 2}', b"null",
                                     b'{"zarr_format": 3, "attributes": null}', b'{"zarr_format": 3, "attributes": 5}',
                                     b'{"zarr_format": 3}', b"[" * 99999])  # fmt: skip
@pytest.mark.parametrize("node", ["", "depth", "depth/features"])
def test_damaged_metadata(store, node, content):
    (store.path / node / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError) as e:
        FeatureStore(store.path)["depth"]
    assert str(store.path / node) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("node", "type_"), [("", "group"), ("depth", "group"), ("depth/features", "array")])
def test_a_node_that_no_zarr_reader_would_open_is_damaged(store, node, type_):
    """A flipped bit in the name of its type alone."""
    file = store.path / node / "zarr.json"
    content = file.read_text()
    assert content.count(f'"{type_}"') == 1
    file.write_text(content.replace(f'"{type_}"', f'"{type_.capitalize()}"'))
    with pytest.raises(StoreError, match=f"{file} is not Zarr v3 metadata"):
        FeatureStore(store.path)["depth"]


def test_a_damaged_plan(store):
    file = store.path / "plan" / "00000.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PlanError, match=r"00000\.parquet is damaged"):
        FeatureStore(store.path)


def test_every_error_is_the_cache_s_and_the_builtin_s():
    import olavlm.cache as cache

    errors = [e for e in vars(cache).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) >= 9
    for e in errors:
        assert issubclass(e, CacheError)
        assert e is CacheError or issubclass(e, (ValueError, KeyError, RuntimeError, ImportError))
    again = pickle.loads(pickle.dumps(BadImage("x.jpg", "missing", "why")))
    assert (str(again), again.reason) == ("x.jpg: missing (why)", "missing")
    assert str(pickle.loads(pickle.dumps(MissingFeatures("row 1")))) == "row 1"
