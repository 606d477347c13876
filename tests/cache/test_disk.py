"""A disk that is full, slow to say so, or read-only: no record is left that could count, and no lease."""

import errno
import os
import resource

import numpy as np
import pytest

from olavlm.cache import FeatureStore, LeaseHeld, StoreBuilder, pending

FULL = OSError(errno.ENOSPC, "No space left on device")


def assert_untouched(store, shard: int) -> None:
    assert not store.record_file(shard).exists()
    assert not store.lease_file(shard).exists()
    assert store.staged() == []
    assert [f.name for f in (store.path / "depth" / "commits").iterdir()] == []
    assert [f.name for f in (store.path / "depth" / "leases").iterdir()] == []


@pytest.mark.parametrize("limit", [1, 100, 20_000, 50_000, 65_000])
def test_a_file_that_cannot_grow(small, start, limit):
    """A real fault: the kernel refuses to write beyond the limit, in append, flush or close, as a full disk would."""
    store = small(rows=4, shape=(16, 256))
    size = store.group.layout.file_bytes(4)
    assert limit < size

    def work(child):
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 1000), resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            store.commit(store.task(0))
        assert_untouched(store, 0)
        child.tell("refused")

    child = start(work)
    assert child.hear() == "refused"
    assert child.wait() == 0
    assert_untouched(store, 0)
    store.fill()
    np.testing.assert_array_equal(store.group[3], store.features[3])


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


@pytest.mark.parametrize("name", ["link", "fsync"])
def test_whichever_call_fails_no_valid_record_is_left_and_the_lease_is_free(small, monkeypatch, name):
    uninterrupted = small("a", rows=4)
    with monkeypatch.context() as m:
        calls = fail_on(m, name, -1)
        uninterrupted.fill()
        total = len(calls)
    assert total >= 3  # lease, shard, record
    for call in range(total):
        store = small(f"store {call}", rows=4)
        with monkeypatch.context() as m:
            fail_on(m, name, call)
            with pytest.raises(OSError, match="No space left"):
                store.commit(store.task(0))
        assert_untouched(store, 0)
        assert store.group.coverage().covered == 0
        store.fill()
        assert store.shards() == uninterrupted.shards()
        assert store.records() == uninterrupted.records()


@pytest.mark.parametrize("name", ["link", "fsync"])
def test_a_replacement_that_fails_leaves_the_old_shard_or_none(small, monkeypatch, name):
    reference = small("a", rows=4).fill({1: "empty"})
    with monkeypatch.context() as m:
        calls = fail_on(m, name, -1)
        reference.fill(retry_failed=True)
        total = len(calls)
    for call in range(total):
        store = small(f"store {call}", rows=4).fill({1: "empty"})
        with monkeypatch.context() as m:
            fail_on(m, name, call)
            with pytest.raises(OSError, match="No space left"):
                store.commit(store.task(0, retry_failed=True))
        record = store.group.record(0)
        assert record is None or record.revision == 0
        assert not store.lease_file(0).exists()
        store.fill(retry_failed=True)
        assert store.shards() == reference.shards()
        assert store.records()[0]["crc32c"] == reference.records()[0]["crc32c"]


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
