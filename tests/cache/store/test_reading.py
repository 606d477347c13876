"""Rows by path and by number, in batches, and as stored; what is not there, and why."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import BadImage, FeatureStore, MissingFeatures

BAD = {1: "truncated", 6: "missing"}  # of `store`


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


def test_as_stored_for_a_device_that_decodes(small, storage):
    store = small(**storage).fill(BAD)
    depth, rows = store.group, [9, 1, 0, 9]
    stored, valid = depth.read_stored(rows)
    assert list(stored) == store.arrays
    assert valid.tolist() == [True, False, True, True]
    for name, part in stored.items():
        assert (part.shape[0], part.dtype) == (4, depth.layout.arrays[name].dtype)
        for i in (0, 2, 3):
            np.testing.assert_array_equal(part[i], store.codec.encode(store.features[rows[i]])[0][name])
    np.testing.assert_array_equal(depth.layout.codec.decode(stored), depth.read(rows)[0])
    if storage["dtype"] == "int8":
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
