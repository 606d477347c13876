"""Shard files: byte for byte zarr-python's, and readable by it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from olavlm.cache import Layout, StoreError
from olavlm.cache.shard import crc32c, shard_file

PATTERNS = {  # which of the rows 0..5 hold features; shards of 4, so that the second is partial
    "all valid": [True] * 6,
    "none valid": [False] * 6,
    "first shard empty": [False] * 4 + [True, False],
    "holes": [True, False, False, True, False, True],
    "last only": [False] * 5 + [True],
}


def test_crc32c_is_castagnoli_s():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of its definition
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c(np.zeros((2, 4), np.float32)) == 0x8A9136AA  # of 32 zero bytes, RFC 3720


def test_sizes_by_hand():
    layout = Layout(4, 3, 5, "float16")
    assert (layout.row_bytes, layout.slot_bytes) == (30, 34)
    assert layout.file_bytes(3) == 3 * 34 + 4 * 16 + 4
    assert layout.file_bytes(0) == 0
    assert [layout.shard_of(r) for r in (0, 3, 4)] == [0, 0, 1]
    assert [layout.padded(r) for r in (0, 1, 4, 5)] == [0, 4, 4, 8]
    index = np.frombuffer(layout.index([1, 3])[:-4], "<u8").reshape(4, 2).tolist()
    assert index == [[2**64 - 1] * 2, [0, 34], [2**64 - 1] * 2, [34, 34]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(3, 4), (1, 7), (16, 1)])
def test_the_bytes_are_those_of_zarr_python(small, tmp_path, shape, dtype, pattern):
    valid = PATTERNS[pattern]
    store = small(rows=6, shape=shape, dtype=dtype).fill({r: "missing" for r in range(6) if not valid[r]})
    theirs = tmp_path / "theirs"
    array = store.group.layout.create_array(zarr.open_group(theirs, mode="w", zarr_format=3), "features", 6)
    values = store.features.astype(dtype)
    values[~np.array(valid)] = np.nan
    array[0:4], array[4:6] = values[0:4], values[4:6]
    root = theirs / "features"
    expected = {str(f.relative_to(root / "c")): f.read_bytes() for f in root.glob("c/*/0/0")}
    assert store.shards() == expected
    assert len(expected) == any(valid[:4]) + any(valid[4:])
    ours, others = (json.loads((a / "zarr.json").read_text()) for a in (store.group.array, root))
    assert ours == others


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_zarr_reads_values_and_nan(small, pattern):
    valid = np.array(PATTERNS[pattern])
    store = small(rows=6, dtype="float16").fill({r: "missing" for r in range(6) if not valid[r]})
    read = zarr.open(store.path, mode="r")["depth/features"]
    assert (read.shape, read.dtype) == ((8, 3, 4), np.float16)
    np.testing.assert_array_equal(read[:6][valid], store.features[valid].astype(np.float16))
    assert np.isnan(read[:6][~valid]).all()
    assert np.isnan(read[6:]).all()
    for row in np.flatnonzero(valid):
        np.testing.assert_array_equal(read[row], store.features[row])


def test_a_shard_that_is_not_there_reads_as_nan_never_as_zeros(small):
    store = small(rows=6)
    store.commit(store.task(1))
    read = zarr.open(store.path, mode="r")["depth/features"]
    assert np.isnan(read[:4]).all()
    np.testing.assert_array_equal(read[4:6], store.features[4:])
    assert zarr.open(store.path, mode="r")["depth"].attrs["card"] == store.card


def test_zarr_finds_the_damage_that_its_own_checksums_cover(small):
    store = small(rows=4).fill()
    damaged = bytearray(store.shard_file(0).read_bytes())
    damaged[5] ^= 1
    store.shard_file(0).write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open(store.path, mode="r")["depth/features"][0]


def foreign(metadata: dict, path: str, value: object) -> dict:
    changed = copy.deepcopy(metadata)
    *way, last = path.split("/")
    node = changed
    for step in way:
        node = node[int(step) if step.isdigit() else step]
    if value is None:
        del node[last]
    else:
        node[int(last) if last.isdigit() else last] = value
    return changed


INNER = "codecs/0/configuration"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("codecs", []),
        ("codecs", None),
        ("codecs/0/name", "bytes"),
        ("codecs/0", "sharding_indexed"),
        (f"{INNER}/chunk_shape", [2, 3, 4]),
        (f"{INNER}/chunk_shape", [1, 3, 2]),
        (f"{INNER}/codecs/1/name", "gzip"),
        (f"{INNER}/codecs/0/configuration/endian", "big"),
        (f"{INNER}/index_codecs/0/configuration/endian", "big"),
        (f"{INNER}/index_codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        (f"{INNER}/index_location", "start"),
        ("chunk_grid/configuration/chunk_shape", [4, 3]),
        ("chunk_grid", None),
        ("chunk_key_encoding/name", "v2"),
        ("chunk_key_encoding/configuration/separator", "."),
        ("data_type", None),
        ("data_type", "bfloat16"),
        ("data_type", {"name": "datetime64", "configuration": {}}),
    ],
)
def test_an_array_of_another_format_is_refused(small, path, value):
    store = small()
    metadata = json.loads((store.group.array / "zarr.json").read_text())
    assert Layout.of(metadata, Path("x")) == store.group.layout
    with pytest.raises(StoreError):
        Layout.of(foreign(metadata, path, value), Path("x"))


def test_other_codecs_of_zarr_python_are_refused(tmp_path):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    common = {"shape": (8, 3, 4), "dtype": "float32"}
    group.create_array("flat", chunks=(1, 3, 4), **common)
    group.create_array("compressed", chunks=(1, 3, 4), shards=(4, 3, 4), **common)
    group.create_array("rows of two", chunks=(2, 3, 4), shards=(4, 3, 4), **common)
    group.create_array("two dimensions", chunks=(1, 3), shards=(4, 3), shape=(8, 3), dtype="float32")
    for name in group.array_keys():
        with pytest.raises(StoreError, match="not a feature array of this format"):
            Layout.of(json.loads((tmp_path / name / "zarr.json").read_text()), tmp_path / name)


@pytest.mark.parametrize(
    "values", [(0, 3, 4, "float32"), (4, 0, 4, "float32"), (4, 3, 0, "float16"), (4, 3, 4, "int8")]
)
def test_a_layout_that_cannot_be_is_refused(values):
    with pytest.raises(StoreError):
        Layout(*values)


def test_where_zarr_looks_for_a_shard(small):
    store = small(rows=6).fill()
    assert shard_file(store.group.array, 1) == store.shard_file(1)
    assert sorted(store.shards()) == ["0/0/0", "1/0/0"]
