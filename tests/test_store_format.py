"""`docs/store-format.md` is true: its reader, run from the page, reads what the package writes, and its examples are
the package's own. The page's code imports nothing of olavlm."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from google_crc32c import value as crc32c

from olavlm.cache import BadImage, FeatureStore, StoreBuilder, pending
from olavlm.cache.codec import CODECS
from olavlm.cache.errors import CacheError
from olavlm.cache.lease import LEASE_SECONDS, acquire_lease
from olavlm.cache.plan import SEGMENT_ALIGNMENT
from olavlm.cache.records import Record, ShardFile, canonical_json
from olavlm.cache.shard import COMPRESSIONS, Layout
from olavlm.teachers.card import Card

PAGE = (Path(__file__).parents[1] / "docs" / "store-format.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.S | re.M)
CODE = [block for kind, block in BLOCKS if kind == "python"]
ROOT, TEACHER, ARRAY, WORKED, RECORD = (json.loads(block) for kind, block in BLOCKS if kind == "json")
ALL_KINDS = [(dtype, compress) for dtype in CODECS for compress in COMPRESSIONS]
TOKENS, DIM, SHARD_ROWS = 3, 24, 3  # a dim for which int4 has blocks to mix; shards that 4096 is no multiple of


class Killed(BaseException):
    """The writer dies here."""


def commit(builder: StoreBuilder, shard: int, features, bad=(), limit=None, die_before=None, **described) -> None:
    """Commit one shard of `depth`, again if it is committed already; `bad` is a dict of rows and reasons."""

    def step(name: str) -> None:
        if name == die_before:
            raise Killed

    group, bad = FeatureStore(builder.path)["depth"], dict(bad)
    tasks = {task.shard: task for task in pending(group, limit)}
    if shard in tasks:
        rows, segment = (tasks[shard].start, tasks[shard].stop), tasks[shard].segment
    else:
        rows, segment = group.record(shard).rows, group.record(shard).segment
    with contextlib.suppress(Killed), builder.writer(group, step).begin(shard, rows, segment) as writing:
        for row in range(*rows):
            sha256, (reason, detail) = hashlib.sha256(b"image %d" % row).hexdigest(), bad.get(row, (None, ""))
            writing.append(None if reason else features[row], image_sha256=sha256, reason=reason, detail=detail)
        writing.commit(**described)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the page's examples."""
    folder = tmp_path_factory.mktemp("example") / "STORE"
    builder = StoreBuilder(folder)
    builder.extend_plan(pa.array([f"coco/{i:06d}.jpg" for i in (1, 2, 3)], pa.large_string()))
    builder.ensure_teacher("depth", TEACHER["attributes"]["card"], dtype="int8", shard_rows=4)
    features = np.zeros((3, 2, 4), np.float32)
    features[0, 0] = 63.5, -32, 0, 0.25
    features[2] = (1.984375, -1, 0.5, 0.0078125), (-31.75, 16, 0.5, 0)
    bad = {1: ("truncated", RECORD["reasons"][1]["detail"])}
    commit(builder, 0, features, bad, timings=RECORD["timings"], host=RECORD["host"])
    return folder


@pytest.fixture(scope="module")
def page(example) -> dict:
    """The names of the page's code after it ran, and what it `printed`."""
    names: dict = {"STORE": str(example)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in CODE:
            exec(compile(block, "store-format.md", "exec"), names)
    return {**names, "printed": printed.getvalue()}


def make_card(**fields: object) -> dict:
    card = {**TEACHER["attributes"]["card"], "tokens": TOKENS, "dim": DIM, **fields}
    return {**card, "fingerprint": hashlib.sha256(canonical_json(card)).hexdigest()}


def image_paths(count: int) -> pa.LargeStringArray:
    return pa.array([f"photos/{'é☃𝄞'[i % 3]} {i}.jpg" for i in range(count)], pa.large_string())


@pytest.fixture(scope="module", params=ALL_KINDS, ids="-".join)
def lived_in(request, tmp_path_factory) -> Path:
    """A store with quarantined rows, a shard of nothing else, a replaced one, a dead writer's, and a grown plan."""
    dtype, compress = request.param
    builder = StoreBuilder(tmp_path_factory.mktemp("lived_in") / "STORE")
    builder.extend_plan(image_paths(11))
    builder.ensure_teacher("depth", make_card(dim=DIM), dtype=dtype, compress=compress, shard_rows=SHARD_ROWS)
    rng, later = np.random.default_rng(7), 3 * SEGMENT_ALIGNMENT
    features = dict.fromkeys(range(11)) | dict.fromkeys(range(later, later + 5))
    features = {row: rng.standard_normal((TOKENS, DIM)).astype(np.float32) for row in features}
    features[0][1] = 0
    features[2][0, 5] = 300
    commit(builder, 0, features, {1: ("not-an-image", "é𝄞 \x1b[31m")})
    commit(builder, 1, features, dict.fromkeys(range(3, 6), ("missing", "")))
    commit(builder, 2, {row: value + 1 for row, value in features.items()}, {8: ("unreadable", "try again")})
    commit(builder, 2, features)
    commit(builder, 3, features, die_before="record")
    builder.extend_plan(image_paths(16))
    commit(builder, later // SHARD_ROWS, features, limit=13)
    return builder.path


def by_bytes(store: Path, array: zarr.Array, record: dict) -> np.ndarray:
    """As the page's `read_rows`, by its shard layout alone: of `array` only the path is used."""
    meta, said = json.loads((store / array.path / "zarr.json").read_text()), record["files"][Path(array.path).name]
    shard_rows, *shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    row_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = store.joinpath(array.path, "c", str(record["shard"]), *["0"] * len(shape)).read_bytes()
    index, at, rows = np.full((shard_rows, 2), 2**64 - 1, "<u8"), 0, []
    for i, checksum in enumerate(said["rows_crc32c"]):
        if checksum is None:
            continue
        length = said["rows_bytes"][i] if said["rows_bytes"] else row_bytes
        chunk, trailer = raw[at : at + length], raw[at + length : at + length + 4]
        if not crc32c(chunk) == checksum == int.from_bytes(trailer, "little"):
            raise ValueError(f"row {i}")
        if said["rows_bytes"]:
            chunk = pa.decompress(chunk, row_bytes, "zstd", asbytes=True)
        rows.append(np.frombuffer(chunk, dtype).reshape(shape))
        index[record["rows"][0] - record["shard"] * shard_rows + i] = at, length + 4
        at += length + 4
    if raw[at:] != index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"):
        raise ValueError("index")
    return np.stack(rows)


def same(values: np.ndarray, ours: np.ndarray, dtype: str) -> bool:
    """Bit for bit; where the processor fuses multiply and add, numpy's sums in int4 may end in another bit."""
    if dtype == "int4" and platform.machine().lower() not in ("x86_64", "amd64"):
        return np.allclose(values, ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    return values.dtype == ours.dtype and values.tobytes() == ours.tobytes()


# --- the reader of the page


def test_page_imports_nothing_of_ours():
    tree = ast.parse("\n".join(CODE))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"hashlib", "json", "zlib", "pathlib", "numpy", "pyarrow.parquet", "zarr", "google_crc32c"}
    assert modules == allowed


def test_page_reads_its_example(page, example):
    assert page["read_features"](example, "depth").keys() == {0, 1, 2}
    assert "1 truncated\n" in page["printed"]
    assert "does not count" not in page["printed"]


@pytest.mark.parametrize("how", ["zarr", "bytes"])
def test_reader_agrees_with_olavlm(page, lived_in, how):
    group = FeatureStore(lived_in)["depth"]
    ours = set(group.plan.rows.tolist()) - set(group.missing_rows().tolist())
    found = page["read_features"](lived_in, "depth", *([by_bytes] if how == "bytes" else []))
    assert found.keys() == ours == {*range(9), 12288, 12289}
    for row, values in found.items():
        failure = group.failure(row)
        if failure is not None:
            assert values == failure.reason
        else:
            assert same(values, group[row], group.layout.dtype)
    assert {row for row, values in found.items() if isinstance(values, str)} == {1, 3, 4, 5}


def test_plan_and_card_agree_with_olavlm(page, lived_in):
    store = FeatureStore(lived_in)
    segments = page["read_plan"](lived_in)
    assert page["plan_hash"](segments) == store.rows.hash
    assert [segment[:3] for segment in segments] == [(s.start, s.stop, s.hash) for s in store.rows.segments]
    assert [image for *_, images in segments for image in images] == store.plan["image"].to_pylist()
    card, codec, _ = page["read_teacher"](lived_in, "depth")
    assert (card, codec) == (store["depth"].card, store["depth"].layout.dtype)


def test_records_agree_with_olavlm(page, lived_in):
    group, (card, _, arrays) = FeatureStore(lived_in)["depth"], page["read_teacher"](lived_in, "depth")
    for shard, revision in {0: 0, 1: 0, 2: 1, 3: None, 4096: 0, 4097: None}.items():
        record, ours = page["record_that_counts"](lived_in, "depth", shard, card, arrays), group.record(shard)
        assert (None if record is None else record["revision"]) == revision
        expected = None if ours is None else {**dataclasses.asdict(ours), "rows": list(ours.rows)}
        if record is not None:
            assert (record.pop("format"), len(record.pop("checksum"))) == (1, 64)
        assert record == expected


def test_plain_zarr_sees_nan_and_files_without_a_record(lived_in):
    group = zarr.open_group(lived_in, mode="r")["depth"]
    of_rows = group["scales"] if "scales" in group else group["features"]
    assert of_rows.shape[0] >= 12293
    for row in (1, 3, 4, 5, 11, 5000, 12290):  # quarantined, beyond the first segment, in between, missing
        assert np.isnan(of_rows[row]).all()
        if "scales" in group:
            assert not group["features"][row].any()
    assert np.isfinite(of_rows[9]).all()  # placed by the writer that died


@pytest.mark.parametrize("dim", [2, 6, 64, 96, 768, 1000, 1024, 1280, 1536])
def test_int4_of_every_kind_of_dim(page, dim):
    rows = np.random.default_rng(dim).standard_normal((2, 3, dim)).astype(np.float32)
    parts = [CODECS["int4"].encode(row)[0] for row in rows]
    parts = {name: np.stack([part[name] for part in parts]) for name in ("features", "scales")}
    assert same(page["decode"]("int4", **parts), CODECS["int4"].decode(parts), "int4")


# --- the checks of the page's reader, each seen to work

GROUP, FIRST = "depth", Path("depth/features/c/0/0/0")


def edit(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def rename_an_image(store: Path) -> None:
    file = store / "plan" / "00000.parquet"
    table = pq.read_table(file)
    other = pa.array(["other.jpg", *table["image"].to_pylist()[1:]], pa.large_string())
    pq.write_table(table.set_column(1, "image", other).replace_schema_metadata(table.schema.metadata), file)


def exchange(store: Path, this: str, other: str) -> None:
    """Both files are right by themselves."""
    this, other = store / "depth" / this, store / "depth" / other
    contents = this.read_bytes(), other.read_bytes()
    assert contents[0] != contents[1]
    other.write_bytes(contents[0])
    this.write_bytes(contents[1])


def record_again(store: Path, **changes: object) -> None:
    """A record with a right checksum that says something else."""
    file = store / "depth" / "commits" / "000000.0.json"
    record = {**json.loads(file.read_text()), **changes}
    del record["checksum"]
    record["checksum"] = hashlib.sha256(canonical_json(record)).hexdigest()
    file.write_bytes(canonical_json(record) + b"\n")


RECORD_FILE, WITHDRAWN_FILE = Path("depth/commits/000000.0.json"), Path("depth/commits/000000.0.withdrawn")
ERRORS = {  # what is done to a store, so that reading it is an error
    "a row's byte": lambda store: flip(store / FIRST, 0),
    "a row's crc32c": lambda store: flip(store / FIRST, -16 * SHARD_ROWS - 5),
    "the index": lambda store: flip(store / FIRST, -20),
    "another shard's file": lambda store: exchange(store, "features/c/0/0/0", "features/c/1/0/0"),
    "a path in the plan": rename_an_image,
    "a number in the card": lambda store: edit(store / "depth" / "zarr.json", b"0.485", b"0.486"),
    "another plan's record": lambda store: record_again(store, segment="0" * 64),
}
MISSING = {  # so that shard 0 does not exist
    "a letter of its record": lambda store: edit(store / RECORD_FILE, b'"revision":0', b'"revision":1'),
    "another shard's record": lambda store: exchange(store, "commits/000000.0.json", "commits/000001.0.json"),
    "another card's record": lambda store: record_again(store, fingerprint="0" * 64),
    "a record of another format": lambda store: record_again(store, format=2),
    "a record with a new field": lambda store: record_again(store, more=1),
    "a record of no rows": lambda store: record_again(store, rows=[0, 0], reasons=[], images_sha256=[], files={}),
    "a record of another shard's rows": lambda store: record_again(store, rows=[3, 6]),
    "a record without files": lambda store: record_again(store, files={}),
    "a shorter file": lambda store: (store / FIRST).write_bytes((store / FIRST).read_bytes()[:-1]),
    "no file": lambda store: (store / FIRST).unlink(),
    "a withdrawn record": lambda store: (store / RECORD_FILE).rename(store / WITHDRAWN_FILE),
    "half a withdrawal": lambda store: shutil.copy(store / RECORD_FILE, store / WITHDRAWN_FILE),
}


@pytest.fixture(scope="module", params=["float16-none", "float16-zstd", "int8-none"])
def two_shards(request, tmp_path_factory) -> Path:
    """Rows of one value each, so that the files of both shards are equally long when compressed."""
    dtype, compress = request.param.split("-")
    builder = StoreBuilder(tmp_path_factory.mktemp("two_shards") / "STORE")
    builder.extend_plan(image_paths(6))
    builder.ensure_teacher("depth", make_card(), dtype=dtype, compress=compress, shard_rows=SHARD_ROWS)
    features = np.broadcast_to(np.arange(1, 7, dtype=np.float32)[:, None, None], (6, TOKENS, DIM)).copy()
    features[3:] *= -1
    for shard in (0, 1):
        commit(builder, shard, features)
    return builder.path


@pytest.fixture
def damaged(two_shards, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(two_shards, tmp_path / "STORE"))


@pytest.mark.parametrize("how", ["zarr", "bytes"])
@pytest.mark.parametrize("what", ERRORS)
def test_damage_is_an_error(page, damaged, what, how):
    ERRORS[what](damaged)
    with pytest.raises(ValueError):  # noqa: PT011 - the page's own and zarr's
        page["read_features"](damaged, "depth", *([by_bytes] if how == "bytes" else []))
    with pytest.raises(CacheError):
        FeatureStore(damaged)["depth"].read(range(6))


@pytest.mark.parametrize("what", MISSING)
def test_what_does_not_count_is_missing(page, damaged, what, capsys):
    MISSING[what](damaged)
    found = page["read_features"](damaged, "depth")
    assert found.keys() == (set() if what == "another shard's record" else {3, 4, 5})
    assert ("does not count" in capsys.readouterr().out) == ("withdraw" not in what)
    with pytest.raises(CacheError):
        FeatureStore(damaged)["depth"].read([0])


def test_undamaged_copy_is_whole(page, damaged):
    assert page["read_features"](damaged, "depth").keys() == set(range(6))
    assert FeatureStore(damaged)["depth"].read(range(6))[1].all()


def test_lower_revision_counts_if_the_higher_is_damaged(page, damaged):
    (damaged / "depth" / "commits" / "000000.1.json").write_text("{}")
    assert page["read_features"](damaged, "depth").keys() == set(range(6))
    assert FeatureStore(damaged)["depth"].record(0).revision == 0


def test_another_format_is_refused(page, damaged):
    edit(damaged / "zarr.json", b'"format": 1', b'"format": 2')
    with pytest.raises(ValueError, match="not format 1"):
        page["read_features"](damaged, "depth")


# --- the examples of the page


def test_examples_are_the_packages_own(example):
    assert json.loads((example / "zarr.json").read_text()) == ROOT
    assert json.loads((example / "depth" / "zarr.json").read_text()) == TEACHER
    assert json.loads((example / "depth" / "features" / "zarr.json").read_text()) == ARRAY
    assert Layout(4, 2, 4, "int8").metadata("features", 3) == ARRAY
    assert (example / "depth" / "commits" / "000000.0.json").read_bytes() == canonical_json(RECORD) + b"\n"
    assert list(RECORD) == sorted(RECORD)


def test_card_of_the_example():
    card = TEACHER["attributes"]["card"]
    assert Card.from_dict(card).to_dict() == card
    assert hashlib.sha256(canonical_json(card)).hexdigest() == TEACHER["attributes"]["card_sha256"]


def test_shard_of_the_example(example):
    (dump,) = (block for kind, block in BLOCKS if kind == "hex")
    raw = (example / FIRST).read_bytes()
    assert b"".join(bytes.fromhex(line.partition("  ")[0]) for line in dump.splitlines()) == raw
    assert len(raw) == RECORD["files"]["features"]["size"]


def test_hashes_of_the_example(example):
    plan = FeatureStore(example).rows
    assert re.search(r"segment hash\n?\s*`(\w+)`", PAGE)[1] == plan.segments[0].hash == RECORD["segment"]
    assert re.search(r"plan hash\n?\s*`(\w+)`", PAGE)[1] == plan.hash


def test_table_of_arrays():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `(\w+)` \| `(\w+)` \| \((.*?)\) \| `(.*?)` \|$", PAGE, flags=re.M)
    table = {}
    for codecs, array, data_type, shape, fill in rows:
        sizes = [{"tokens": 6, "dim": 8, "dim / 2": 4}[size] for size in shape.split(", ")]
        table |= {(codec, array): (data_type, sizes, json.loads(fill)) for codec in re.findall(r"\w+", codecs)}
    ours = {}
    for codec in CODECS:
        layout = Layout(4, 6, 8, codec)
        for array in layout.arrays:
            meta = layout.metadata(array, 9)
            ours[codec, array] = meta["data_type"], meta["shape"][1:], meta["fill_value"]
            assert meta["shape"][0] == 12
    assert table == ours


@pytest.mark.parametrize(("dtype", "compress"), ALL_KINDS)
def test_zarr_json_differs_as_the_page_says(dtype, compress):
    """From the example's only in what the page names."""
    endian, zstd = (json.loads(re.search(pattern, PAGE)[1]) for pattern in (
        r'inner\s+`bytes` is `(\{.*?\}\})`', r'`(\{"name": "zstd".*?\}\})`'))  # fmt: skip
    layout = Layout(4, 2, 4, dtype, compress)
    for name, array in layout.arrays.items():
        expected, meta = json.loads(json.dumps(ARRAY)), layout.metadata(name, 3)
        inner = expected["codecs"][0]["configuration"]
        shape = list(array.row_shape)
        expected["shape"] = expected["chunk_grid"]["configuration"]["chunk_shape"] = [4, *shape]
        inner["chunk_shape"] = [1, *shape]
        expected |= {key: meta[key] for key in ("data_type", "fill_value")}  # in the table
        expected["attributes"]["codec"] = dtype
        if np.dtype(array.dtype).kind == "f":
            inner["codecs"][0] = endian
        if compress == "zstd":
            inner["codecs"].insert(1, zstd)
        if name == "scales":
            expected["dimension_names"] = ["row", "token"]
        assert meta == expected


def test_fields_of_a_record():
    table = PAGE[PAGE.index("| field | type") : PAGE.index("A reason is one of")]
    names = [name for cell in re.findall(r"^\| (`.*?`) \|", table, flags=re.M) for name in re.findall(r"`(.+?)`", cell)]
    fields = {field.name for field in dataclasses.fields(Record)} | {"format", "checksum"}
    of_files = {f"files.*.{field.name}" for field in dataclasses.fields(ShardFile)}
    assert sorted(names) == sorted(fields | of_files)
    assert set(RECORD) == fields
    assert {f"files.*.{name}" for name in RECORD["files"]["scales"]} == of_files


def test_reasons():
    listed = PAGE[PAGE.index("A reason is one of") : PAGE.index("`detail`\ncomes from")]
    assert tuple(re.findall(r"`([\w-]+)`\s+\(", listed)) == BadImage.REASONS


def test_worked_int8():
    token = WORKED["int8"]
    stored = {"features": np.array([token["features"]], np.int8), "scales": np.array([token["scale"]], np.float32)}
    assert CODECS["int8"].decode(stored)[0].tolist() == token["values"]
    (again, _, _) = CODECS["int8"].encode(np.array([token["values"]], np.float32))
    assert all((again[name] == stored[name]).all() for name in stored)


def test_worked_int4():
    token, f32 = WORKED["int4"], np.float32
    stored = {"features": np.array([token["features"]], np.uint8), "scales": np.array([token["scale"]], f32)}
    codes = [nibble for byte in token["features"] for nibble in (byte & 15, byte >> 4)]
    assert codes == token["codes"]
    levels = [-2.7326, -2.0690, -1.6181, -1.2562, -0.9424, -0.6568, -0.3881, -0.1284]
    assert re.findall(r"-\d\.\d{4}", PAGE[PAGE.index("The levels of codes") :])[:8] == [
        f"{level:.4f}" for level in levels
    ]
    levels += [-level for level in reversed(levels)]
    y = np.array([levels[code] for code in codes], f32) * f32(token["scale"])
    assert same(np.array(token["y"], f32), y, "int4")
    blocks, d = y.reshape(3, 2), np.sqrt(2 / 3) * np.cos(np.pi * np.outer([0, 1, 2], [1, 3, 5]) / 6)
    d[0] /= np.sqrt(2)
    np.testing.assert_allclose(np.reshape(token["after 1"], (3, 2)), d.T @ blocks, atol=1e-6)
    hadamard = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    np.testing.assert_allclose(np.reshape(token["after 3"], (3, 2)), d.T @ blocks @ hadamard, atol=1e-6)
    stream = hashlib.shake_256(b"olavlm int4 rotation 1").digest(1)[0]
    assert token["signs"] == [1 - 2 * (stream >> i & 1) for i in range(6)]
    values = np.array(token["values"], f32)
    assert (values == np.array(token["after 3"], f32) * token["signs"]).all()
    assert same(values, CODECS["int4"].decode(stored)[0], "int4")


def test_canonical_json():
    spelling = re.search(r"`(json\.dumps\(value, .*?\))`", PAGE)[1]
    value = {"é": [1.0, 1e-05, 1.5e16, 2**70, None, True], "B": 'a"\\\n\x7f\x1b/', "b": {"𝄞": 0.1}}
    assert eval(spelling, {"json": json, "value": value}).encode() == canonical_json(value)
    for example in (1e-05, 1.5e16, 2.0):
        assert f"`{canonical_json(example).decode()}`" in PAGE


def test_numbers_named(tmp_path):
    assert crc32c(b"123456789") == int(re.search(r"of `123456789`\s+it is (0x\w+)", PAGE)[1], 16)
    assert f"multiple of {SEGMENT_ALIGNMENT} " in PAGE
    assert f"no renewal for {LEASE_SECONDS:.0f} s" in " ".join(PAGE.split())
    assert acquire_lease(tmp_path, 12).file.name == "000012.0"
    said = re.search(r", JSON of ((?:`\w+`[,\s]*)+)", PAGE)[1]
    assert set(json.loads((tmp_path / "000012.0").read_text())) == set(re.findall(r"\w+", said))


def test_tree(lived_in):
    """Every file of a store is one that the page's tree shows, and what it shows is there."""
    (tree,) = re.findall(r"^```\nSTORE/\n(.*?)^```", PAGE, flags=re.S | re.M)
    shown = [line.split()[0].replace("KEY", "depth") for line in tree.splitlines()]
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(name)) + (".+" if name.endswith("/") else ""): name for name in shown}
    matched = set()
    for file in lived_in.rglob("*"):
        if file.is_file():
            (pattern,) = (p for p in patterns if re.fullmatch(p, file.relative_to(lived_in).as_posix()))
            matched.add(patterns[pattern])
    unseen = {"depth/leases/", "depth/staging/", "depth/index", "runs/"}  # of writers at work; of a finished extraction
    if not (lived_in / "depth" / "scales").exists():
        unseen |= {"depth/scales/zarr.json", "depth/scales/c/12/0"}
    assert matched == set(shown) - unseen


def test_steps_of_a_commit(two_shards, tmp_path):
    """The page names them in the order in which they are done."""
    store, steps = Path(shutil.copytree(two_shards, tmp_path / "STORE")), []
    features = np.ones((3, TOKENS, DIM), np.float32)
    group = FeatureStore(store)["depth"]
    with StoreBuilder(store).writer(group, steps.append).begin(0, (0, 3), group.record(0).segment) as writing:
        for row in features:
            writing.append(row, image_sha256=None)
        writing.commit()
    protocol = PAGE[PAGE.index("1. **Lease**") : PAGE.index("`rows` begin where")].lower()
    places = [protocol.find(f"**{step}**") for step in steps]
    places = [re.search(rf"\b{s}\b", protocol).start() if at < 0 else at for s, at in zip(steps, places, strict=True)]
    assert places == sorted(places)
    assert steps == ["lease", "recover", "stage", "compare", "fsync", "withdraw", "place", "record", "release"]
