"""Shard files: byte for byte zarr-python's, and readable by it."""

import copy
import json

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from olavlm.cache import Layout, StoreError
from olavlm.cache.shard import ArrayLayout, crc32c, read_metadata

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
    assert layout.row_bytes == 30
    assert [layout.shard_of(r) for r in (0, 3, 4)] == [0, 0, 1]
    assert [layout.padded(r) for r in (0, 1, 4, 5)] == [0, 4, 4, 8]
    (array,) = layout.arrays.values()
    assert (array.name, array.row_shape, array.row_bytes) == ("features", (3, 5), 30)
    assert array.index_bytes == 4 * 16 + 4
    for lengths, second in (([34, 34], 34), ([17, 90], 17)):
        index = array.index([1, 3], lengths)
        assert np.frombuffer(index[:-4], "<u8").reshape(4, 2).tolist() == [
            [2**64 - 1] * 2, [0, lengths[0]], [2**64 - 1] * 2, [second, lengths[1]],
        ]  # fmt: skip
        assert int.from_bytes(index[-4:], "little") == crc32c(index[:-4])


def test_sizes_of_what_is_quantised():
    for dtype, features, row_bytes in (("int8", (576, 1024), 576 * 1028), ("int4", (576, 512), 576 * 516)):
        layout = Layout(128, 576, 1024, dtype)
        assert layout.row_bytes == row_bytes
        assert {n: (a.row_shape, a.dtype) for n, a in layout.arrays.items()} == {
            "features": (features, layout.numpy_dtype.name),
            "scales": ((576,), "float32"),
        }


STORED = ["float16", "float32", "int8", "int4"]
COMPRESS = ["none", "zstd"]


def reference(store, folder):
    """The same store's group as zarr-python writes it: rows one by one, absent rows never."""
    group, layout = zarr.open_group(folder, mode="w", zarr_format=3), store.group.layout
    (tokens, dim), dtype = store.features.shape[1:], layout.dtype
    shapes = {"features": ((tokens, dim), layout.dtype)}
    if dtype == "int8":
        shapes["scales"] = ((tokens,), "float32")
    if dtype == "int4":
        shapes = {"features": ((tokens, dim // 2), "uint8"), "scales": ((tokens,), "float32")}
    for name, (shape, kind) in shapes.items():
        group.create_array(
            name,
            shape=(-(-len(store.features) // 4) * 4, *shape),
            shards=(4, *shape),
            chunks=(1, *shape),
            dtype=kind,
            fill_value=np.nan if kind.startswith("float") else 0,
            compressors=[*([ZstdCodec(level=3)] if layout.compress == "zstd" else []), Crc32cCodec()],
            attributes={"codec": dtype},
            dimension_names=["row", "token", "channel"][: 1 + len(shape)],
        )
    return group


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", [(3, 4), (1, 6), (16, 2)])
def test_the_bytes_are_those_of_zarr_python(small, tmp_path, shape, dtype, compress, pattern):
    valid = PATTERNS[pattern]
    store = small(rows=6, shape=shape, dtype=dtype, compress=compress)
    store.fill({r: "missing" for r in range(6) if not valid[r]})
    theirs = reference(store, tmp_path / "theirs")
    for row in np.flatnonzero(valid):
        for name, part in store.codec.encode(store.features[row])[0].items():
            theirs[name][row] = part
    root = tmp_path / "theirs"
    expected = {str(f.relative_to(root)): f.read_bytes() for f in root.glob("*/c/**/*") if f.is_file()}
    assert store.shards() == expected
    assert len(expected) == (any(valid[:4]) + any(valid[4:])) * len(store.arrays)
    for name in store.arrays:
        ours, others = (json.loads((a / name / "zarr.json").read_text()) for a in (store.group.folder, root))
        assert ours == others


def test_a_row_of_zeros_is_a_row_and_not_an_absent_one(small):
    """zarr-python would leave it out of `features` of int8, whose fill value is zero too; it reads the same."""
    store = small(rows=6, dtype="int8")
    store.features[[0, 4]] = 0
    store.fill({1: "missing"})
    assert (store.group[0] == 0).all()
    group = zarr.open(store.path, mode="r")["depth"]
    assert (group["features"][0] == 0).all()
    assert group["scales"][0].tolist() == group["scales"][4].tolist() == [0, 0, 0]
    assert np.isnan(group["scales"][1]).all()


def test_rows_that_differ_are_compressed_to_lengths_that_differ(small):
    """The control of the test above: a compressed row is not of a fixed length."""
    store = small(rows=4, shape=(16, 16), compress="zstd")
    store.features[1], store.features[2, :8] = 0, 1
    lengths = store.fill().group.record(0).files["features"].rows_bytes
    assert lengths[1] < lengths[2] < lengths[0]
    np.testing.assert_array_equal(store.group.read(range(4))[0], store.features)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("dtype", STORED)
def test_plain_zarr_reads_values_and_nan(small, dtype, compress, pattern):
    valid = np.array(PATTERNS[pattern])
    store = small(rows=6, dtype=dtype, compress=compress).fill({r: "missing" for r in range(6) if not valid[r]})
    group = zarr.open(store.path, mode="r")["depth"]
    read = {name: group[name][:] for name in store.arrays}
    assert ("scales" in group) == (dtype in ("int8", "int4"))
    assert (len(read["features"]), read["features"].dtype) == (8, store.group.dtype)
    if dtype == "int8":  # what the README tells a reader without our code to do
        values = read["features"] * read["scales"][..., None]
        assert read["features"].shape == (8, 3, 4)
    elif dtype == "int4":
        values = store.codec.decode(read)
        assert read["features"].shape == (8, 3, 2)
    else:
        values = read["features"]
    np.testing.assert_array_equal(values[:6][valid], store.expected[valid])
    for what in [values, *([read["scales"]] if "scales" in read else [])]:
        assert np.isnan(what[:6][~valid]).all()
        assert np.isnan(what[6:]).all()
    for row in np.flatnonzero(valid):
        for name in store.arrays:
            np.testing.assert_array_equal(group[name][row], read[name][row])


def test_a_shard_that_is_not_there_reads_as_nan_never_as_zeros(small):
    store = small(rows=6)
    store.commit(store.task(1))
    read = zarr.open(store.path, mode="r")["depth/features"]
    assert np.isnan(read[:4]).all()
    np.testing.assert_array_equal(read[4:6], store.features[4:])
    assert zarr.open(store.path, mode="r")["depth"].attrs["card"] == store.card


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("name", ["features", "scales"])
def test_zarr_finds_the_damage_that_its_own_checksums_cover(small, name, compress):
    store = small(rows=4, dtype="int8", compress=compress).fill()
    damaged = bytearray(store.shard_file(0, name).read_bytes())
    damaged[5] ^= 1
    store.shard_file(0, name).write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open(store.path, mode="r")["depth"][name][0]


def test_a_chunk_that_is_not_of_this_layout_is_not_unpacked():
    array = ArrayLayout("features", 4, (3, 4), "float16", "zstd")
    row, into = np.arange(12, dtype=np.float16).reshape(3, 4), np.zeros((3, 4), np.float16)
    chunk = array.pack(row)
    assert array.unpack(chunk, into)
    np.testing.assert_array_equal(into, row)
    longer = ArrayLayout("features", 4, (4, 4), "float16", "zstd").pack(np.zeros((4, 4), np.float16))
    shorter = ArrayLayout("features", 4, (2, 4), "float16", "zstd").pack(np.zeros((2, 4), np.float16))
    for other in (longer, shorter, chunk[:-1], b"", b"\0" * 24):
        assert not array.unpack(other, into), other


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
        ("attributes", {}),
        ("attributes/codec", "float64"),
        ("attributes/codec", "int8"),
        ("attributes/more", 1),
        ("fill_value", 0),
        ("fill_value", "Infinity"),
        ("shape", [12]),
        ("shape", [12, 3, 5]),
        ("shape", [12.0, 3, 4]),
        ("shape", [True, 3, 4]),
        ("shape", None),
        ("dimension_names", None),
        ("node_type", "group"),
        ("more", 1),
        ("codecs", []),
        ("codecs", None),
        ("codecs/0/name", "bytes"),
        ("codecs/0", "sharding_indexed"),
        (f"{INNER}/chunk_shape", [2, 3, 4]),
        (f"{INNER}/chunk_shape", [1, 3, 2]),
        (f"{INNER}/codecs/1/name", "gzip"),
        (f"{INNER}/codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        (f"{INNER}/codecs/1", {"name": "zstd", "configuration": {"level": 3, "checksum": False}}),
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
    file = store.group.folder / "features" / "zarr.json"
    metadata = read_metadata(file.parent)
    file.write_text(json.dumps(metadata))  # the control: it is not about the spelling
    assert Layout.of(file.parent.parent) == store.group.layout
    file.write_text(json.dumps(foreign(metadata, path, value)))
    with pytest.raises(StoreError, match="not a feature array of this format"):
        Layout.of(file.parent.parent)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("shape", [12, 2]),
        ("shape", [12]),
        ("data_type", "float16"),
        ("fill_value", 0.0),
        ("attributes/codec", "float16"),
        ("chunk_grid/configuration/chunk_shape", [8, 3]),
        (f"{INNER}/chunk_shape", [2, 3]),
        (f"{INNER}/codecs/1/name", "gzip"),
    ],
)
def test_scales_of_another_format_are_refused(small, dtype, path, value):
    store = small(dtype=dtype)
    file = store.group.folder / "scales" / "zarr.json"
    metadata = read_metadata(file.parent)
    file.write_text(json.dumps(foreign(metadata, path, value)))
    with pytest.raises(StoreError, match="scales: not the scales of"):
        Layout.of(file.parent.parent)
    file.unlink()
    with pytest.raises(StoreError, match=r"scales is not a feature store: it has no zarr\.json"):
        Layout.of(file.parent.parent)


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("dtype", STORED)
def test_the_layout_of_a_group_is_the_one_it_was_made_with(small, dtype, compress):
    store = small(dtype=dtype, compress=compress, shape=(3, 8))
    assert Layout.of(store.group.folder) == Layout(4, 3, 8, dtype, compress)


def test_other_codecs_of_zarr_python_are_refused(tmp_path):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    common = {"name": "features", "shape": (8, 3, 4), "dtype": "float32", "attributes": {"codec": "float32"}}
    sharded = {"chunks": (1, 3, 4), "shards": (4, 3, 4), "fill_value": np.nan}
    names = {"dimension_names": ["row", "token", "channel"]}
    ours = {**sharded, **names, "compressors": [Crc32cCodec()]}
    for case, options in {
        "flat": {"chunks": (1, 3, 4)},
        "compressed otherwise": {**sharded, **names, "compressors": [ZstdCodec(level=9), Crc32cCodec()]},
        "without a checksum": {**sharded, **names, "compressors": []},
        "rows of two": {**ours, "chunks": (2, 3, 4)},
        "two dimensions": {"chunks": (1, 3), "shards": (4, 3), "shape": (8, 3)},
        "of zeros": {**ours, "fill_value": 0},
        "without names": {**ours, "dimension_names": None},
    }.items():
        group.create_group(case).create_array(**{**common, **options})
        with pytest.raises(StoreError, match="not a feature array of this format"):
            Layout.of(tmp_path / case)
    group.create_group("ours").create_array(**common, **ours)  # the control
    assert Layout.of(tmp_path / "ours") == Layout(4, 3, 4, "float32")


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ((0, 3, 4, "float32"), "at least 1"),
        ((4, 0, 4, "float32"), "at least 1"),
        ((4, 3, 0, "float16"), "at least 1"),
        ((4, 3, 4, "float64"), "dtype 'float64' is not a storage dtype; use one of float16, float32, int8, int4"),
        ((4, 3, 4, "int8", "gzip"), "compression 'gzip' is not known; use one of none, zstd"),
        ((4, 3, 5, "int4"), "dtype int4 packs 2 channels, dim is 5"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(values, rule):
    with pytest.raises(StoreError, match=rule):
        Layout(*values)


def test_where_zarr_looks_for_a_shard(small):
    store = small(rows=6, dtype="int8").fill()
    for name, array in store.group.layout.arrays.items():
        assert array.file(store.group.folder, 1) == store.shard_file(1, name)
    assert sorted(store.shards()) == ["features/c/0/0/0", "features/c/1/0/0", "scales/c/0/0", "scales/c/1/0"]
