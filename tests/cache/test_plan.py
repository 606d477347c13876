"""The plan: rows stay where they are, its name depends on its content alone, and another dataset is refused."""

import hashlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from olavlm.cache import FeatureStore, MissingFeatures, Plan, PlanError, StoreBuilder, files, pending
from olavlm.cache.plan import SEGMENT_ALIGNMENT, Segment


def strings(*values: str) -> pa.LargeStringArray:
    return pa.array(values, pa.large_string())


def plan_of(*segments: tuple[int, tuple[str, ...]]) -> Plan:
    return Plan(tuple(Segment(start, strings(*images)) for start, images in segments))


def hash_by_the_rule(start: int, images: list[str]) -> str:
    """As plan.py's docstring has it: start row, then the paths as Arrow offsets and UTF-8."""
    data = [i.encode() for i in images]
    offsets = [sum(map(len, data[:i])) for i in range(len(data) + 1)]
    head = f"olavlm plan segment 1\n{start} {len(images)}\n".encode()
    return hashlib.sha256(head + struct.pack(f"<{len(offsets)}q", *offsets) + b"".join(data)).hexdigest()


def test_the_hash_is_the_documented_one_and_never_changes():
    segment = Segment(0, strings("a.jpg", "b/é.jpg"))
    assert segment.hash == hash_by_the_rule(0, ["a.jpg", "b/é.jpg"])
    assert segment.hash == "f17af9a89b87c42e58f8450829a99f03db48f5da968f95217915ee3865278652"
    plan = Plan((segment, Segment(4096, strings("c"))))
    second = hash_by_the_rule(4096, ["c"])
    assert plan.hash == hashlib.sha256(f"{segment.hash}\n{second}".encode()).hexdigest()
    assert plan.hash == "eae59dc8a90aa39677d7702baa22bc3d0c50ccb3bc8ccbfd3323752e9f3c5c1b"


def test_the_hash_tells_plans_apart():
    plans = [(0, ("a", "b")), (0, ("b", "a")), (0, ("ab",)), (0, ("ab", "")), (0, ("", "ab")), (4096, ("a", "b"))]
    assert len({plan_of(p).hash for p in plans} | {plan_of().hash}) == len(plans) + 1


def test_the_hash_is_of_the_content_however_arrow_holds_it():
    images = [f"{i}é.jpg" for i in range(20)]
    expected = hash_by_the_rule(0, images[5:15])
    whole = strings(*images)
    views = [
        whole[5:15],
        pa.concat_arrays([whole[5:9], whole[9:15]]),
        pa.concat_arrays([whole[0:0], whole[5:15]]),
        whole.take(pa.array(range(5, 15))),
        whole.filter(pa.array([5 <= i < 15 for i in range(20)])),
        pickle.loads(pickle.dumps(whole[5:15])),
    ]
    assert [Segment(0, view).hash for view in views] == [expected] * len(views)


def test_rows_images_and_look_ups_over_two_segments():
    plan = plan_of((0, ("b", "a", "é")), (4096, ("c", "d")))
    assert plan.num_images == 5
    assert plan.extent == 4098
    assert plan.rows.tolist() == [0, 1, 2, 4096, 4097]
    assert plan.images.to_pylist() == ["b", "a", "é", "c", "d"]
    assert plan.table.to_pydict() == {"row": plan.rows.tolist(), "image": plan.images.to_pylist()}
    assert [plan.row_of(i) for i in ("b", "é", "d")] == [0, 2, 4097]
    assert [plan.image_of(r) for r in (0, 2, 4097)] == ["b", "é", "d"]
    for row in (-1, 3, 4095, 4098):
        with pytest.raises(MissingFeatures, match=f"row {row} holds no image"):
            plan.segment_of(row)
    with pytest.raises(MissingFeatures, match="'z' is not in the plan of 5 images"):
        plan.row_of("z")


def test_rows_of_many_in_their_order_with_repeats_and_strangers():
    plan = plan_of((0, ("b", "a", "é")), (4096, ("c", "d")))
    for wanted in (["d", "a", "x", "a"], strings("d", "a", "x", "a"), pa.chunked_array([["d", "a"], ["x", "a"]])):
        rows = plan.rows_of(wanted)
        assert rows.dtype == np.int64
        assert rows.tolist() == [4097, 1, -1, 1]
    assert plan.rows_of([]).tolist() == []
    assert plan.rows_of(["x"]).tolist() == [-1]


def test_a_batch_is_looked_up_as_the_whole_plan_is(rng):
    alphabet = list("abc/._é猫\U0001f418")
    names = list(dict.fromkeys("".join(rng.choice(alphabet, rng.integers(1, 12))) for _ in range(9000)))
    half = len(names) // 2
    plan = plan_of((0, tuple(names[:half])), (8192, tuple(names[half:])))
    everything = plan.rows_of(strings(*names))
    assert everything.tolist() == plan.rows.tolist()
    assert [plan.row_of(name) for name in names[:100]] == everything[:100].tolist()  # looked for, and then sorted
    with pytest.raises(MissingFeatures, match="is not in the plan"):
        plan.row_of("~")
    for at in rng.integers(0, len(names), 300):
        assert plan.rows_of([names[at], names[at] + "~"]).tolist() == [everything[at], -1]
        assert plan.rows_of(strings(names[at])).tolist() == [plan.row_of(names[at])]


def test_an_empty_plan(tmp_path):
    plan = Plan.load(tmp_path / "absent")
    assert (plan.num_images, plan.extent, plan.rows.tolist(), plan.images.to_pylist()) == (0, 0, [], [])
    assert plan.hash == hashlib.sha256(b"").hexdigest()
    assert plan.rows_of(["a"]).tolist() == [-1]
    assert plan.table.num_rows == 0
    assert plan.growth(strings()) is None
    with pytest.raises(MissingFeatures):
        plan.row_of("a")
    with pytest.raises(MissingFeatures):
        plan.segment_of(0)


def test_written_and_read_back(tmp_path):
    plan = plan_of((0, ("b", "é/ü.jpg")), (4096, ("c",)))
    for i, segment in enumerate(plan.segments):
        segment.write(tmp_path / f"{i:05d}.parquet")
    again = Plan.load(tmp_path)
    assert again.hash == plan.hash
    assert again.table.equals(plan.table)
    assert pq.read_table(tmp_path / "00001.parquet").column("row").to_pylist() == [4096]
    with pytest.raises(FileExistsError):
        plan.segments[1].write(tmp_path / "00000.parquet")


def test_growth_starts_at_the_next_multiple():
    plan = plan_of((0, ("a", "b")))
    assert plan.growth(strings("a", "b")) is None
    assert plan.growth(strings("b", "a")) is None  # a dataset in another order has the same images
    grown = plan.growth(strings("c", "a", "d", "b"))
    assert (grown.start, grown.images.to_pylist()) == (SEGMENT_ALIGNMENT, ["c", "d"])
    assert plan_of().growth(strings("a")).start == 0
    assert plan.growth(strings("a", "b", "c"), [128, 3]).start == 3 * SEGMENT_ALIGNMENT  # least common multiple
    full = Plan((Segment(0, strings(*map(str, range(4096)))),))
    assert full.growth(strings(*map(str, range(4097)))).start == 4096
    over = Plan((Segment(0, strings(*map(str, range(4097)))),))
    assert over.growth(strings(*map(str, range(4098)))).start == 8192


def test_another_dataset_is_refused_with_the_difference(tmp_path):
    plan = plan_of((0, ("a", "b", "c")))
    with pytest.raises(PlanError) as e:
        plan.growth(strings("b", "x", "y"))
    assert "2 of its 3 images are not in the dataset (first: 'a')" in str(e.value)
    assert "2 images of the dataset are not in the plan" in str(e.value)
    assert "--replace" in str(e.value)


def test_a_gap_in_the_numbering_is_refused(tmp_path):
    for name in ("00000", "00002"):
        Segment(0, strings(name)).write(tmp_path / f"{name}.parquet")
    with pytest.raises(PlanError, match=r"numbered without gaps, found \['00000.parquet', '00002.parquet'\]"):
        Plan.load(tmp_path)
    (tmp_path / "00000.parquet").unlink()
    with pytest.raises(PlanError, match="numbered without gaps"):
        Plan.load(tmp_path)


def test_damage_anywhere_is_found_or_does_no_harm(tmp_path):
    images = ["photos/a.jpg", "photos/b.jpg"]
    file = tmp_path / "00000.parquet"
    Segment(0, strings(*images)).write(file)
    data, found = file.read_bytes(), 0
    for at in range(0, len(data), 2):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
        try:
            segment = Segment.read(file)
        except PlanError as e:
            found += 1
            assert str(file) in str(e)  # noqa: PT017
        else:
            assert (segment.start, segment.images.to_pylist()) == (0, images)
    assert found > len(data) // 4
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(PlanError, match="damaged"):
            Segment.read(file)


def test_a_parquet_file_of_something_else_is_damage(tmp_path):
    tables = [{"x": [1]}, {"row": [0], "image": ["a"]}, {"row": [], "image": []}, {"row": ["a"], "image": [1]},
              {"row": ["a"], "image": ["a"]}, {"row": [0, None], "image": ["a", "b"]}]  # fmt: skip
    for columns in tables:
        for named in ({}, {"olavlm.segment_sha256": "0" * 64}):
            pq.write_table(pa.table(columns).replace_schema_metadata(named), tmp_path / "00000.parquet")
            with pytest.raises(PlanError, match="is damaged"):
                Plan.load(tmp_path)


def test_a_dataset_that_grows_keeps_its_rows_and_gives_arrays_room(small):
    store = small(rows=10).fill()
    before, bytes_before = store.records(), store.shards()
    plan, added = store.builder.extend_plan(strings(*FeatureStore(store.path).plan["image"].to_pylist(), "new"))
    assert (added, plan.num_images, plan.extent) == (1, 11, 4097)
    array = zarr.open_array(store.path / "depth" / "features", mode="r")
    assert array.shape == (4100, 3, 4)  # whole shards of 4
    assert store.records() == before
    assert store.shards() == bytes_before
    group = store.group
    assert group.shape == (4097, 3, 4)
    assert (group.coverage().covered, group.coverage().missing) == (10, 1)
    assert [(t.shard, t.start, t.stop, t.segment) for t in pending(group)] == [
        (1024, 4096, 4097, plan.segments[1].hash)
    ]
    assert store.builder.extend_plan(plan.images) == (plan, 0)


def test_a_replaced_plan_takes_all_features_along(small):
    store = small(rows=10).fill()
    store.builder.extend_plan(pa.concat_arrays([store.builder.plan().images, strings("new")]))
    with pytest.raises(PlanError):
        store.builder.extend_plan(strings("x"))
    assert len(store.records()) == 3
    plan, added = store.builder.extend_plan(strings("x", "y"), replace=True)
    assert (added, plan.images.to_pylist()) == (2, ["x", "y"])
    opened = FeatureStore(store.path)
    assert (opened.teachers, opened.plan["image"].to_pylist()) == ([], ["x", "y"])


def test_a_crash_while_a_plan_is_replaced_leaves_no_half_plan(small, monkeypatch):
    store = small(rows=10)
    store.builder.extend_plan(pa.concat_arrays([store.builder.plan().images, strings("new")]))

    def killed(folder):
        next(iter(sorted(folder.rglob("0*.parquet"))), folder / "zarr.json").unlink()  # the first of two segments
        if "plan" in folder.name:
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.builder.extend_plan(strings("x"), replace=True)
    plan, added = StoreBuilder(store.path).extend_plan(strings("x"))
    assert (added, plan.images.to_pylist()) == (1, ["x"])


BUILDER = """
import sys, pyarrow as pa
from olavlm.cache import PlanError, StoreBuilder
path, first, stop = sys.argv[1], *map(int, sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
images = pa.array([f"photos/{i:05d}.jpg" for i in range(stop)], pa.large_string())
for end in range(first, stop + 1, 5):
    try:
        StoreBuilder(path).extend_plan(images[:end])
    except PlanError:  # the other is ahead: its plan has images that these lack
        assert end < stop
print(StoreBuilder(path).plan().hash)
"""


def test_two_builders_at_once_end_with_one_plan(small):
    """Both grow the same dataset, in steps; whoever is second takes what the first added."""
    store = small(rows=5)
    command = [sys.executable, "-c", BUILDER, str(store.path), "10", "40"]
    builders = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    assert [b.stdout.readline() for b in builders] == ["ready\n"] * 2
    for b in builders:
        b.stdin.write("go\n")
        b.stdin.flush()
    hashes = {b.communicate()[0].strip() for b in builders}
    assert [b.returncode for b in builders] == [0, 0]
    plan = StoreBuilder(store.path).plan()
    assert hashes == {plan.hash}
    assert plan.num_images == len(set(plan.images.to_pylist())) == 40
    assert [s.start % SEGMENT_ALIGNMENT for s in plan.segments] == [0] * len(plan.segments)
    array = zarr.open_array(store.path / "depth" / "features", mode="r")
    assert array.shape[0] == -(-plan.extent // 4) * 4


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_array_s_size_is_that_of_the_latest_plan_whoever_resized_last(small, monkeypatch, dtype):
    """A builder that read the metadata before another grew it writes the smaller size last."""
    store = small(rows=5, dtype=dtype)
    first, second = (StoreBuilder(store.path) for _ in range(2))
    replace, images = files.replace, [f"photos/{i:05d}.jpg" for i in range(7)]

    def late(file, content):
        monkeypatch.setattr(files, "replace", replace)
        second.extend_plan(strings(*images))
        assert [rows_of(store, name) for name in store.arrays] == [8196] * len(store.arrays)
        replace(file, content)
        assert min(rows_of(store, name) for name in store.arrays) == 4100  # the fault
        assert store.group.layout.dtype == dtype  # it is readable all the while

    monkeypatch.setattr(files, "replace", late)
    first.extend_plan(strings(*images[:6]))
    assert StoreBuilder(store.path).plan().extent == 8193
    assert [rows_of(store, name) for name in store.arrays] == [8196] * len(store.arrays)


def rows_of(store, name: str) -> int:
    return zarr.open_array(store.path / "depth" / name, mode="r").shape[0]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_killed_at_any_instant_of_a_growth_the_store_is_read_and_the_same_command_ends_it(small, killed, dtype):
    images, behind = strings(*(f"photos/{i:05d}.jpg" for i in range(6))), 0
    for call in range(50):
        store = small(f"store {call}", rows=5, dtype=dtype).fill()
        if not killed(lambda store=store: StoreBuilder(store.path).extend_plan(images), call):
            break
        np.testing.assert_array_equal(store.group.read(range(5))[0], store.expected)
        behind += len({rows_of(store, name) for name in store.arrays}) == 2
        StoreBuilder(store.path).extend_plan(images)
        assert store.builder.plan().extent == 4097
        assert [rows_of(store, name) for name in store.arrays] == [4100] * len(store.arrays)
        np.testing.assert_array_equal(store.group.read(range(5))[0], store.expected)
        assert store.group.coverage().missing == 1
    assert 2 < call < 49
    assert (behind > 0) == (dtype == "int8")  # the control: one array has grown, the other has not
