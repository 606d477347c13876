"""Making a store: what is refused with the difference, what --replace drops, and which shards are still to do."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import zarr

from olavlm.cache import FeatureStore, StoreBuilder, StoreError, pending


def spans(tasks) -> list[tuple[int, int, int]]:
    return [(t.shard, t.start, t.stop) for t in tasks]


def test_a_new_store_is_a_zarr_group_that_reads_as_a_store(tmp_path):
    path = tmp_path / "a" / "b" / "store"
    builder = StoreBuilder(path)
    assert FeatureStore(path).teachers == []
    assert zarr.open(path, mode="r").attrs.asdict() == {"olavlm": {"format": 1}}
    assert builder.plan().num_images == 0
    StoreBuilder(path)  # opens it
    (tmp_path / "empty").mkdir()
    StoreBuilder(tmp_path / "empty")


def test_a_builder_killed_before_the_store_is_one_leaves_a_folder_that_can_become_one(tmp_path, start):
    path = tmp_path / "store"

    def work(child):
        os.link = lambda *names: os._exit(9)  # the instant before zarr.json gets its name
        StoreBuilder(path)

    assert start(work).wait() == 9
    assert len(list(path.iterdir())) > 0  # the control: it left something
    StoreBuilder(path)
    assert FeatureStore(path).teachers == []


def test_where_a_store_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_text("x")
    zarr.open_group(tmp_path / "group", mode="w")
    for path, rule in (
        ("nosuch://bucket/store", "store nosuch://bucket/store cannot be opened: Protocol not known"),
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "other", r"is a folder with other content \(photo\.jpg, \.\.\.\); give an empty or new one"),
        (tmp_path / "group", "is a Zarr group but not a feature store"),
    ):
        with pytest.raises(StoreError, match=rule):
            StoreBuilder(path)
    assert (tmp_path / "other" / "photo.jpg").read_text() == "x"


def test_shard_rows_by_default(small):
    store = small(rows=1)
    for key, tokens, rows in (("one", 1, 4096), ("many", 2, 128)):
        card = {**store.card, "tokens": tokens}
        assert store.builder.ensure_teacher(key, card, dtype="float16").layout.shard_rows == rows
        assert store.builder.ensure_teacher(key, card, dtype="float16").layout.shard_rows == rows
    assert store.builder.ensure_teacher("depth", store.card, dtype="float32").layout.shard_rows == 4  # as it is


def test_other_features_are_refused_with_the_difference(small):
    store = small().fill()
    ensure, before = store.builder.ensure_teacher, store.shards()

    def refused(card, **options) -> str:
        with pytest.raises(StoreError) as e:
            ensure("depth", card, **{"dtype": "float32", **options})
        assert "take another store or key, or remove these first (olavlm-cache drop" in str(e.value)
        return str(e.value)

    assert ensure("depth", {**store.card, "versions": {"numpy": "0"}}, dtype="float32").fingerprint
    other = {**store.card, "size": [16, 16], "mean": 0.5, "fingerprint": "other"}
    text = refused(other)
    assert "size is [8, 8] there and [16, 16] here" in text
    assert "mean is null there and 0.5 here" in text
    assert "versions" not in text
    assert "fingerprint" not in text
    assert "dtype is float32 there and float16 here" in refused(store.card, dtype="float16")
    assert "shard rows are 4 there and 8 here" in refused(store.card, shard_rows=8)
    assert refused(other, dtype="float16").count("there and") == 3
    assert store.shards() == before
    group = ensure("depth", other, dtype="float16", shard_rows=8, replace=True)
    assert (group.dtype, group.layout.shard_rows, group.card) == (np.float16, 8, other)
    assert store.group.coverage().covered == 0
    assert store.shards() == {}
    assert [f.name for f in store.path.iterdir() if f.name[0] == "."] == []
    kept = small("kept").fill()  # --replace of the same features drops nothing
    kept.builder.ensure_teacher("depth", kept.card, dtype="float32", replace=True)
    assert len(kept.records()) == 3


@pytest.mark.parametrize("key", ["", "plan", ".hidden", "a/b", "..", "/abs"])
def test_a_key_that_is_no_folder_name_is_refused(small, key):
    store = small()
    with pytest.raises(StoreError, match="is not usable"):
        store.builder.ensure_teacher(key, store.card, dtype="float32")


def test_a_key_that_something_else_has_is_refused(small):
    store = small()
    (store.path / "notes").mkdir()
    (store.path / "notes" / "x.txt").write_text("mine")
    for key in ("notes", "zarr.json"):
        with pytest.raises(StoreError):
            store.builder.ensure_teacher(key, store.card, dtype="float32")
    assert (store.path / "notes" / "x.txt").read_text() == "mine"
    assert [f.name for f in store.path.iterdir() if f.name[0] == "."] == []


def test_a_shard_size_must_divide_where_segments_start(small):
    store = small(rows=10)
    images = store.builder.plan().images
    store.builder.extend_plan(pa.concat_arrays([images, pa.array(["new"], pa.large_string())]))
    with pytest.raises(StoreError, match="--shard-rows 100 does not divide the start of plan segment at row 4096"):
        store.builder.ensure_teacher("seg", store.card, dtype="float32", shard_rows=100)
    assert FeatureStore(store.path).teachers == ["depth"]


def test_a_segment_starts_where_every_teacher_s_shard_does(small):
    store = small(rows=10, shard_rows=3)
    images = store.builder.plan().images
    plan, _ = store.builder.extend_plan(pa.concat_arrays([images, pa.array(["new"], pa.large_string())]))
    assert plan.segments[1].start == 3 * 4096
    assert spans(pending(store.group))[-1] == (4096, 12288, 12289)


def test_two_builders_that_make_one_key_for_different_features(small, monkeypatch):
    """The second finds the key free, and taken when it wants to place its own."""
    store = small()
    create, other = StoreBuilder._create_group, {**store.card, "size": [9, 9], "fingerprint": "other"}

    def late(self, *args):
        monkeypatch.setattr(StoreBuilder, "_create_group", create)
        StoreBuilder(store.path).ensure_teacher("seg", store.card, dtype="float32")
        create(self, *args)

    monkeypatch.setattr(StoreBuilder, "_create_group", late)
    with pytest.raises(StoreError, match=r"made meanwhile .* size is \[8, 8\] there and \[9, 9\] here"):
        store.builder.ensure_teacher("seg", other, dtype="float32")
    assert FeatureStore(store.path)["seg"].card == store.card
    monkeypatch.setattr(StoreBuilder, "_create_group", late)
    assert store.builder.ensure_teacher("gen", store.card, dtype="float32").card == store.card


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_killed_at_any_instant_the_same_command_makes_the_group(small, killed, dtype):
    half_made = 0
    for call in range(50):
        store = small(f"store {call}", rows=6)
        options = {"dtype": dtype, "shard_rows": 4}
        if not killed(lambda s=store, o=options: s.builder.ensure_teacher("seg", s.card, **o), call):
            break
        exists = "seg" in FeatureStore(store.path)
        assert exists == (store.path / "seg" / "features" / "zarr.json").exists()
        half_made += not exists and (store.path / "seg" / "zarr.json").exists()
        group = store.builder.ensure_teacher("seg", store.card, **options)
        assert (group.layout.dtype, group.card) == (dtype, store.card)
        (task, _) = pending(group)
        with store.builder.writer(group).begin(task.shard, (task.start, task.stop), task.segment) as shard:
            for row in range(4):
                shard.append(store.features[row], image_sha256=None)
            shard.commit()
        assert FeatureStore(store.path)["seg"].coverage().valid == 4
    assert 5 < call < 49
    assert half_made > 0


def test_a_group_that_was_begun_for_other_features_says_how_to_remove_it(small, killed):
    store = small()
    other = {**store.card, "size": [9, 9], "fingerprint": "other"}
    call = 0
    while not (store.path / "seg" / "scales" / "zarr.json").exists():  # the last but one of its files
        assert killed(lambda: store.builder.ensure_teacher("seg", store.card, dtype="int8"), call)
        call += 1
    for card, options in ((other, {"dtype": "int8"}), (store.card, {"dtype": "int4"})):
        with pytest.raises(StoreError, match=r"begun for other features .* remove it with: olavlm-cache drop .* seg$"):
            store.builder.ensure_teacher("seg", card, **options)
    assert FeatureStore(store.path).teachers == ["depth"]
    store.builder.drop("seg")
    assert store.builder.ensure_teacher("seg", other, dtype="int4").card == other


def test_a_group_begun_before_the_plan_grew_is_finished_all_the_same(small, killed):
    store = small(rows=10)
    call = 0
    while not (store.path / "seg" / "scales" / "zarr.json").exists():
        assert killed(lambda: store.builder.ensure_teacher("seg", store.card, dtype="int8", shard_rows=4), call)
        call += 1
    images = store.builder.plan().images
    store.builder.extend_plan(pa.concat_arrays([images, pa.array(["new"], pa.large_string())]))
    store.builder.ensure_teacher("seg", store.card, dtype="int8", shard_rows=4)
    for name in ("features", "scales"):
        assert zarr.open_array(store.path / "seg" / name, mode="r").shape[0] == 4100


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_drop_killed_at_any_instant_leaves_all_or_nothing_to_read(small, killed, dtype):
    gone = 0
    for call in range(200):
        store = small(f"store {call}", dtype=dtype).fill()
        if not killed(lambda store=store: store.builder.drop("depth"), call):
            break
        if "depth" in FeatureStore(store.path):
            np.testing.assert_array_equal(store.group.read(range(10))[0], store.expected)
            assert gone == 0
        elif (gone := gone + 1) > 6:
            break
        # The next command makes other features there, and finds none of the old ones.
        if (store.path / "depth" / "zarr.json").exists():
            store.builder.drop("depth")
        group = store.builder.ensure_teacher("depth", store.card, dtype="float16", shard_rows=2)
        assert group.coverage().covered == 0
        assert store.shards() == {}
    assert gone > 6


def test_a_plan_that_grows_while_a_group_is_made_gives_it_room(small, monkeypatch):
    store = small()
    create, images = StoreBuilder._create_group, store.builder.plan().images

    def late(self, *args):
        StoreBuilder(store.path).extend_plan(pa.concat_arrays([images, pa.array(["new"], pa.large_string())]))
        create(self, *args)

    monkeypatch.setattr(StoreBuilder, "_create_group", late)
    store.builder.ensure_teacher("seg", store.card, dtype="float32", shard_rows=4)
    assert zarr.open_array(store.path / "seg" / "features", mode="r").shape[0] == 4100


def test_drop_refuses_while_a_writer_lives_and_not_for_a_dead_one(small, start):
    store = small()
    task = store.task(0)
    with store.writer().begin(0, (0, 4), task.segment):
        for drop in (
            lambda: store.builder.drop("depth"),
            lambda: store.builder.ensure_teacher("depth", store.card, dtype="float16", replace=True),
            lambda: store.builder.extend_plan(pa.array(["another"], pa.large_string()), replace=True),
        ):
            with pytest.raises(StoreError, match=r"is being written \(shard 0\); stop that extraction first"):
                drop()
        assert FeatureStore(store.path).teachers == ["depth"]
    start(lambda child: store.writer().begin(0, (0, 4), task.segment)).wait()
    assert store.lease_file(0).exists()  # the control: a dead writer's lease is there
    store.builder.drop("depth")
    assert FeatureStore(store.path).teachers == []
    assert not (store.path / "depth").exists()


def test_drop_goes_by_the_store_s_clock(small, monkeypatch):
    """On a host whose clock is an hour ahead, writers of other hosts are no less alive."""
    store, real = small().fill(limit=4), time.time
    with store.writer().begin(1, (4, 8), store.task(1).segment):
        (file,) = (store.path / "depth" / "leases").iterdir()
        file.write_text(json.dumps({**json.loads(file.read_text()), "host": "another"}))
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        with pytest.raises(StoreError, match=r"is being written \(shard 1\)"):
            store.builder.drop("depth")
        os.utime(file, (real() - 3600, real() - 3600))
        store.builder.drop("depth")  # the control
    assert FeatureStore(store.path).teachers == []


def test_drop_of_a_teacher_on_another_disk(small, tmp_path):
    """A link in its place: it and what the folder holds go, and the store can have the teacher again."""
    store = small().fill()
    elsewhere = tmp_path / "elsewhere"
    (store.path / "depth").rename(elsewhere)
    (store.path / "depth").symlink_to(elsewhere)
    (elsewhere / "features" / "link").symlink_to(tmp_path)
    assert FeatureStore(store.path)["depth"].coverage().complete
    store.builder.drop("depth")
    assert FeatureStore(store.path).teachers == []
    assert list(elsewhere.iterdir()) == []
    assert list(store.path.glob("*depth*")) == list(store.path.glob(".*depth*")) == []
    store.builder.ensure_teacher("depth", store.card, dtype="float16")
    assert FeatureStore(store.path).teachers == ["depth"]


@pytest.mark.parametrize("key", ["seg", "../other", "plan", "", "."])
def test_drop_of_what_is_no_teacher_touches_nothing(small, tmp_path, key):
    store = small().fill()
    (tmp_path / "other").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=f"has no features '{key}' to drop; it has depth"):
        store.builder.drop(key)
    assert sorted(tmp_path.rglob("*")) == before


def test_pending_of_a_limit_then_of_all(small):
    uninterrupted, store = small("a").fill(), small("b")
    assert spans(pending(store.group)) == [(0, 0, 4), (1, 4, 8), (2, 8, 10)]
    assert spans(pending(store.group, 1)) == [(0, 0, 1)]
    assert spans(pending(store.group, 6)) == [(0, 0, 4), (1, 4, 6)]
    assert spans(pending(store.group, 99)) == [(0, 0, 4), (1, 4, 8), (2, 8, 10)]
    store.fill(limit=6)
    assert store.group.coverage().covered == 6
    assert spans(pending(store.group, 6)) == []
    assert spans(pending(store.group, 5)) == []
    assert spans(pending(store.group)) == [(1, 4, 8), (2, 8, 10)]
    store.fill()
    assert store.shards() == uninterrupted.shards()
    assert [r["revision"] for r in store.records().values()] == [0, 1, 0]


def test_pending_tries_failed_rows_again_only_when_asked_and_only_those_wanted(small):
    store = small().fill({1: "missing", 9: "empty"})
    assert pending(store.group) == []
    assert spans(pending(store.group, retry_failed=True)) == [(0, 0, 4), (2, 8, 10)]
    assert spans(pending(store.group, 5, retry_failed=True)) == [(0, 0, 4)]
    assert spans(pending(store.group, 1, retry_failed=True)) == []


def test_a_retry_of_a_few_rows_gives_up_none_of_the_committed(small):
    store = small().fill({0: "missing"})
    assert spans(pending(store.group, 2, retry_failed=True)) == [(0, 0, 4)]
    store.fill(limit=2, retry_failed=True)
    np.testing.assert_array_equal(store.group.read(range(10))[0], store.features)


def test_pending_of_damaged_shards(small):
    store = small().fill()
    store.record_file(0).write_text("{")
    store.shard_file(2).unlink()
    assert spans(pending(store.group)) == [(0, 0, 4), (2, 8, 10)]
    assert spans(pending(store.group, 2)) == [(0, 0, 2)]
    store.fill()
    np.testing.assert_array_equal(store.group.read(range(10))[0], store.features)


def test_a_small_limit_gives_up_no_row_of_a_shard_whose_replacement_was_not_finished(small):
    """Rows beyond it may be there, put by, and nowhere else."""
    store = small().fill({1: "empty"})

    def fail(step: str) -> None:
        if step == "place":
            raise KeyboardInterrupt

    task = store.task(0, limit=2, retry_failed=True)
    with store.writer(fail).begin(0, (task.start, task.stop), task.segment) as shard:
        for row in range(4):
            parts, sha256 = shard.carry_over(row) or (None, None)
            shard.append_stored(parts, image_sha256=sha256, reason="empty")
        with pytest.raises(KeyboardInterrupt):
            shard.commit()
    assert spans(pending(store.group, 2)) == [(0, 0, 4)]
    store.builder.writer(store.group).sweep(0)  # as `olavlm-cache gc` does
    assert spans(pending(store.group, 2)) == [(0, 0, 4)]
    os.truncate(store.shard_file(1), 10)
    assert spans(pending(store.group, 5)) == [(0, 0, 4), (1, 4, 8)]


PROGRAM = """
import sys
from olavlm.cache import StoreBuilder
card = {"tokens": 3, "dim": 4, "fingerprint": "f"}
print("ready", flush=True)
sys.stdin.readline()
builder = StoreBuilder(sys.argv[1])
import pyarrow as pa
builder.extend_plan(pa.array(["a", "b"], pa.large_string()))
print(builder.ensure_teacher("depth", card, dtype="float16").fingerprint)
"""


def test_three_processes_make_one_store(tmp_path):
    path = tmp_path / "store"
    command = [sys.executable, "-c", PROGRAM, str(path)]
    builders = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    assert [b.stdout.readline() for b in builders] == ["ready\n"] * 3
    for b in builders:
        b.stdin.write("go\n")
        b.stdin.flush()
    assert [b.communicate() for b in builders] == [("f\n", "")] * 3
    assert FeatureStore(path).teachers == ["depth"]
    assert FeatureStore(path).plan["image"].to_pylist() == ["a", "b"]
    assert sorted(f.name for f in path.iterdir()) == ["depth", "plan", "zarr.json"]
