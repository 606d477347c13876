"""Stores on object storage are the same bytes as on a disk, and are read by any tool and process.

Against a real S3 server on loopback (the fixture `s3_server`) and in memory.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import zarr

from olavlm.cache import FeatureStore, MissingExtra, PlanError, StoreBuilder, StoreError, files, pending

ROWS = 4  # a shard
MINUTE = 60


def assert_zarr_reads(store, committed: int) -> None:
    """As the store itself does, and nothing that is not committed."""
    stored, valid = store.group.read_stored(range(committed))
    group = zarr.open_group(str(store.path), mode="r")["depth"]
    assert group.attrs["card"] == store.card
    for name, values in stored.items():
        there = group[name][:]
        np.testing.assert_array_equal(there[:committed][valid], values[valid])
        assert not np.nan_to_num(there[committed:]).any()  # the fill value


@pytest.mark.parametrize(("dtype", "compress"), [("float16", "none"), ("int8", "none"), ("int4", "zstd")])
def test_the_whole_life_is_the_same_as_on_a_disk(store_at, small, dtype, compress):
    stores = [make(dtype=dtype, compress=compress) for make in (small, store_at)]
    for store in stores:
        store.fill({5: "missing", 9: "truncated"}, limit=9)
        assert str(store.group.coverage()) == "9 of 10 images: 8 valid, 1 quarantined (1 missing), 1 missing"
        if store.path.as_posix().startswith("s3:"):
            assert_zarr_reads(store, committed=9)
        store.fill({5: "missing", 9: "truncated"})
        store.builder.index()
    local, store = stores
    assert store.contents() == local.contents()
    assert {"zarr.json", "plan/00000.parquet", "depth/zarr.json", "depth/features/c/2/0/0"} < store.contents().keys()
    assert ("depth/scales/c/2/0" in store.contents()) == store.codec.has_scales
    assert store.records() == local.records()

    opened = FeatureStore(str(store.path))
    group = opened["depth"]
    assert (opened.teachers, group.shape, opened.plan.num_rows) == (["depth"], (10, 3, 4), 10)
    rows = [9, 0, 3, 5, 8, 3]
    for _ in range(2):  # cold and warm
        values, valid = group.read(rows)
        assert valid.tolist() == [False, True, True, False, True, True]
        np.testing.assert_array_equal(values[valid], store.expected[rows][valid])
        assert np.isnan(values[~valid]).all()
    np.testing.assert_array_equal(group["photos/00003.jpg"], store.expected[3])
    assert [(row, e.reason, e.detail) for row, e in group.failures()] == [
        (5, "missing", "detail of 5"),
        (9, "truncated", "detail of 9"),
    ]
    assert group.failure(5).image == "photos/00005.jpg"
    assert str(group.coverage()) == str(local.group.coverage())
    assert group.info() == local.group.info()

    for each in stores:  # replace what failed
        each.fill(retry_failed=True)
        each.builder.index()
    assert store.group.coverage().valid == 10
    assert store.contents() == local.contents()
    np.testing.assert_array_equal(store.group.read(range(10))[0], store.expected)
    assert pending(store.group, retry_failed=True) == []


@pytest.mark.parametrize("name", ["", "/a folder/ünïcode"])
def test_a_store_may_be_a_whole_bucket_or_have_any_name(bucket, small_store, name):
    url = f"s3://{bucket.name}{name}"
    store = small_store(files.location(f"{url}/"), rows=5).fill()
    np.testing.assert_array_equal(FeatureStore(url)["depth"].read(range(5))[0], store.features)
    store.builder.drop("depth")
    assert FeatureStore(url).teachers == []


def image_paths(count: int, first: int = 0) -> pa.LargeStringArray:
    return pa.array([f"photos/{i:05d}.jpg" for i in range(first, first + count)], pa.large_string())


def test_it_grows_is_replaced_and_dropped(store_at, small):
    stores = [make() for make in (small, store_at)]
    for store in stores:
        store.fill()
        assert store.builder.extend_plan(image_paths(12))[1] == 2
        assert [t.start for t in pending(store.group)] == [4096]
        assert store.group.coverage().missing == 2
    local, store = stores
    assert store.contents() == local.contents()
    store.assert_reads(9)
    store.assert_reads(4097, committed=False)
    with pytest.raises(PlanError, match="12 of its 12 images are not in the dataset"):
        store.builder.extend_plan(image_paths(3, first=50))

    other = {**store.card, "recipe": "last", "fingerprint": "0" * 64}
    with pytest.raises(StoreError, match="recipe is null there and"):
        store.builder.ensure_teacher("depth", other, dtype="int8", shard_rows=ROWS)
    store.assert_reads(9)
    for each in stores:
        each.builder.ensure_teacher("depth", other, dtype="int8", shard_rows=ROWS, replace=True)
    assert store.contents() == local.contents()
    assert store.group.coverage().missing == 12
    for each in stores:
        plan, added = each.builder.extend_plan(image_paths(3, first=50), replace=True)
        assert (plan.num_images, added, FeatureStore(each.path).teachers) == (3, 3, [])
        each.builder.ensure_teacher("depth", each.card, dtype="float32", shard_rows=ROWS)
        each.builder.drop("depth")
    assert store.contents() == local.contents()
    assert FeatureStore(store.path).teachers == []


def test_a_row_that_a_replacement_carries_over_outlives_its_writer(store_at):
    store = store_at(dtype="int8").fill({5: "missing"})
    expected = store.group.read(range(4, 8))[0]

    def replace(on_step=None) -> None:
        with store.writer(on_step).begin(1, (4, 8), store.group.plan.segments[0].hash) as shard:
            for row in range(4, 8):
                parts, sha256 = shard.carry_over(row) or (None, None)
                shard.append_stored(parts, image_sha256=sha256, reason="missing")
            shard.commit()

    def fail(step: str) -> None:
        if step == "place":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(fail)
    assert store.group.record(1) is None
    assert len(files.names(store.group.folder / "staging")) == 3
    replace()
    np.testing.assert_array_equal(store.group.read(range(4, 8))[0], expected)
    assert files.names(store.group.folder / "staging") == []


def test_a_store_copied_to_s3_by_any_tool_is_a_store(small, bucket):
    local = small(dtype="int8").fill({5: "missing"})
    local.builder.index()
    bucket.upload(local.path, "copied/store")
    group = FeatureStore(bucket.url("copied/store"))["depth"]
    assert str(group.coverage()) == str(local.group.coverage())
    np.testing.assert_array_equal(group.read(range(10))[0], local.group.read(range(10))[0])
    assert pending(group) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_opened_here_is_read_by_loader_processes(s3, method):
    """A client's event loop does not live on in a forked process."""
    store = s3(filled=True, bad={5: "missing"}, dtype="float16", rows=20)
    group = store.group
    group[0]  # the client is made, and one of the shards known
    rows = [[0, 1, 5, 19], [8, 3, 17, 2]]
    pool = ProcessPoolExecutor(1, multiprocessing.get_context(method))
    with pool:
        answers = [pool.submit(group.read, some) for some in rows]
        for some, answer in zip(rows, answers, strict=True):
            values, valid = answer.result(timeout=MINUTE)
            assert valid.tolist() == [row != 5 for row in some]
            np.testing.assert_array_equal(values[valid], store.expected[some][valid])
    np.testing.assert_array_equal(group[18], store.expected[18])


@pytest.mark.parametrize(
    ("missing", "url", "message"),
    [
        ("s3fs", "s3://bucket/store", r"store s3://bucket/store cannot be opened .*pip install 'olavlm\[s3\]'$"),
        ("gcsfs", "gs://bucket/store", "gcsfs.*install that package$"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_remedy(missing, url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for act in (FeatureStore, StoreBuilder):
        with pytest.raises(MissingExtra, match=message) as error:
            act(url)
        assert "\n" not in str(error.value)


def test_an_unknown_protocol():
    with pytest.raises(StoreError, match="store nosuch://x/y cannot be opened: Protocol not known: nosuch"):
        FeatureStore("nosuch://x/y")
