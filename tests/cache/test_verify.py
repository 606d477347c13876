"""`verify` finds what is not as it was written, says where, and finds nothing else."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from olavlm.cache import FeatureStore, Finding, StoreError, files, verify
from olavlm.cache.verify import open_teachers

STORAGE = [("float16", "none"), ("float32", "none"), ("int8", "none"), ("int4", "zstd"), ("float16", "zstd")]
SHARD = 1


def found(store, **options) -> list[tuple[int | None, str]]:
    return [(f.shard, f.kind) for f in verify(store.group, **options)]


def change(file, at: int, by: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= by
    file.write_bytes(data)


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_a_sound_store_has_no_findings(small, dtype, compress):
    store = small(dtype=dtype, compress=compress).fill({2: "missing", **dict.fromkeys(range(8, 10), "empty")})
    seen = []
    assert found(store, on_shard=seen.append) == []
    assert seen == [0, 1, 2]
    assert found(store, fast=True) == []


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_every_byte_of_a_shard_file_counts(small, dtype, compress):
    """And the control: `--fast`, which reads no feature, sees none of it."""
    store = small(dtype=dtype, compress=compress).fill({5: "missing"})
    for array in store.group.layout.arrays.values():
        file = array.file(store.group.folder, SHARD)
        for at in range(file.stat().st_size):
            change(file, at)
            findings = list(verify(store.group))
            assert {f.shard for f in findings} == {SHARD}
            assert "file" in {f.kind for f in findings}
            assert found(store, fast=True) == []
            change(file, at)
    assert found(store) == []


def test_it_names_the_row_and_the_image(small):
    store = small().fill({5: "missing"})
    change(store.shard_file(SHARD), 48 + 4)  # the second valid row of shard 1 is row 6
    row, file = verify(store.group)
    assert str(row) == "depth shard 1: row: features of row 6 (photos/00006.jpg)"
    assert str(file) == f"depth shard 1: file: {store.shard_file(SHARD)} has another crc32 than its record"


def test_the_index_alone(small):
    store = small().fill()
    change(store.shard_file(SHARD), -1)
    assert found(store) == [(SHARD, "index"), (SHARD, "file")]


@pytest.mark.parametrize("fast", [False, True])
def test_what_records_and_sizes_show(small, fast):
    store = small().fill()
    record, file = store.record_file(SHARD).read_bytes(), store.shard_file(SHARD).read_bytes()

    store.record_file(SHARD).write_bytes(record[:100])
    assert found(store, fast=fast) == [(SHARD, "record")]
    store.record_file(SHARD).unlink()
    assert found(store, fast=fast) == [(SHARD, "no-record")]
    store.record_file(SHARD).write_bytes(store.record_file(0).read_bytes())
    assert found(store, fast=fast) == [(SHARD, "record")]
    store.record_file(SHARD).write_bytes(record)

    for content in (file[:-1], file + b"\0", b""):
        store.shard_file(SHARD).write_bytes(content)
        assert found(store, fast=fast) == [(SHARD, "size")]
    store.shard_file(SHARD).unlink()
    assert found(store, fast=fast) == [(SHARD, "size")]
    store.shard_file(SHARD).write_bytes(file)
    assert found(store, fast=fast) == []


def test_a_superseded_record_that_was_never_withdrawn_must_be_whole_too(small):
    store = small(rows=4).fill({0: "missing"})
    old = store.record_file(0).read_bytes()
    store.fill(retry_failed=True)
    store.record_file(0).write_bytes(old)
    store.record_file(0).with_suffix(".withdrawn").unlink()
    assert found(store) == []
    store.record_file(0).write_bytes(old[:-2])
    assert found(store) == [(0, "record")]


def test_two_shards_with_their_files_exchanged(small):
    store = small().fill()
    a, b = store.shard_file(0), store.shard_file(1)
    swapped = a.read_bytes(), b.read_bytes()
    b.write_bytes(swapped[0]), a.write_bytes(swapped[1])
    assert {shard for shard, kind in found(store) if kind == "row"} == {0, 1}


def test_a_file_of_a_shard_without_a_valid_row(small):
    store = small(rows=4).fill(dict.fromkeys(range(4), "missing"))
    store.shard_file(0).parent.mkdir(parents=True)
    store.shard_file(0).write_bytes(b"")
    assert [kind for _, kind in found(store)] == ["size"]


def test_a_shard_that_is_being_written_is_its_writer_s(small):
    store = small()
    task = store.task(SHARD)
    seen = []

    def look(step):
        if step == "record":  # the file is placed, the record is not
            seen.extend([found(store), store.shard_file(SHARD).exists()])

    store.commit(task, on_step=look)
    assert seen == [[], True]
    store.record_file(SHARD).unlink()
    assert found(store) == [(SHARD, "no-record")]  # the control: nobody is at work on it


def test_an_array_too_small_for_the_plan(small):
    store = small(rows=5)
    metadata = store.path / "depth" / "features" / "zarr.json"
    before = metadata.read_bytes()
    store.builder.extend_plan(store.builder.plan().images.take([0, 1, 2, 3, 4]))
    assert found(store) == []
    metadata.write_bytes(before.replace(b"8,", b"4,", 1))
    assert found(store) == [(None, "metadata")]


def test_a_teacher_whose_metadata_is_damaged_is_a_finding_and_the_others_are_opened(small):
    store = small().fill()
    shutil.copytree(store.path / "depth", store.path / "seg")
    text = (store.path / "seg" / "zarr.json").read_text()
    (store.path / "seg" / "zarr.json").write_text(text.replace('"depth"', '"death"'))
    depth, seg = open_teachers(FeatureStore(store.path))
    assert depth.key == "depth"
    assert isinstance(seg, Finding)
    assert (seg.key, seg.shard, seg.kind) == ("seg", None, "metadata")
    with pytest.raises(StoreError, match="its card is not the one that was written"):
        FeatureStore(store.path)["seg"]


def test_reading_and_verifying_agree_on_random_damage(small, rng):
    store = small(rows=12, dtype="int8").fill()
    for _ in range(60):
        shard = int(rng.integers(3))
        file = store.group.layout.arrays[["features", "scales"][int(rng.integers(2))]].file(store.group.folder, shard)
        at, by = int(rng.integers(file.stat().st_size)), 1 << int(rng.integers(8))
        change(file, at, by)
        assert {f.shard for f in verify(store.group)} == {shard}
        group, raised = store.group, 0
        for row in range(12):
            try:
                np.testing.assert_allclose(group[row], store.features[row], atol=0.02)
            except ValueError:  # CorruptFeatures; an assertion is none
                raised += 1
                assert row // 4 == shard
        assert raised
        change(file, at, by)


def test_a_shard_whose_replacement_was_never_finished_is_told(small, start):
    store = small().fill({5: "missing"})
    task = store.task(SHARD, retry_failed=True)

    def die(step: str) -> None:
        if step == "place":
            os._exit(9)

    assert start(lambda child: store.commit(task, on_step=die)).wait() == 9
    assert found(store) == found(store, fast=True) == [(SHARD, "withdrawn")]
    store.fill()
    assert found(store) == []
    assert store.record_file(SHARD).with_suffix(".withdrawn").exists()  # the control: a replaced record is no finding
    store.builder.drop("depth")
    store.builder.ensure_teacher("depth", store.card, dtype="float32", shard_rows=4)
    assert found(store) == []


@pytest.mark.parametrize("damage", ["record", "cut short", "gone"])
def test_damage_stays_in_sight_until_the_shard_is_done_again(small, damage):
    store = small().fill()
    if damage == "record":
        change(store.record_file(SHARD), 100)
    elif damage == "cut short":
        os.truncate(store.shard_file(SHARD), 60)
    else:
        store.shard_file(SHARD).unlink()
    before = found(store)
    assert [shard for shard, _ in before] == [SHARD]
    task = store.task(SHARD)
    store.writer().begin(SHARD, (task.start, task.stop), task.segment).drop()
    store.writer().sweep(SHARD)  # as an extraction that was stopped does
    assert found(store) == before
    store.fill()
    assert found(store) == []


def test_what_the_disk_cannot_give_back_is_a_finding_and_the_rest_is_gone_over(small, monkeypatch):
    store = small(rows=16).fill()
    change(store.shard_file(3), 7)
    store.record_file(1).unlink()
    store.record_file(1).mkdir()
    lost = {store.shard_file(0), store.record_file(2)}

    class Unreadable:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc: object) -> None:
            self.file.close()

        def read(self, count: int):
            raise OSError(errno.EIO, "Input/output error")

    real, read = Path.open, files.read

    def refuse(file: Path) -> bytes:
        if file in lost:
            raise OSError(errno.EIO, "Input/output error", str(file))
        return read(file)

    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: (Unreadable if path in lost else lambda f: f)(real(path, *a, **k))
    )
    monkeypatch.setattr(files, "read", refuse)
    findings = list(verify(store.group))
    assert [(f.shard, f.kind) for f in findings] == [
        (0, "unreadable"),
        (1, "record"),
        (2, "record"),
        (3, "row"),
        (3, "file"),
    ]
    for finding, file in zip(findings, (store.shard_file(0), store.record_file(1), store.record_file(2)), strict=False):
        assert str(file) in finding.detail
    assert store.group.ledger().damaged.keys() == {2}
    assert store.group.missing_rows().tolist() == list(range(4, 12))


def test_a_badly_damaged_store_is_opened_once_more_and_not_for_every_shard(small, monkeypatch):
    store, opened = small(rows=40).fill(), []
    for shard in range(10):
        change(store.record_file(shard), 100)
    group, init = store.group, FeatureStore.__init__

    def counted(self, *args, **options) -> None:
        opened.append(args)
        init(self, *args, **options)

    monkeypatch.setattr(FeatureStore, "__init__", counted)
    assert len(list(verify(group))) == 10
    assert len(opened) == 1
