"""Commit records: what they say, and that no damage to one goes unseen."""

import hashlib
import json
import re
import zlib
from dataclasses import asdict, replace

import pytest

from olavlm.cache import CorruptFeatures, Layout
from olavlm.cache.records import (
    Record,
    ShardFile,
    canonical_json,
    latest_records,
    revisions_of,
    valid_record,
    withdraw,
)
from olavlm.cache.shard import crc32c

SMALL = Record(
    shard=3,
    revision=0,
    fingerprint="f",
    segment="s",
    rows=(12, 14),
    reasons=[None, {"reason": "empty", "detail": "dé"}],
    images_sha256=["a", None],
    files={"features": ShardFile(5, 9, [7, None]), "scales": ShardFile(6, 10, [8, None], [2, None])},
    norms={"mean": 1.0},
    timings={"commit_s": 0.25},
    host={"host": "h"},
)


def test_written_and_read_back(tmp_path):
    SMALL.publish(tmp_path)
    file = tmp_path / "000003.0.json"
    assert Record.read(file) == SMALL
    content = json.loads(file.read_bytes())
    checksum = content.pop("checksum")
    assert checksum == hashlib.sha256(canonical_json(content)).hexdigest()
    assert content["format"] == 1
    with pytest.raises(FileExistsError):
        SMALL.publish(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["000003.0.json"]  # no private file is left


def test_canonical_json_is_one_spelling_and_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == b'{"a":[1.5,null,"\\u00e9"],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_every_change_of_every_byte_is_found(tmp_path):
    SMALL.publish(tmp_path)
    file = tmp_path / "000003.0.json"
    data = file.read_bytes()
    for at in range(len(data)):
        # Beside arbitrary flips those that read as the same JSON: white space, 1.0 and 1e0, \u00e9 and \u00E9.
        for byte in {data[at] ^ 0x01, data[at] ^ 0x20, ord("e"), ord(" ")} - {data[at]}:
            file.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
            with pytest.raises(CorruptFeatures, match=r"000003\.0\.json is damaged"):
                Record.read(file)


def test_half_a_record_and_a_longer_one_are_found(tmp_path):
    SMALL.publish(tmp_path)
    file = tmp_path / "000003.0.json"
    data = file.read_bytes()
    for content in [*(data[:length] for length in range(len(data))), data + b"\n", b" " + data, data * 2]:
        file.write_bytes(content)
        with pytest.raises(CorruptFeatures):
            Record.read(file)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'{"checksum": 1}', b"[" * 99999, b"\xff\xfe", b"\0" * 99])
def test_what_is_no_record_is_damage(tmp_path, content):
    (tmp_path / "000003.0.json").write_bytes(content)
    with pytest.raises(CorruptFeatures):
        Record.read(tmp_path / "000003.0.json")


@pytest.mark.parametrize("name", ["000004.0.json", "000003.1.json"])
def test_a_record_under_another_name_is_damage(tmp_path, name):
    SMALL.publish(tmp_path)
    (tmp_path / "000003.0.json").rename(tmp_path / name)
    with pytest.raises(CorruptFeatures, match=r"it is the record 000003\.0\.json"):
        Record.read(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"reasons": [None]},
        {"images_sha256": ["a"]},
        {"files": {}},
        {"files": {"features": {"size": 5, "crc32": 9, "rows_crc32c": [7]}}},
        {"files": {"features": {"size": 5, "crc32": 9, "rows_crc32c": [7, 7]}}},
        {"files": {"features": {"size": 5, "crc32": 9, "rows_crc32c": [None, None]}}},
        {"files": {"features": {"size": 5, "crc32": 9, "rows_crc32c": [7, None], "rows_bytes": [3]}}},
        {"files": {"features": {"size": 5, "crc32": 9, "rows_crc32c": [7, None], "rows_bytes": [3, 3]}}},
        {"files": {"features": {"size": 5, "rows_crc32c": [7, None]}}},
        {"files": {"features": None}},
        {"files": None},
        {"rows": [12, 12]},
        {"rows": [14, 12]},
        {"rows": None},
        {"format": 2},
        {"x": 1},
    ],
)
def test_a_whole_record_of_inconsistent_rows_is_damage(tmp_path, change):
    content = {"format": 1, **asdict(SMALL), "rows": [12, 14]}
    for changed, sound in ((content, True), ({**content, **change}, False)):
        checksum = hashlib.sha256(canonical_json(changed)).hexdigest()
        (tmp_path / "000003.0.json").write_bytes(canonical_json({**changed, "checksum": checksum}) + b"\n")
        if sound:  # the control: spelled here, it is a record
            assert Record.read(tmp_path / "000003.0.json") == SMALL
            continue
        with pytest.raises(CorruptFeatures):
            Record.read(tmp_path / "000003.0.json")


def of_layout(layout: Layout, rows: tuple[int, int], valid: list[bool], lengths: dict | None = None) -> Record:
    """A record as a writer would make it, of rows of any content."""
    crc32c = [7 if v else None for v in valid]
    files = {}
    for name, array in layout.arrays.items():
        packed = None if layout.compress == "none" else [n if v else None for n, v in zip(lengths[name], valid)]  # noqa: B905
        data = sum(n + 4 for n in (packed or [array.row_bytes if v else None for v in valid]) if n is not None)
        files[name] = ShardFile(data + 16 * layout.shard_rows + 4, 9, crc32c, packed)
    reasons = [None if v else {"reason": "empty", "detail": ""} for v in valid]
    files = files if any(valid) else {}
    return Record(layout.shard_of(rows[0]), 0, "f", "s", rows, reasons, [None] * len(valid), files)


def test_a_record_fits_its_layout_and_no_other():
    plain, packed = Layout(4, 3, 6, "int8"), Layout(4, 3, 6, "int8", "zstd")
    valid = [True, False, True]
    record = of_layout(plain, (4, 7), valid)
    assert record.fits(plain)
    assert of_layout(packed, (4, 7), valid, {"features": [9, 9, 11], "scales": [5, 5, 6]}).fits(packed)
    for other in (packed, Layout(4, 3, 6, "float16"), Layout(4, 3, 8, "int8"), Layout(5, 3, 6, "int8")):
        assert not record.fits(other), other
    features, scales = record.files["features"], record.files["scales"]
    for files in (
        {"features": features},
        {"features": features, "scales": replace(scales, size=scales.size + 1)},
        {"features": replace(features, size=features.size - 18), "scales": scales},
        {"features": features, "scales": scales, "more": scales},
        {"features": scales, "scales": features},
    ):
        assert not replace(record, files=files).fits(plain)


def test_a_record_of_rows_of_another_shard_does_not_fit():
    """It is whole and without a file to compare, as of a store with another shard size that was not fully dropped."""
    layout, valid = Layout(4, 3, 6, "float16"), [False, False]
    assert of_layout(layout, (4, 6), valid).fits(layout)
    for shard, rows in ((2, (4, 6)), (0, (3, 5)), (1, (7, 9))):
        assert not replace(of_layout(layout, rows, valid), shard=shard).fits(layout)


def test_revisions_are_counted_over_withdrawn_ones(tmp_path):
    assert revisions_of(tmp_path, 3) == ([], 0)
    for revision in range(3):
        (tmp_path / f"000003.{revision}.json").write_text("")
    (tmp_path / "000004.0.json").write_text("")
    withdraw(tmp_path / "000003.1.json")
    files, free = revisions_of(tmp_path, 3)
    assert ([f.name for f in files], free) == (["000003.2.json", "000003.0.json"], 3)
    assert (tmp_path / "000003.1.withdrawn").exists()
    (tmp_path / ".000009.0.json.private").write_text("")
    (tmp_path / "1000000.0.json").write_text("")
    assert latest_records(file.name for file in tmp_path.iterdir()) == {3: 2, 4: 0, 1000000: 0}
    names = ["000003.0.json", "000003.10.json", "000003.9.json", "000003.1.withdrawn", "000004.0.json", "000004.1.json"]
    names += ["000004.1.withdrawn", "000005.0.withdrawn", "000006.json", "x000007.0.json", "000008.0.json.private"]
    assert latest_records(names) == {3: 10, 4: 0}  # .1 of 4 was being withdrawn


def test_what_a_record_says_of_its_shard(small):
    store = small(rows=6, shape=(1, 2))
    store.features[4:6, 0] = [[3, 4], [6, 8]]
    record = store.fill({1: "truncated"}).group.record(1)
    assert (record.shard, record.revision, record.rows, record.num_valid) == (1, 0, (4, 6), 2)
    assert (record.fingerprint, record.segment) == (store.card["fingerprint"], store.builder.plan().segments[0].hash)
    data = store.shard_file(1).read_bytes()
    rows = [crc32c(data[0:8]), crc32c(data[12:20])]
    assert record.files == {"features": ShardFile(len(data), zlib.crc32(data), rows)}
    assert record.bytes == len(data) == 2 * 12 + 4 * 16 + 4
    assert record.images_sha256 == [hashlib.sha256(b"image %d" % i).hexdigest() for i in (4, 5)]
    assert record.norms == {"mean": 7.5, "min": 5.0, "max": 10.0}
    assert record.fidelity == {
        "cosine_mean": 1.0, "cosine_worst": 1.0, "relative_error_mean": 0.0, "relative_error_worst": 0.0,
    }  # fmt: skip
    assert record.timings["commit_s"] > 0
    first = store.group.record(0)
    assert first.reasons == [None, {"reason": "truncated", "detail": "detail of 1"}, None, None]
    assert [c is None for c in first.files["features"].rows_crc32c] == [False, True, False, False]
    assert first.files["features"].rows_bytes is None
    assert set(first.comparable()) == set(json.loads(store.record_file(0).read_bytes())) - {
        "checksum", "format", "host", "timings",
    }  # fmt: skip


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_what_a_record_says_of_two_arrays(small, compress):
    store = small(rows=3, shape=(2, 6), dtype="int8", compress=compress).fill({1: "empty"})
    record = store.group.record(0)
    assert list(record.files) == ["features", "scales"]
    for name, size in (("features", 12), ("scales", 8)):
        file, data = record.files[name], store.shard_file(0, name).read_bytes()
        assert (file.size, file.crc32) == (len(data), zlib.crc32(data))
        lengths = [size, size] if compress == "none" else [file.rows_bytes[0], file.rows_bytes[2]]
        assert file.rows_bytes == (None if compress == "none" else [lengths[0], None, lengths[1]])
        first, second = data[: lengths[0]], data[lengths[0] + 4 : lengths[0] + 4 + lengths[1]]
        assert file.rows_crc32c == [crc32c(first), None, crc32c(second)]
        assert len(data) == sum(lengths) + 2 * 4 + 4 * 16 + 4
    assert record.bytes == sum(file.size for file in record.files.values())
    cosines = [store.codec.encode(store.features[r])[2].cosine for r in (0, 2)]
    assert record.fidelity["cosine_mean"] == pytest.approx(sum(cosines) / 2, rel=1e-12)
    assert record.fidelity["cosine_worst"] == min(cosines) < 1


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_shard_without_a_valid_row_has_a_record_and_no_file(small, dtype):
    store = small(rows=4, dtype=dtype).fill(dict.fromkeys(range(4), "missing"))
    record = store.group.record(0)
    assert (record.files, record.num_valid, record.bytes, record.norms, record.fidelity) == ({}, 0, 0, {}, {})
    assert store.shards() == {}
    for name in store.arrays:
        store.shard_file(0, name).parent.mkdir(parents=True)
        store.shard_file(0, name).write_bytes(b"a stray file")
        with pytest.raises(CorruptFeatures):
            store.group.record(0)
        store.shard_file(0, name).unlink()
    assert store.group.record(0) == record


def test_the_highest_record_that_fits_its_file_counts(small):
    store = small(rows=4).fill({0: "missing"})
    old = store.record_file(0).read_bytes()
    store.fill(retry_failed=True)
    store.record_file(0).write_bytes(old)  # beside .1, which is of the file that is there
    assert store.group.record(0).revision == 1
    store.record_file(0, 1).write_bytes(b"damaged")
    with pytest.raises(CorruptFeatures, match=re.escape("000000.1.json is damaged")):
        store.group.record(0)
    assert valid_record(store.group.folder, store.group.layout, 7, store.card["fingerprint"]) is None


def test_a_record_of_another_card_or_plan_does_not_count(small):
    store, other = small("a", rows=4).fill(), small("b", rows=4)
    with pytest.raises(CorruptFeatures, match="of another card"):
        valid_record(store.group.folder, store.group.layout, 0, "another")
    plan = other.builder.plan()
    (other.path / "plan" / "00000.parquet").unlink()
    other.builder.extend_plan(plan.images.take(list(range(3, -1, -1))))
    for name in ("commits", "features"):
        (other.path / "depth" / name).rename(other.path / f".{name}.old")
        (store.path / "depth" / name).rename(other.path / "depth" / name)
    with pytest.raises(CorruptFeatures, match="was committed for another plan"):
        other.group.record(0)
    assert other.group.coverage().missing == 4


def test_a_record_withdrawn_while_it_is_looked_up_is_no_error(small, monkeypatch):
    """A reader lists .0, a writer withdraws it and publishes .1: the reader sees .1, not a missing file."""
    store = small(rows=4).fill({0: "missing"})
    read = Record.read

    def withdrawn_first(file):
        monkeypatch.setattr(Record, "read", read)
        store.fill(retry_failed=True)
        return read(file)

    monkeypatch.setattr(Record, "read", withdrawn_first)
    assert store.group.record(0).revision == 1


def test_nor_is_one_whose_file_is_replaced_meanwhile(small, monkeypatch):
    store = small(rows=4).fill({0: "missing"})
    read = Record.read

    def replaced_after(file):
        monkeypatch.setattr(Record, "read", read)
        record = read(file)
        store.fill(retry_failed=True)
        return record

    monkeypatch.setattr(Record, "read", replaced_after)
    assert store.group.record(0).revision == 1
