"""Rows of remote stores kept on a local disk: no second request, never stale or damaged, within the bound."""

import contextlib
import errno
import itertools
import os
import pickle
import signal

import fsspec
import numpy as np
import pytest

from olavlm.cache import CorruptFeatures, FeatureStore, LocalCache, StoreError, files
from olavlm.cache import local_cache as tier

ROWS, SHARD_ROWS, SHAPE = 10, 4, (3, 4)
MB = 10**6


@pytest.fixture
def remote(small_store):
    """remote(name="store", **options) -> filled SmallStore on an object store in memory."""
    memory = fsspec.filesystem("memory")
    yield lambda name="store", **options: small_store(
        files.location(f"memory://local-cache/{name}"), rows=ROWS, shard_rows=SHARD_ROWS, **options
    ).fill()
    with contextlib.suppress(FileNotFoundError):
        memory.rm("/local-cache", recursive=True)


@pytest.fixture
def requests(monkeypatch):
    """The ranges that were asked for, (path, start, stop), of this process."""
    asked, read_ranges = [], files.read_ranges

    def counted(wanted, starts, stops):
        asked.extend((file.path, start, stop) for file, start, stop in zip(wanted, starts, stops, strict=True))
        return read_ranges(wanted, starts, stops)

    monkeypatch.setattr(files, "read_ranges", counted)
    return asked


def opened(store, folder, max_bytes=MB):
    return FeatureStore(store.path, local_cache=LocalCache(folder, max_bytes))["depth"]


def assert_reads(group, store, rows=range(ROWS)):
    values, valid = group.read(rows)
    assert valid.all()
    np.testing.assert_array_equal(values, store.expected[list(rows)])


def kept(folder):
    return sorted(file for file in folder.iterdir() if file.suffix == tier.SUFFIX)


@pytest.mark.parametrize(("dtype", "compress"), [("float16", "none"), ("int8", "none"), ("int4", "zstd")])
def test_what_was_read_is_not_asked_for_again_by_this_reader_or_the_next(remote, requests, tmp_path, dtype, compress):
    store = remote(dtype=dtype, compress=compress)
    group = opened(store, tmp_path)
    for _ in range(2):
        assert_reads(group, store)
        first, requests[:] = len(requests), []
    arrays = len(store.arrays)
    assert first == 0, "the second epoch"
    assert_reads(opened(store, tmp_path), store, [9, 0, 3, 3])  # another run
    assert_reads(pickle.loads(pickle.dumps(group)), store)
    assert requests == []
    assert len(kept(tmp_path)) == 3 * arrays  # a file a shard
    assert_reads(store.group, store)  # the control
    assert len(requests) == arrays * (ROWS + 3)  # rows, and the index of each shard


def test_a_store_on_a_file_system_is_read_as_it_is(small, tmp_path):
    store = small(dtype="float16").fill()
    assert_reads(opened(store, tmp_path / "kept"), store)
    assert kept(tmp_path / "kept") == []


def test_a_quarantined_row_stays_one(remote, small_store, tmp_path):
    store = small_store(files.location("memory://local-cache/bad"), rows=ROWS, shard_rows=SHARD_ROWS).fill({5: "empty"})
    for _ in range(2):
        values, valid = opened(store, tmp_path).read([4, 5])
        assert valid.tolist() == [True, False]
        np.testing.assert_array_equal(values[0], store.expected[4])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_damage_is_fetched_again_and_mended(remote, requests, tmp_path, dtype):
    store = remote(dtype=dtype)
    assert_reads(opened(store, tmp_path), store)
    for file in kept(tmp_path):
        sound = file.read_bytes()
        for damage in (
            bytes(len(sound)),
            sound[: len(sound) // 2],
            b"",
            bytes(b ^ 1 for b in sound),
            sound[1:] + sound[:1],
        ):
            file.write_bytes(damage)
            requests.clear()
            assert_reads(opened(store, tmp_path), store)
            assert requests, "it was not used"
            assert file.read_bytes() == sound, "and is whole again"
    requests.clear()
    assert_reads(opened(store, tmp_path), store)
    assert requests == []


def test_damage_in_the_store_is_an_error_and_is_not_kept(remote, tmp_path):
    store = remote(dtype="float16")
    file = files.location(f"{store.path}/depth/features/c/0/0/0")
    sound = files.read(file)
    files.replace(file, bytes([sound[0] ^ 1]) + sound[1:])
    for _ in range(2):
        with pytest.raises(CorruptFeatures):
            opened(store, tmp_path)[0]
    files.replace(file, sound)
    assert_reads(opened(store, tmp_path), store)


class TestAnotherContent:
    def test_a_shard_that_was_replaced(self, remote, small_store, tmp_path):
        path = files.location("memory://local-cache/replaced")
        store = small_store(path, rows=ROWS, shard_rows=SHARD_ROWS).fill({1: "truncated"})
        reader = opened(store, tmp_path)
        before, valid = reader.read(range(ROWS))
        assert valid.tolist() == [row != 1 for row in range(ROWS)]
        store.features[:4] *= 2
        store.fill(retry_failed=True)
        np.testing.assert_array_equal(reader.read([0])[0], before[:1])  # as of when it was opened
        for group in (opened(store, tmp_path), reader):
            group.reload()  # nothing, in the one just opened
            assert_reads(group, store)

    def test_another_store_of_the_same_shape_and_another_teacher_in_its_place(self, remote, requests, tmp_path):
        one, other = remote("one", seed=1), remote("other", seed=2)
        for store in (one, other, one):
            assert_reads(opened(store, tmp_path), store)
        one.builder.drop("depth")
        again = remote("one", seed=3)
        requests.clear()
        assert_reads(opened(again, tmp_path), again)
        assert len(requests) == ROWS + 3


class TestBound:
    """A file here takes one block of 4096 bytes, and what is to be written is counted as two."""

    def test_the_least_recently_used_go_and_the_bound_holds(self, remote, requests, tmp_path):
        store = remote(dtype="float16")
        bound = round(5 * 4096 / 0.9) + 1  # three files, and a fourth until its second part is written
        group = opened(store, tmp_path, bound)
        (tmp_path / "foreign").write_bytes(bytes(3 * bound))

        def asked(row):
            requests.clear()
            assert_reads(group, store, [row])
            assert sum(f.stat().st_blocks * 512 for f in kept(tmp_path)) <= bound
            return len(requests)

        assert [asked(row) for row in (0, 4, 8)] == [2, 2, 2], "a row and the index of its shard"
        assert [asked(row) for row in (0, 4, 8)] == [0, 0, 0]
        assert asked(0) == 0  # used last, so that the shard of row 4 is what goes
        other = remote("other", dtype="float16")
        assert_reads(opened(other, tmp_path, bound), other, [0])
        assert [asked(row) for row in (0, 8, 4)] == [0, 0, 1]
        assert (tmp_path / "foreign").exists()

    def test_many_rows_in_any_order(self, remote, rng, tmp_path):
        store = remote(dtype="float32", shape=(40, 64))
        bound = 5 * store.features[0].nbytes
        for _ in range(3):
            group = opened(store, tmp_path, bound)
            for row in rng.permutation(ROWS).tolist():
                assert_reads(group, store, [row])
                assert LocalCache(tmp_path, bound).num_bytes() <= bound
        assert kept(tmp_path)

    def test_a_row_larger_than_the_bound_is_read_and_not_kept(self, remote, tmp_path):
        store = remote(dtype="float32", shape=(40, 64))
        assert_reads(opened(store, tmp_path, 8192), store)
        assert LocalCache(tmp_path, 8192).num_bytes() <= 8192


def test_two_processes_at_once(remote, start, tmp_path):
    """They write the same files, and make room in each other's."""
    store = remote(dtype="float32", shape=(40, 64))
    bound = 12 * store.features[0].nbytes

    def read(child, seed):
        group, order = opened(store, tmp_path, bound), np.random.default_rng(seed)
        child.tell("ready")
        child.hear()
        for _ in range(30):
            assert_reads(group, store, order.permutation(ROWS))

    children = [start(lambda child, seed=seed: read(child, seed)) for seed in range(2)]
    for child in children:
        assert child.hear() == "ready"
    for child in children:
        child.tell("go")
    assert [child.wait() for child in children] == [0, 0]
    assert LocalCache(tmp_path, bound).num_bytes() <= bound
    assert_reads(opened(store, tmp_path, bound), store)


def test_a_reader_that_is_killed_while_it_writes(remote, requests, start, tmp_path):
    """After any number of bytes: what it left is not taken for a row."""
    store = remote(dtype="float16")
    pwrite = os.pwrite

    def dying(writes):
        count = itertools.count()

        def half(descriptor, content, offset):
            if next(count) == writes:
                pwrite(descriptor, content[: len(content) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(descriptor, content, offset)

        return half

    def work(child, writes):
        os.pwrite = dying(writes)
        opened(store, tmp_path).read(range(ROWS))

    for writes in (0, 1, 5, 12):
        assert start(lambda child, writes=writes: work(child, writes)).wait() == -signal.SIGKILL
        assert_reads(opened(store, tmp_path), store)
        for file in kept(tmp_path):
            file.unlink()
    start(lambda child: work(child, 5)).wait()
    requests.clear()
    assert_reads(opened(store, tmp_path), store)
    assert 0 < len(requests) < ROWS + 3, "what it had finished is used"


class TestTrouble:
    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match=r"local cache .*/file/rows cannot be written \(Not a directory\); name"):
            LocalCache(tmp_path / "file" / "rows", MB)

    def test_a_disk_without_the_room(self, tmp_path):
        with pytest.raises(StoreError, match=r"is to hold 1000000000.0 GB and its disk has room for [\d.]+ GB; give"):
            LocalCache(tmp_path, 10**18)

    def test_a_disk_that_fills_up_is_said_once_by_all_processes(self, remote, start, tmp_path, monkeypatch, capfd):
        store = remote(dtype="float16")
        group, other = opened(store, tmp_path), LocalCache(tmp_path, MB)

        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        children = [start(lambda child: assert_reads(group, store)) for _ in range(3)]
        assert [child.wait() for child in children] == [0, 0, 0]
        assert_reads(group, store)
        assert_reads(group, store)
        said = capfd.readouterr().err
        assert said.count("warning: local cache") == 1
        assert "No space left on device; what is not in it is read from the store, and no longer kept" in said
        assert other.num_bytes() == 0

    def test_a_folder_that_is_removed_meanwhile(self, remote, tmp_path, capfd):
        store, folder = remote(dtype="float16"), tmp_path / "rows"
        group = opened(store, folder)
        assert_reads(group, store, [0])
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        assert_reads(group, store)
        assert capfd.readouterr().err.count("warning") == 1
