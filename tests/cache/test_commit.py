"""The commit protocol: killed at any step, or taken for dead at any step, a shard is whole or does not exist."""

import gc
import hashlib
import os
from functools import partial

import numpy as np
import pytest

from olavlm.cache import BadImage, CorruptFeatures, LeaseHeld, LeaseLost, MissingFeatures, pending, staged
from olavlm.cache.lease import leased

DTYPES = ["float32", "int8"]  # a shard of one file, and of two
FRESH = ["lease", "recover", "stage", "compare", "fsync", "place", "record", "release"]
REPLACE = [*FRESH[:5], "withdraw", *FRESH[5:]]
SHARD = 1  # of 4 rows, 4 to 7
BAD = {5: "missing"}


def snapshot(store) -> dict:
    """Every file under the teacher's folder, by name, inode and bytes."""
    root = store.path / "depth"
    return {str(f.relative_to(root)): (f.stat().st_ino, f.read_bytes()) for f in root.rglob("*") if f.is_file()}


def steps_of(store, task, **options) -> list[str]:
    seen = []
    store.commit(task, on_step=seen.append, **options)
    return seen


def test_the_steps_and_what_they_leave(small):
    store = small()
    assert steps_of(store, store.task(SHARD), bad=BAD) == FRESH
    assert steps_of(store, store.task(SHARD, retry_failed=True)) == REPLACE
    assert store.staged() == []
    assert store.leases() == []
    assert sorted(f.name for f in (store.path / "depth" / "commits").iterdir()) == [
        "000001.0.withdrawn",
        "000001.1.json",
    ]
    assert [f.name for f in store.shard_file(SHARD).parent.iterdir()] == ["0"]


def kill_at(store, start, step: str, task, bad=None) -> None:
    """Commit `task` in a child that dies before `step`, as by SIGKILL or a power cut."""

    def work(child):
        store.commit(task, bad, on_step=lambda s: os._exit(9) if s == step else None)

    assert start(work).wait() == 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", FRESH)
def test_killed_at_any_step_the_same_command_gives_the_same_store(small, start, step, dtype):
    uninterrupted, store = small("a", dtype=dtype).fill(BAD), small("b", dtype=dtype)
    kill_at(store, start, step, store.task(SHARD), BAD)
    # The control: the fault is real. All but the first step leave a lease, and the shard exists from "release" on.
    assert store.leases() == ([] if step == "lease" else ["000001.0"])
    assert len(store.staged()) == (step in FRESH[3:]) * len(store.arrays)
    for array in store.arrays:
        assert store.shard_file(SHARD, array).exists() == (step in ("record", "release"))
    assert store.record_file(SHARD).exists() == (step == "release")
    group = store.group
    if step == "release":
        np.testing.assert_array_equal(group[4], store.expected[4])
        assert SHARD not in [t.shard for t in pending(group)]
    else:
        with pytest.raises(MissingFeatures):
            group[4]
        assert group.coverage().covered == 0
        assert SHARD in [t.shard for t in pending(group)]
    store.fill(BAD)
    assert store.shards() == uninterrupted.shards()
    assert store.records() == uninterrupted.records()
    if step != "release":
        assert store.staged() == []
        assert store.leases() == []
    store.builder.writer(store.group).sweep(SHARD)
    assert store.staged() == []
    assert store.leases() == []
    assert store.shards() == uninterrupted.shards()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", REPLACE)
def test_killed_at_any_step_of_a_replacement(small, start, step, dtype):
    uninterrupted, store = (small(name, dtype=dtype).fill(BAD).fill(limit=8) for name in "ab")
    uninterrupted.fill(retry_failed=True)
    assert uninterrupted.records()[SHARD]["revision"] == 1
    kill_at(store, start, step, store.task(SHARD, retry_failed=True))
    group = store.group
    if step in REPLACE[: REPLACE.index("withdraw") + 1]:  # what stood still stands
        assert group.record(SHARD).revision == 0
        np.testing.assert_array_equal(group[4], store.expected[4])
        assert group.failure(5).reason == "missing"
    elif step != "release":  # withdrawn, and the new one not yet published
        for array in store.arrays:
            assert store.shard_file(SHARD, array).exists() == (step == "record")
        assert group.record(SHARD) is None
        with pytest.raises(MissingFeatures):
            group[4]
    else:
        np.testing.assert_array_equal(group[5], store.expected[5])
    store.fill(retry_failed=True)
    assert store.shards() == uninterrupted.shards()
    assert store.records() == uninterrupted.records()


@pytest.mark.parametrize("dtype", DTYPES)
def test_killed_before_any_change_of_a_name(small, killed, dtype):
    """Between steps too: one of the two files of int8 placed, the record withdrawn and one file removed, ..."""
    uninterrupted = small("a", dtype=dtype).fill(BAD, limit=8).fill(limit=8, retry_failed=True)
    halves = 0
    for call in range(100):
        store = small(f"store {call}", dtype=dtype).fill(BAD, limit=8)
        task = store.task(SHARD, limit=8, retry_failed=True)
        if not killed(lambda store=store, task=task: store.commit(task), call):
            break
        halves += len({store.shard_file(SHARD, array).exists() for array in store.arrays}) == 2
        for row in range(4, 8):
            try:
                np.testing.assert_array_equal(store.group[row], store.expected[row])
            except MissingFeatures:
                assert store.group.record(SHARD) is None
            except BadImage:
                assert row == 5
        store.fill(limit=8, retry_failed=True)
        assert store.shards() == uninterrupted.shards()
        assert store.records() == uninterrupted.records()
        store.writer().sweep(SHARD)
        assert store.staged() == store.leases() == []
    assert 10 < call < 99
    assert (halves >= 2) == (dtype == "int8")  # once while they are removed, once while they are placed


def test_killed_again_and_again(small, start):
    uninterrupted, store = small("a").fill(BAD), small("b")
    for step in [*FRESH[:-1], *FRESH[-2:0:-1]]:
        kill_at(store, start, step, store.task(SHARD), BAD)
        assert SHARD in [t.shard for t in pending(store.group)]
    store.fill(BAD)
    assert store.shards() == uninterrupted.shards()
    assert store.records() == uninterrupted.records()
    assert store.staged() == []


def test_a_file_without_a_record_does_not_exist_and_is_swept_up(small):
    store = small().fill()
    good = store.shards()
    store.record_file(0).unlink()
    with pytest.raises(MissingFeatures, match="1 of 1 rows are not committed"):
        store.group[0]
    with store.writer().begin(0, (0, 4), store.task(0).segment) as shard:
        assert not store.shard_file(0).exists()
        store.append(shard, store.task(0))
        shard.commit()
    assert store.shards() == good


@pytest.mark.parametrize("array", ["features", "scales"])
@pytest.mark.parametrize("damage", ["gone", "truncated", "longer", "record damaged"])
def test_a_record_that_is_not_the_files_does_not_count_and_is_redone(small, damage, array):
    uninterrupted, store = small("a", dtype="int8").fill(), small("b", dtype="int8").fill()
    file = store.shard_file(SHARD, array)
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        store.record_file(SHARD).write_bytes(b"{")
    with pytest.raises(CorruptFeatures):
        store.group[4]
    assert store.group.coverage().missing == 4
    assert [t.shard for t in pending(store.group)] == [SHARD]
    store.fill()
    assert store.shards() == uninterrupted.shards()
    assert store.records()[SHARD]["revision"] == 1
    assert {**store.records()[SHARD], "revision": 0} == uninterrupted.records()[SHARD]


def test_a_shard_is_placed_with_the_row_count_asked_for_or_not_at_all(small):
    store = small()
    task = store.task(SHARD)
    with store.writer().begin(SHARD, (task.start, task.stop), task.segment) as shard:
        shard.append(store.features[4], image_sha256=None)
        with pytest.raises(ValueError, match="has 4 rows, 1 were appended"):
            shard.commit()
    assert (store.shards(), store.records(), store.staged(), store.leases()) == ({}, {}, [], [])


def test_rows_that_cannot_be_stored(small):
    store = small(rows=4, dtype="float16")
    values = store.features.copy()
    values[0, 1, 2], values[1, 0, 0], values[2, 2, 3] = np.nan, -np.inf, 70000
    store.commit(store.task(0), features=values)
    assert [(r, str(e)) for r, e in store.group.failures()] == [
        (0, "photos/00000.jpg: non-finite"),
        (1, "photos/00001.jpg: non-finite"),
        (2, "photos/00002.jpg: overflow"),
    ]
    np.testing.assert_array_equal(store.group[3], store.features[3])


def test_what_append_refuses(small):
    store = small()
    with store.writer().begin(0, (0, 4), store.task(0).segment) as shard:
        with pytest.raises(ValueError, match=r"features of shape \(4, 3\) in an array of \(3, 4\)"):
            shard.append(np.zeros((4, 3), np.float32), image_sha256=None)
        for reason in (None, "because"):
            with pytest.raises(ValueError, match="a row without features has a reason of missing, empty"):
                shard.append(None, image_sha256=None, reason=reason)
        for reason in BadImage.REASONS[:4]:
            shard.append(None, image_sha256=None, reason=reason)
        shard.commit()
    assert [e.reason for _, e in store.group.failures()] == list(BadImage.REASONS[:4])


def append_in_batches(store, task, size: int, bad: dict[int, str]):
    """As `SmallStore.commit`, of rows that were encoded before."""
    with store.writer().begin(task.shard, (task.start, task.stop), task.segment) as shard:
        for start in range(task.start, task.stop, size):
            rows = range(start, min(start + size, task.stop))
            encoded = [store.codec.encode(store.features[row]) for row in rows]
            shard.append_batch(
                {name: np.stack([parts[name] for parts, _, _ in encoded]) for name in store.arrays},
                images_sha256=[None if r in bad else hashlib.sha256(b"image %d" % r).hexdigest() for r in rows],
                rejections=[(bad[r], f"detail of {r}") if r in bad else None for r in rows],
                fidelity=[None if r in bad else fidelity for r, (_, _, fidelity) in zip(rows, encoded, strict=True)],
            )
        return shard.commit()


@pytest.mark.parametrize(
    ("dtype", "compress", "small_row"),
    [("float16", "none", 0), ("float32", "none", 2**16), ("int8", "none", 2**16), ("int8", "zstd", 2**16)],
)
def test_rows_appended_in_batches_are_the_same_bytes_and_record(small, monkeypatch, dtype, compress, small_row):
    """Written one by one or many at once, with rejected rows among them, or nothing but those."""
    monkeypatch.setattr(staged, "SMALL_ROW", small_row)
    options = {"rows": 11, "shard_rows": 11, "dtype": dtype, "compress": compress}
    for bad in ({}, {0: "missing", 4: "empty", 5: "truncated", 10: "overflow"}, dict.fromkeys(range(11), "missing")):
        one_by_one = small(f"one by one {len(bad)}", **options)
        one_by_one.commit(one_by_one.task(0), bad)
        for size in (4, 11):
            batches = small(f"{len(bad)} in {size}", **options)
            append_in_batches(batches, batches.task(0), size, bad)
            assert batches.shards() == one_by_one.shards()
            assert batches.records() == one_by_one.records()


def test_what_a_batch_refuses(small):
    store = small()
    with store.writer().begin(0, (0, 4), store.task(0).segment) as shard:
        parts = {"features": store.features[:2]}
        with pytest.raises(ValueError, match="a row without features has a reason of missing, empty"):
            shard.append_batch(parts, images_sha256=[None] * 2, rejections=[None, ("odd", "")], fidelity=[None] * 2)
        with pytest.raises(ValueError, match="zip"):
            shard.append_batch(parts, images_sha256=[None] * 2, rejections=[None], fidelity=[None] * 2)


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("array", ["features", "scales"])
def test_a_disk_that_reads_back_other_bytes_is_found(small, array, compress):
    """Whichever byte it is: of a row, its checksum, the index or its checksum."""
    store = small(dtype="int8", compress=compress)
    task, changed = store.task(0), []

    def flip(at: int, step: str) -> None:
        if step == "compare":
            (staged,) = (name for name in store.staged() if name.endswith(array))
            file = store.path / "depth" / "staging" / staged
            data = bytearray(file.read_bytes())
            changed.append(at)
            data[at] ^= 1
            file.write_bytes(data)

    sizes = store.commit(task).files
    store.writer().sweep(0, withdraw_all=True)
    before = len(os.listdir(store.path / "depth" / "commits"))  # noqa: PTH208
    for at in range(sizes[array].size):
        with pytest.raises(CorruptFeatures, match="reads back differently"):
            store.commit(task, on_step=partial(flip, at))
    assert changed == list(range(sizes[array].size))
    assert (store.shards(), store.records(), store.staged(), store.leases()) == ({}, {}, [], [])
    assert len(os.listdir(store.path / "depth" / "commits")) == before  # noqa: PTH208


@pytest.mark.parametrize("size", [-1, 1, -48, -68, -100, None])
def test_a_disk_that_reads_back_more_or_less_is_found(small, size):
    store = small()

    def change(step: str) -> None:
        if step == "compare":
            (staged,) = store.staged()
            file = store.path / "depth" / "staging" / staged
            os.truncate(file, 0 if size is None else file.stat().st_size + size)

    with pytest.raises(CorruptFeatures, match="reads back differently"):
        store.commit(store.task(0), on_step=change)
    assert (store.shards(), store.records(), store.staged(), store.leases()) == ({}, {}, [], [])


def take_over(store) -> None:
    """Make the lease of SHARD that of a writer taken for dead: of another host, silent for too long."""
    file = leased(store.path / "depth" / "leases")[SHARD]
    file.write_text(file.read_text().replace('"host": "', '"host": "not-'))
    os.utime(file, (0, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", FRESH[3:-1])
def test_a_stuck_writer_that_wakes_when_another_is_done_changes_nothing(small, step, dtype):
    store = small(dtype=dtype)
    task, after = store.task(SHARD), []

    def stuck(at):
        if at == step:
            take_over(store)
            store.commit(task)  # the other writer, from lease to release
            after.append(snapshot(store))

    with pytest.raises(LeaseLost):
        store.commit(task, on_step=stuck, features=store.features + 1)
    assert snapshot(store) == after[0]
    np.testing.assert_array_equal(store.group[4], store.expected[4])
    assert store.staged() == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", REPLACE[3:-1])
def test_nor_does_a_stuck_replacement(small, step, dtype):
    store = small(dtype=dtype).fill(BAD)
    task, after = store.task(SHARD, retry_failed=True), []

    def stuck(at):
        if at == step:
            take_over(store)
            store.commit(task)
            after.append(snapshot(store))

    with pytest.raises(LeaseLost):
        store.commit(task, on_step=stuck, features=store.features + 1)
    assert snapshot(store) == after[0]
    np.testing.assert_array_equal(store.group[5], store.expected[5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", FRESH[3:-1])
def test_a_stuck_writer_that_wakes_while_another_is_at_work_changes_nothing(small, step, dtype):
    store = small(dtype=dtype)
    task, others = store.task(SHARD), []

    def stuck(at):
        if at == step:
            take_over(store)
            others.append(store.writer().begin(SHARD, (task.start, task.stop), task.segment))

    with pytest.raises(LeaseLost):
        store.commit(task, on_step=stuck, features=store.features + 1)
    with others[0] as shard:
        store.append(shard, task)
        shard.commit()
    np.testing.assert_array_equal(store.group[4], store.expected[4])
    assert store.staged() == []


def test_a_record_published_too_late_is_taken_back(small, monkeypatch):
    """A writer stalls after its last look at the lease; the other has placed its file and not yet its record."""
    store = small()
    task = store.task(SHARD)

    def other(at):
        if at == "record":
            raise KeyboardInterrupt  # its file is placed, its record is not

    def stuck(at):
        if at == "record":
            take_over(store)
            with pytest.raises(KeyboardInterrupt):
                store.commit(task, on_step=other)
            monkeypatch.setattr(shard.lease, "check", lambda: None)  # the look that came just before

    with store.writer(stuck).begin(SHARD, (task.start, task.stop), task.segment) as shard:
        store.append(shard, task, features=store.features + 1)
        with pytest.raises(LeaseLost):
            shard.commit()
    assert store.shard_file(SHARD).exists()
    assert store.group.record(SHARD) is None
    store.fill()
    np.testing.assert_array_equal(store.group[4], store.features[4])


def test_a_writer_taken_for_dead_after_its_record_has_done_its_work(small, monkeypatch):
    """The control of the test before: the record stands when it is of the file in place."""
    store = small()
    task = store.task(SHARD)
    with store.writer().begin(SHARD, (task.start, task.stop), task.segment) as shard:
        store.append(shard, task)
        publish = shard._fidelity_summary

        def late():
            monkeypatch.setattr(shard.lease, "nonce", "of nobody")
            return publish()

        monkeypatch.setattr(shard, "_fidelity_summary", late)  # after the last check, before the record
        assert shard.commit().revision == 0
    np.testing.assert_array_equal(store.group[4], store.features[4])


def carry_over(store, *gone: int) -> None:
    """Try the failed rows of shard 1 again, when the images of the rows `gone` cannot be had any more."""
    task = next((t for t in pending(store.group, retry_failed=True) if t.shard == SHARD), None)
    if task is None:
        return
    with store.writer().begin(SHARD, (task.start, task.stop), task.segment) as shard:
        for row in range(task.start, task.stop):
            if row not in gone:
                shard.append(store.features[row], image_sha256=hashlib.sha256(b"image %d" % row).hexdigest())
            elif (found := shard.carry_over(row)) is not None:
                shard.append_stored(found[0], image_sha256=found[1])
            else:
                shard.append(None, image_sha256=None, reason="missing")
        shard.commit()


@pytest.mark.parametrize(("dtype", "compress"), [("float32", "none"), ("int8", "none"), ("int4", "zstd")])
def test_a_row_is_carried_over_as_it_is_stored(small, dtype, compress):
    store = small(dtype=dtype, compress=compress).fill(BAD)
    before = store.group.record(SHARD)
    carry_over(store, 4, 5)
    after = store.group.record(SHARD)
    assert (after.revision, after.files, after.images_sha256) == (1, before.files, before.images_sha256)
    assert [r and r["reason"] for r in after.reasons] == [None, "missing", None, None]  # it never was valid
    norms = np.linalg.norm(store.features[6:8].reshape(2, -1), axis=1)  # of the rows that were computed
    assert (after.norms["min"], after.norms["max"]) == pytest.approx((norms.min(), norms.max()))
    np.testing.assert_array_equal(store.group[4], store.expected[4])
    assert store.staged() == []


@pytest.mark.parametrize("damage", ["cut short", "index", "another row", "record"])
def test_rows_are_carried_over_from_a_damaged_shard(small, damage):
    """Those that a whole record vouches for, byte for byte; and it stands as it is until it is replaced."""
    whole, store = small("a").fill(), small("b").fill()
    file = store.shard_file(SHARD)
    data = bytearray(file.read_bytes())
    data[{"index": -1, "another row": 60}.get(damage, 0)] ^= damage in ("index", "another row")
    file.write_bytes(data[: 3 * 52] if damage == "cut short" else data)
    if damage == "record":
        store.record_file(SHARD).write_bytes(b"{")
    before = snapshot(store)
    with store.writer().begin(SHARD, (4, 8), store.group.plan.segments[0].hash) as shard:
        found = [row for row in range(4, 8) if shard.carry_over(row) is not None]
    assert snapshot(store) == before
    assert found == {"cut short": [4, 5, 6], "index": [4, 5, 6, 7], "another row": [4, 6, 7], "record": []}[damage]
    if damage in ("cut short", "record"):  # the control: these do not count any more
        assert [t.shard for t in pending(store.group)] == [SHARD]
        store.fill()
        assert store.shards() == whole.shards()


@pytest.mark.parametrize("dtype", DTYPES)
def test_killed_before_any_change_of_a_name_no_carried_over_row_is_lost(small, killed, dtype):
    """While the old record is withdrawn and the new one is not there, and again while that is made good."""
    uninterrupted = small("a", dtype=dtype).fill(BAD, limit=8)
    carry_over(uninterrupted, 4)
    missing = 0
    for call in range(100):
        store = small(f"store {call}", dtype=dtype).fill(BAD, limit=8)
        if not killed(lambda store=store: carry_over(store, 4), call):
            break
        missing += store.group.record(SHARD) is None
        killed(lambda store=store: carry_over(store, 4), call % 12)
        store.writer().sweep(SHARD)
        carry_over(store, 4)
        assert store.shards() == uninterrupted.shards()
        assert {**store.records()[SHARD], "revision": 1} == uninterrupted.records()[SHARD]
        store.writer().sweep(SHARD)
        assert [name for name in store.staged() if name[0] != "."] == store.leases() == []
    assert 15 < call < 99
    assert missing >= 3  # the control: it was killed there too


@pytest.mark.parametrize("step", ["withdraw", "place", "record"])
def test_a_replacement_that_fails_keeps_what_it_carried_over(small, step):
    store = small().fill(BAD)

    def fail(at: str) -> None:
        if at == step:
            raise KeyboardInterrupt

    with store.writer(fail).begin(SHARD, (4, 8), store.task(SHARD, retry_failed=True).segment) as shard:
        for row in range(4, 8):
            parts, sha256 = shard.carry_over(row) or (None, None)
            shard.append_stored(parts, image_sha256=sha256, reason="missing")
        with pytest.raises(KeyboardInterrupt):
            shard.commit()
    assert (store.group.record(SHARD) is None) == (step != "withdraw")
    assert store.leases() == []
    carry_over(store, 4, 6, 7)
    np.testing.assert_array_equal(store.group.read(range(4, 8))[0], store.expected[4:8])
    assert store.staged() == []


def test_two_live_writers(small):
    store = small()
    task = store.task(SHARD)
    with store.writer().begin(SHARD, (task.start, task.stop), task.segment) as shard:
        with pytest.raises(LeaseHeld):
            store.writer().begin(SHARD, (task.start, task.stop), task.segment)
        with pytest.raises(LeaseHeld):
            store.writer().sweep(SHARD)
        store.commit(store.task(0))  # another shard is free
        store.append(shard, task)
        shard.commit()
    assert sorted(store.records()) == [0, 1]


def test_many_processes_at_once_commit_every_shard_once(small, start):
    uninterrupted, store = small("a", rows=40).fill(BAD), small("b", rows=40)

    def work(child):
        child.hear()
        for task in pending(store.group):
            try:
                store.commit(task, BAD)
            except (LeaseHeld, LeaseLost):
                child.tell(f"not {task.shard}")
        child.tell("done")

    children = [start(work) for _ in range(4)]
    for child in children:
        child.tell("go")
    refused = 0
    for child in children:
        while child.hear() != "done":
            refused += 1
        assert child.wait() == 0
    print(f"{refused} refused")
    assert store.shards() == uninterrupted.shards()
    records = store.records()
    assert {k: {**r, "revision": 0} for k, r in records.items()} == uninterrupted.records()
    assert store.staged() == []


def test_a_shard_begun_anew_by_another_after_it_was_dropped(small):
    store = small()
    task = store.task(SHARD)
    with store.writer().begin(SHARD, (task.start, task.stop), task.segment) as shard:
        store.append(shard, task)
    assert (store.shards(), store.records(), store.staged()) == ({}, {}, [])
    store.fill()
    assert sorted(store.records()) == [0, 1, 2]


def test_no_descriptor_is_left_open(small):
    store = small(rows=40)

    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = open_files()
    for task in pending(store.group)[:5]:
        store.commit(task)
    for fault in FRESH[1:]:

        def stop(step, fault=fault):
            if step == fault:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.commit(store.task(6), on_step=stop)
    assert open_files() <= before
