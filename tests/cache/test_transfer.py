"""Merging and converting: what arrives is what was there, and what differs is refused."""

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import FeatureStore, StoreError, convert, merge, pending, verify
from olavlm.cache.codec import CODECS

BAD = {5: "missing"}


def test_two_halves_make_the_whole(small):
    whole, left, right = small("whole").fill(BAD), small("left"), small("right")
    left.commit(left.task(0), BAD)
    for shard in (1, 2):
        right.commit(right.task(shard), BAD)
    done = merge(str(left.path), [str(right.path)])
    assert [(t.key, t.copied, t.already_there, t.held) for t in done] == [("depth", 2, 0, 0)]
    assert left.shards() == whole.shards()
    assert left.records() == whole.records()
    assert list(verify(left.group)) == []
    assert [(t.copied, t.already_there) for t in merge(str(left.path), [str(right.path), str(whole.path)])] == [
        (0, 2),
        (0, 3),
    ]


@pytest.mark.parametrize(("dtype", "compress"), [("float16", "none"), ("int8", "none"), ("int4", "zstd")])
def test_into_a_store_that_is_not_there_yet(small, tmp_path, dtype, compress):
    store = small(dtype=dtype, compress=compress).fill(BAD)
    merge(str(tmp_path / "new"), [str(store.path)])
    new = FeatureStore(tmp_path / "new")
    assert new.rows.hash == store.builder.plan().hash
    for shard in range(3):
        assert new["depth"].record(shard).comparable() == store.group.record(shard).comparable()
        for array in store.group.layout.arrays.values():
            assert (
                array.file(new["depth"].folder, shard).read_bytes()
                == array.file(store.group.folder, shard).read_bytes()
            )
    np.testing.assert_array_equal(new["depth"].read(range(10))[0], store.group.read(range(10))[0])


def test_more_valid_rows_win_and_the_target_s_stand_otherwise(small):
    store, other = small("a").fill(BAD), small("b").fill()
    merge(str(store.path), [str(other.path)])
    assert store.group.coverage().quarantined == 0
    assert store.records()[1]["revision"] == 1
    merge(str(other.path), [str(small("c").fill(BAD).path)])
    assert other.records()[1]["revision"] == 0
    fewer = small("e").fill(BAD, limit=6)  # its shard 1 has one valid row more than none of four
    merge(str(small("f").fill(dict.fromkeys(range(4, 8), "missing")).path), [str(fewer.path)])
    assert FeatureStore(fewer.path.parent / "f")["depth"].coverage().covered == 10  # no committed row is given up
    partial = small("d").fill(limit=9)
    merge(str(partial.path), [str(other.path)])
    assert partial.group.coverage().complete


@pytest.mark.parametrize(("dtype", "compress"), [("float32", "none"), ("int8", "zstd")])
def test_stores_of_which_each_has_other_valid_rows_make_the_whole(small, dtype, compress):
    options = {"rows": 8, "shard_rows": 8, "dtype": dtype, "compress": compress}
    whole = small("whole", **options).fill()
    even = small("even", **options).fill(dict.fromkeys(range(1, 8, 2), "missing"))
    odd = small("odd", **options).fill(dict.fromkeys(range(0, 8, 2), "truncated"))
    for target, source in (("one", [even, odd]), ("two", [odd, even])):
        done = merge(str(even.path.parent / target), [str(store.path) for store in source])
        assert [t.copied for t in done] == [1, 1]
        merged = FeatureStore(even.path.parent / target)["depth"]
        assert merged.coverage().valid == 8
        for name, array in merged.layout.arrays.items():
            assert array.file(merged.folder, 0).read_bytes() == whole.shard_file(0, name).read_bytes()
        assert merged.record(0).images_sha256 == whole.group.record(0).images_sha256
        assert list(verify(merged)) == []
        again = merge(str(even.path.parent / target), [str(even.path), str(odd.path)])
        assert [(t.copied, t.already_there) for t in again] == [(0, 1), (0, 1)]


def test_merging_gives_up_no_valid_row_of_the_target(small):
    store = small("a", rows=8, shard_rows=8).fill({2: "empty", 3: "missing", 7: "empty"})
    other = small("b", rows=8, shard_rows=8).fill({0: "missing", 4: "missing", 7: "truncated"}, limit=8)
    merge(str(store.path), [str(other.path)])
    assert [(row, e.reason) for row, e in store.group.failures()] == [(7, "empty")]
    np.testing.assert_array_equal(store.group.read(range(7))[0], store.features[:7])
    fewer = small("c", rows=8, shard_rows=8).fill({0: "empty"}, limit=3)  # and the other way round
    merge(str(other.path), [str(fewer.path)])
    assert [(row, e.reason) for row, e in other.group.failures()] == [(0, "missing"), (4, "missing"), (7, "truncated")]
    merge(str(fewer.path), [str(other.path)])
    assert fewer.group.coverage().valid == 5


def test_a_merge_killed_before_any_change_of_a_name_is_finished_by_the_same_command(small, killed):
    """The target's rows are in no other store, and the source has fewer."""
    options = {"rows": 8, "shard_rows": 8}
    other = small("other", **options).fill({0: "missing", 2: "missing"}, limit=5)
    merged = small("merged", **options).fill({1: "empty", 7: "missing"})
    merge(str(merged.path), [str(other.path)])
    assert [row for row, _ in merged.group.failures()] == [7]
    missing = 0
    for call in range(100):
        store = small(f"store {call}", **options).fill({1: "empty", 7: "missing"})
        if not killed(lambda store=store: merge(str(store.path), [str(other.path)]), call):
            break
        missing += store.group.record(0) is None
        merge(str(store.path), [str(other.path)])
        assert store.shards() == merged.shards()
        assert {**store.records()[0], "revision": 1} == merged.records()[0]
    assert 15 < call < 99
    assert missing >= 3


def test_a_damaged_row_of_the_target_is_not_given_up_for_a_quarantined_one(small):
    store = small("a", rows=4).fill({1: "missing"})
    other = small("b", rows=4).fill({0: "missing"})
    data = bytearray(store.shard_file(0).read_bytes())
    data[7] ^= 1  # of row 0
    store.shard_file(0).write_bytes(data)
    (done,) = merge(str(store.path), [str(other.path)])
    assert done.copied == 0
    assert "row 0 is damaged, and the source has no valid one either" in done.damaged[0]
    assert store.shard_file(0).read_bytes() == data
    merge(str(store.path), [str(small("c", rows=4).fill().path)])
    np.testing.assert_array_equal(store.group.read(range(4))[0], store.features)


def test_a_row_that_the_dtype_cannot_hold_is_told_and_not_copied_again(small, tmp_path):
    store = small(rows=8)
    store.features[5, 1, 2] = 1e6
    store.fill({6: "missing"})
    for copied, there in ((2, 0), (0, 2)):
        (done,) = convert(str(store.path), str(tmp_path / "new"), dtype="float16")
        assert (done.copied, done.already_there) == (copied, there)
        assert done.quarantined == [{"row": 5, "image": "photos/00005.jpg", "reason": "overflow", "detail": ""}]
    store.fill(retry_failed=True)  # the control: what else changes is followed
    (done,) = convert(str(store.path), str(tmp_path / "new"), dtype="float16")
    assert (done.copied, done.already_there, len(done.quarantined)) == (1, 1, 1)
    assert [row for row, _ in FeatureStore(tmp_path / "new")["depth"].failures()] == [5]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rows": 9}, "has another plan than .*9 images in 1 segments there, .*10 images in 1 segments here"),
        ({"dtype": "float16"}, "dtype is float32 there and float16 here"),
        ({"shard_rows": 2}, "shard rows are 4 there and 2 here"),
        ({"compress": "zstd"}, "compression is none there and zstd here"),
        ({"shape": (3, 5)}, "dim is 4 there and 5 here"),
    ],
)
def test_what_is_not_the_same_is_refused(small, options, rule):
    store, other = small("a").fill(), small("b", **options).fill()
    before = store.shards()
    with pytest.raises(StoreError, match=rule):
        merge(str(store.path), [str(other.path)])
    assert store.shards() == before


def test_damage_in_a_source_is_not_passed_on(small):
    store, other = small("a"), small("b").fill()
    data = bytearray(other.shard_file(1).read_bytes())
    data[7] ^= 1
    other.shard_file(1).write_bytes(data)
    other.record_file(2).write_bytes(b"{")
    (done,) = merge(str(store.path), [str(other.path)])
    row, record = sorted(done.damaged)
    assert "000002.0.json is damaged" in record
    assert "row 4 (photos/00004.jpg)" in row
    assert done.copied == 1
    assert sorted(store.records()) == [0]
    assert list(verify(store.group)) == []
    assert store.staged() == []


def test_a_row_that_one_has_damaged_does_not_keep_the_others_of_its_shard_away(small):
    """Rows 0 to 3: quarantined is 1 in the target, and 2 too; the source has 0 and 2 damaged."""
    store, other = small("a", rows=4).fill({1: "missing", 2: "missing"}), small("b", rows=4).fill()
    data = bytearray(other.shard_file(0).read_bytes())
    for row in (0, 2):
        data[row * (other.features[0].nbytes + 4) + 7] ^= 1  # each with its checksum
    other.shard_file(0).write_bytes(data)
    (done,) = merge(str(store.path), [str(other.path)])
    assert done.copied == 1
    assert [said.partition(" (")[0].rpartition(": ")[2] for said in done.damaged] == ["row 2"]
    values, valid = store.group.read(range(4))
    assert valid.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(values[valid], store.features[valid])
    written = store.shards()
    (done,) = merge(str(store.path), [str(other.path)])  # which has nothing more to offer
    assert (done.copied, len(done.damaged)) == (0, 1)
    assert store.shards() == written


def test_stores_of_which_one_s_plan_is_the_beginning_of_the_other_s(small):
    """In any order, and again."""
    part, whole, new = small("part", rows=4).fill(), small("whole", rows=4), small("new", rows=0)
    more = pa.array(["more.jpg"], pa.large_string())
    whole.builder.extend_plan(pa.concat_arrays([whole.builder.plan().segments[0].images, more]))
    for _ in range(2):
        merge(str(new.path), [str(part.path), str(whole.path)])
    assert new.builder.plan().hash == whole.builder.plan().hash != part.builder.plan().hash
    np.testing.assert_array_equal(FeatureStore(new.path)["depth"].read(range(4))[0], part.features)


def test_a_plan_that_grew_within_a_shard_of_the_target_is_refused(small):
    store, other = small("a", rows=6, shard_rows=5), small("b", rows=6, shard_rows=4)
    images = other.builder.plan().segments[0].images
    other.builder.extend_plan(pa.concat_arrays([images, pa.array(["more.jpg"], pa.large_string())]))
    plan = store.builder.plan().hash
    with pytest.raises(
        StoreError, match=r"has shards of 5 rows, and images were added to the other plan at row 4096, "
    ):
        merge(str(store.path), [str(other.path)])
    assert store.builder.plan().hash == plan
    assert pending(store.group)  # it is whole


def test_a_shard_that_another_is_writing_is_told_and_left_alone(small):
    store, other = small("a"), small("b").fill()
    task = store.task(1)
    with store.writer().begin(1, (task.start, task.stop), task.segment):
        (done,) = merge(str(store.path), [str(other.path)])
    assert (done.copied, done.held) == (2, 1)
    assert [t.shard for t in pending(store.group)] == [1]


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_converting_is_encoding_what_is_read(small, tmp_path, dtype, compress):
    store = small(shape=(5, 8)).fill(BAD)
    (done,) = convert(str(store.path), str(tmp_path / "new"), dtype=dtype, compress=compress)
    assert (done.copied, done.held) == (3, 0)
    new, codec = FeatureStore(tmp_path / "new")["depth"], CODECS[dtype]
    assert (new.layout.dtype, new.layout.compress, new.card) == (dtype, compress, store.card)
    values, valid = new.read(range(10))
    assert valid.tolist() == [row not in BAD for row in range(10)]
    fidelities = []
    for row in np.flatnonzero(valid):
        parts, _, fidelity = codec.encode(store.features[row])
        np.testing.assert_array_equal(values[row], codec.decode(parts))
        fidelities.append(fidelity)
    assert new.failure(5).reason == "missing"
    statistics = new.info()["statistics"]
    assert statistics["cosine_worst"] == min(f.cosine for f in fidelities)
    assert statistics["cosine_mean"] == pytest.approx(np.mean([f.cosine for f in fidelities]), abs=1e-12)
    assert statistics["relative_error_worst"] == max(f.relative_error for f in fidelities)
    assert [r.images_sha256 for r in map(new.record, range(3))] == [
        r.images_sha256 for r in map(store.group.record, range(3))
    ]
    assert list(verify(new)) == []


def test_an_archive_loses_nothing_and_comes_back(small, tmp_path):
    store = small(dtype="float16").fill(BAD)
    convert(str(store.path), str(tmp_path / "archive"), compress="zstd")
    convert(str(tmp_path / "archive"), str(tmp_path / "back"))
    back = FeatureStore(tmp_path / "back")["depth"]
    for shard in range(3):
        file = back.layout.arrays["features"].file(back.folder, shard)
        assert file.read_bytes() == store.shard_file(shard).read_bytes()
        assert back.record(shard).comparable() == store.group.record(shard).comparable()


def test_converting_again_finishes_and_follows_what_came_later(small, tmp_path):
    store = small().fill(BAD, limit=6)
    target = str(tmp_path / "new")
    convert(str(store.path), target, dtype="int8")
    assert FeatureStore(target)["depth"].coverage().covered == 6
    store.fill(BAD)
    (done,) = convert(str(store.path), target, dtype="int8")
    assert (done.copied, done.already_there) == (2, 1)
    store.fill(retry_failed=True)
    (done,) = convert(str(store.path), target, dtype="int8")
    assert (done.copied, done.already_there) == (1, 2)
    assert FeatureStore(target)["depth"].coverage().valid == 10


def test_what_is_quantised_is_not_quantised_again(small, tmp_path):
    store = small(dtype="int8").fill()
    with pytest.raises(StoreError, match="is stored as int8: convert from float16 or float32, or keep the dtype"):
        convert(str(store.path), str(tmp_path / "new"), dtype="int4")
    convert(str(store.path), str(tmp_path / "new"), compress="zstd")
    np.testing.assert_array_equal(
        FeatureStore(tmp_path / "new")["depth"].read(range(10))[0], store.group.read(range(10))[0]
    )


def test_a_source_replaced_while_it_is_copied_is_told(small, tmp_path, monkeypatch):
    store = small(rows=4).fill({0: "missing"})
    group, read = store.group, type(store.group).read_stored

    def replaced(self, rows, **options):
        monkeypatch.setattr(type(group), "read_stored", read)
        store.fill(retry_failed=True)
        return read(self, rows, **options)

    monkeypatch.setattr(type(group), "read_stored", replaced)
    with pytest.raises(StoreError, match="was replaced while it was copied"):
        convert(str(store.path), str(tmp_path / "new"))
    convert(str(store.path), str(tmp_path / "new"))
    assert FeatureStore(tmp_path / "new")["depth"].coverage().valid == 4
