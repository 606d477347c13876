"""A disk that is full, slow to say so, or read-only: no record is left that could count, and no lease."""

import errno
import os
import resource
from contextlib import suppress

import numpy as np
import pytest

from olavlm.cache import CorruptFeatures, FeatureStore, LeaseHeld, StoreBuilder, pending

FULL = OSError(errno.ENOSPC, "No space left on device")


def assert_untouched(store) -> None:
    """No record, valid or not, no lease and nothing staged, of any shard."""
    assert store.staged() == []
    assert [f.name for f in (store.path / "depth" / "commits").iterdir()] == []
    assert store.leases() == []


@pytest.mark.parametrize("storage", [("float32", "none"), ("float32", "zstd"), ("int8", "none")])
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.8, 0.999])
def test_a_file_that_cannot_grow(small, start, part, storage):
    """A real fault: the kernel refuses to write beyond the limit, in append, flush or close, as a full disk would."""
    options = {"rows": 4, "shape": (16, 256), "dtype": storage[0], "compress": storage[1]}
    size = len(small("whole", **options).fill().shards()["features/c/0/0/0"])
    store, limit = small(**options), int(part * size)
    assert size > 10_000

    def work(child):
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 1000), resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            store.commit(store.task(0))
        assert_untouched(store)
        child.tell("refused")

    child = start(work)
    assert child.hear() == "refused"
    assert child.wait() == 0
    assert_untouched(store)
    store.fill()
    np.testing.assert_array_equal(store.group[3], store.expected[3])


def fail_on(monkeypatch, name: str, call: int) -> list:
    """Make the `call`th os.`name` from now fail; returns the list of calls."""
    real, calls = getattr(os, name), []

    def sometimes(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 == call:
            raise FULL
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, sometimes)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["link", "fsync", "open"])
def test_whichever_call_fails_no_valid_record_is_left_and_the_lease_is_free(small, monkeypatch, name, dtype):
    """`open` is that of the folders that are made durable; of the two arrays of int8 each has its own calls."""
    uninterrupted = small("a", rows=4, dtype=dtype)
    with monkeypatch.context() as m:
        calls = fail_on(m, name, -1)
        uninterrupted.fill()
        total = len(calls)
    assert total >= 3 + (dtype == "int8")  # lease, shard files, record
    for call in range(total):
        store = small(f"store {call}", rows=4, dtype=dtype)
        with monkeypatch.context() as m:
            fail_on(m, name, call)
            with pytest.raises(OSError, match="No space left"):
                store.commit(store.task(0))
        assert_untouched(store)
        assert store.group.coverage().covered == 0
        store.fill()
        assert store.shards() == uninterrupted.shards()
        assert store.records() == uninterrupted.records()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["link", "fsync", "rename", "unlink"])
def test_a_replacement_that_fails_leaves_the_old_shard_or_none(small, monkeypatch, name, dtype):
    reference = small("a", rows=4, dtype=dtype).fill({1: "empty"})
    with monkeypatch.context() as m:
        calls = fail_on(m, name, -1)
        reference.fill(retry_failed=True)
        total, replaced = len(calls), 0
    for call in range(total):
        store = small(f"store {call}", rows=4, dtype=dtype).fill({1: "empty"})
        with monkeypatch.context() as m:
            fail_on(m, name, call)
            with pytest.raises(OSError, match="No space left") if name != "unlink" else suppress(OSError):
                store.commit(store.task(0, retry_failed=True))
        record = store.group.record(0)
        if name == "unlink" and record is not None and record.revision == 1:
            replaced += 1  # it failed at tidying up
        else:
            assert record is None or record.revision == 0
        assert store.leases() == []
        store.fill(retry_failed=True)
        assert store.shards() == reference.shards()
        assert store.records()[0]["files"] == reference.records()[0]["files"]
        assert store.staged() == []
    assert replaced < total


def test_the_row_that_a_full_disk_had_no_room_for_is_not_committed_later(small, monkeypatch):
    """`append` fails in the middle of a shard, and the caller goes on all the same: the shard is not whole."""
    store = small(rows=4, dtype="int8", shape=(16, 256))
    task = store.task(0)
    with store.writer().begin(0, (0, 4), task.segment) as shard:
        shard.append(store.features[0], image_sha256=None)
        with monkeypatch.context() as m:
            m.setattr(shard._staged["scales"], "add", lambda *args: (_ for _ in ()).throw(FULL))
            with pytest.raises(OSError, match="No space left"):
                shard.append(store.features[1], image_sha256=None)
        for row in (2, 3):
            shard.append(store.features[row], image_sha256=None)
        with pytest.raises((CorruptFeatures, ValueError, AssertionError)):
            shard.commit()
    assert_untouched(store)


def test_a_plan_segment_that_cannot_be_written_is_not_there(small, monkeypatch):
    store = small(rows=0)
    images = small("other").builder.plan().images
    for name in ("link", "fsync"):
        for call in range(1 if name == "link" else 2):
            with monkeypatch.context() as m:
                fail_on(m, name, call)
                with pytest.raises(OSError, match="No space left"):
                    store.builder.extend_plan(images)
            assert list((store.path / "plan").iterdir()) == []
    assert store.builder.extend_plan(images)[1] == 10


def test_a_read_only_store_is_read_and_refuses_a_writer(small_store, public_path, unprivileged):
    store = small_store(public_path / "store").fill(limit=8)
    expected = store.features

    def work():
        opened = FeatureStore(store.path)["depth"]
        np.testing.assert_array_equal(opened.read(range(8))[0], expected[:8])
        assert opened.coverage().missing == 2
        (task,) = pending(opened)
        with pytest.raises(PermissionError):
            store.builder.writer(opened).begin(task.shard, (task.start, task.stop), task.segment)
        with pytest.raises(PermissionError):
            StoreBuilder(public_path / "new")

    before = sorted(str(f) for f in store.path.rglob("*"))
    unprivileged(work)
    assert sorted(str(f) for f in store.path.rglob("*")) == before
    store.fill()


def test_a_lease_that_could_not_be_made_durable_is_not_held(small, monkeypatch):
    store = small()
    with monkeypatch.context() as m:
        fail_on(m, "fsync", 1)  # of the folder, after the lease has got its name
        with pytest.raises(OSError, match="No space left"):
            store.writer().begin(0, (0, 4), store.task(0).segment)
    try:
        store.writer().begin(0, (0, 4), store.task(0).segment).drop()
    except LeaseHeld:
        pytest.fail("this process holds a lease that it does not know of")
