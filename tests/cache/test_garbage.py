"""`gc` removes what nobody needs, and nothing else."""

import os
import shutil
import time

import pytest

from olavlm.cache import FeatureStore
from olavlm.cache.garbage import collect

DAY = 86400.0


def everything(store) -> dict[str, bytes]:
    return {str(f.relative_to(store.path)): f.read_bytes() for f in sorted(store.path.rglob("*")) if f.is_file()}


def removed(store, **options) -> list[tuple[str, str]]:
    found = collect(str(store.path), **{"older_than": 0.0, **options})
    return sorted((g.what, os.path.relpath(g.path, store.path)) for g in found)


def test_a_tidy_store_is_left_alone(small):
    store = small().fill({1: "missing"})
    store.builder.index()
    before = everything(store)
    assert removed(store) == []
    assert everything(store) == before


def test_left_overs_of_killed_writers(small, start):
    store = small().fill({5: "missing"})
    good = everything(store)
    task = store.task(1, retry_failed=True)

    def die(child):
        with store.writer().begin(1, (task.start, task.stop), task.segment) as shard:
            store.append(shard, task)
            os._exit(9)

    start(die).wait()
    for folder in ("", "plan", "depth", "depth/commits", "depth/leases", "depth/features"):
        (store.path / folder / ".zarr.json.0123456789abcdef").write_bytes(b"half")
    (store.path / ".dropped.seg.0123").mkdir()
    (store.path / ".dropped.seg.0123" / "x").write_bytes(b"1234")
    (store.path / "seg").mkdir()
    shutil.copy(store.path / "depth" / "zarr.json", store.path / "seg" / "zarr.json")  # begun and never finished
    (store.path / "mine").mkdir()
    (store.path / "mine" / "zarr.json").write_bytes(b"{}")  # a user's own
    good["mine/zarr.json"] = b"{}"
    for name in (".gitignore", ".dvcignore", "depth/.README.md"):
        (store.path / name).write_bytes(good.setdefault(name, b"a user's own"))

    expected = removed(store, dry_run=True)
    assert len(everything(store)) == len(good) + 10  # a dry run removes nothing
    assert removed(store) == expected
    assert [what for what, _ in expected] == (
        ["dead lease"] + ["dropped or unfinished"] * 2 + ["private file"] * 6 + ["staged file"]
    )
    assert everything(store) == good
    assert removed(store) == []


def test_what_is_young_or_at_work_stays(small):
    store = small()
    task = store.task(1)
    private = store.path / "depth" / "commits" / ".000000.0.json.0123456789abcdef"
    with store.writer().begin(1, (task.start, task.stop), task.segment) as shard:
        store.append(shard, task)
        private.write_bytes(b"being written")
        assert removed(store, older_than=3600) == []
        shard.commit()
    yesterday = time.time() - DAY
    os.utime(private, (yesterday, yesterday))
    assert removed(store, older_than=3600) == [("private file", "depth/commits/.000000.0.json.0123456789abcdef")]
    assert store.group.record(1) is not None


def test_what_was_superseded(small):
    store = small(rows=8).fill({1: "missing", 5: "empty"})
    old = store.record_file(0).read_bytes()
    store.fill(retry_failed=True)
    store.record_file(0).write_bytes(old)  # never withdrawn
    store.record_file(0).with_suffix(".withdrawn").unlink()
    store.record_file(1).write_bytes(b"withdrawn, on an object store, by a writer that died before the removal")
    values = store.group.read(range(8))[0]
    assert removed(store) == [
        ("superseded record", "depth/commits/000000.0.json"),
        ("withdrawn record", "depth/commits/000000.0.withdrawn"),
        ("withdrawn record", "depth/commits/000001.0.json"),
        ("withdrawn record", "depth/commits/000001.0.withdrawn"),
    ]
    assert removed(store) == []
    assert (store.group.read(range(8))[0] == values).all()
    assert [store.group.record(s).revision for s in (0, 1)] == [1, 1]


def test_a_shard_file_that_no_record_vouches_for(small):
    store = small().fill()
    store.record_file(0).unlink()
    assert removed(store) == [("shard file without a record", "depth/features/c/0/0/0")]
    assert not store.shard_file(0).exists()
    assert store.group.missing_rows().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["record", "file"])
def test_damage_is_for_repair(small, damage):
    store = small().fill()
    (store.record_file(1) if damage == "record" else store.shard_file(1)).write_bytes(b"{")
    before = everything(store)
    assert removed(store) == []
    assert everything(store) == before
    assert FeatureStore(store.path)["depth"].coverage().missing == 4


def test_a_teacher_whose_metadata_was_lost_is_not_garbage(small):
    store = small().fill()
    (store.path / "depth" / "features" / "zarr.json").unlink()
    before = everything(store)
    assert removed(store) == []
    assert everything(store) == before
