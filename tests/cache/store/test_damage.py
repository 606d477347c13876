"""Damage to any byte is found, and no wrong value is read."""

import os
import shutil

import numpy as np
import pytest

from olavlm.cache import CorruptFeatures, ShardTask, TeacherFeatures
from olavlm.cache.row_reader import RowReader


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


def test_a_flipped_bit_in_any_byte_is_found_and_no_wrong_value_is_read(small, rng, storage):
    """In a row or its checksum by reading that row; in the index by reading any row of the shard, the first time."""
    store = small(rows=8, shape=(2, 4), **storage).fill({1: "missing"})
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


def test_an_index_damaged_under_a_reader_is_found_by_the_next(small, storage):
    """Who has checked it reads by the record, and every row's own checksum."""
    store = small(rows=4, **storage).fill()
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


def test_two_shards_with_their_files_exchanged(small, storage):
    store = small(rows=8, **storage, shape=(3, 8))
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
    depth._reader._files.clear()
    for reader in (depth, store.group):
        with pytest.raises(CorruptFeatures):
            reader[0]


def test_a_shard_replaced_between_every_look_and_every_read_is_no_damage(small, monkeypatch):
    """The reader looks again as often as there is a newer record, and not once more."""
    store = small(rows=4).fill()
    depth, features, left = store.group, store.features, [5]
    read = RowReader._read_range

    def replaced_first(self, *where):
        if left[0]:
            left[0] -= 1
            store.commit(ShardTask("depth", 0, 0, 4, depth.plan.segments[0].hash), features=features + left[0])
        return read(self, *where)

    monkeypatch.setattr(RowReader, "_read_range", replaced_first)
    np.testing.assert_array_equal(depth[1], features[1])
    assert (left, store.group.record(0).revision) == ([0], 5)
    flip(store.shard_file(0), 400)  # row 1: real damage
    left[0] = 3
    np.testing.assert_array_equal(store.group[1], features[1])
    flip(store.shard_file(0), 500)
    with pytest.raises(CorruptFeatures):
        store.group[1]
