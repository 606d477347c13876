"""The index of the records: what it says is what the records say, and it is never believed over them."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import BadImage, CorruptFeatures, FeatureStore, StoreBuilder
from olavlm.cache.ledger import Ledger, read_index, write_index
from olavlm.cache.records import Record, latest_records

REASONS = BadImage.REASONS
DTYPES = ["float16", "int8"]


@pytest.fixture
def parsed(monkeypatch):
    """The names of the records that were parsed since it was last cleared."""
    names, read = [], Record.read.__func__

    def counted(cls, file):
        names.append(file.name)
        return read(cls, file)

    monkeypatch.setattr(Record, "read", classmethod(counted))
    return names


def index_file(store):
    return store.path / "depth" / "index"


def by_the_records(store) -> dict:
    """Coverage, failures, missing rows, statistics, damaged shards and bytes, from every record by itself."""
    group = store.group
    shards = latest_records(os.listdir(group.folder / "commits"))  # noqa: PTH208
    records, damaged = [], set()
    for shard in sorted(shards):
        try:
            record = group.record(shard)
        except CorruptFeatures:
            damaged.add(shard)
            continue
        if record is not None:
            records.append(record)
    failures, covered = [], set()
    for record in records:
        covered.update(range(*record.rows))
        failures += [
            (record.rows[0] + i, reason["reason"], reason["detail"])
            for i, reason in enumerate(record.reasons)
            if reason is not None
        ]
    norms = [(r.num_valid, r.norms, r.fidelity) for r in records if r.num_valid]
    total = sum(n for n, _, _ in norms)
    statistics = {}
    if norms:
        statistics = {
            "cosine_mean": sum(n * f["cosine_mean"] for n, _, f in norms) / total,
            "cosine_worst": min(f["cosine_worst"] for _, _, f in norms),
            "relative_error_mean": sum(n * f["relative_error_mean"] for n, _, f in norms) / total,
            "relative_error_worst": max(f["relative_error_worst"] for _, _, f in norms),
            "norm_mean": sum(n * m["mean"] for n, m, _ in norms) / total,
            "norm_min": min(m["min"] for _, m, _ in norms),
            "norm_max": max(m["max"] for _, m, _ in norms),
        }
    return {
        "covered": sorted(covered),
        "failures": failures,
        "missing": [row for row in group.plan.rows.tolist() if row not in covered],
        "statistics": pytest.approx(statistics, rel=1e-12),
        "damaged": damaged,
        "bytes": sum(r.bytes for r in records),
        "shards": {r.shard: r.revision for r in records},
    }


def by_the_ledger(store) -> dict:
    """The same from a store opened anew, which uses the index if there is one."""
    group = store.group
    rows, ledger = group.plan.rows, group.ledger()
    coverage, table = group.coverage(), ledger.table
    failures = [(row, e.reason, e.detail) for row, e in group.failures()]
    assert coverage.reasons == Counter(reason for _, reason, _ in failures)
    assert coverage.quarantined == len(failures)
    assert coverage.missing == len(group.missing_rows())
    assert coverage.images == len(rows)
    return {
        "covered": rows[ledger.covered(rows)].tolist(),
        "failures": failures,
        "missing": group.missing_rows().tolist(),
        "statistics": group.info()["statistics"],
        "damaged": set(ledger.damaged),
        "bytes": group.info()["bytes"],
        "shards": dict(zip(table["shard"].to_pylist(), table["revision"].to_pylist(), strict=True)),
    }


def assert_same(store) -> dict:
    """Without an index, with one that may be old, and with a new one, the answers are those of the records."""
    expected = by_the_records(store)
    if index_file(store).exists():
        assert by_the_ledger(store) == expected
        kept = index_file(store).read_bytes()
        index_file(store).unlink()
        assert by_the_ledger(store) == expected
        index_file(store).write_bytes(kept)
    assert by_the_ledger(store) == expected
    store.builder.index()
    assert by_the_ledger(store) == expected
    return expected


def images(count: int) -> pa.LargeStringArray:
    return pa.array([f"photos/{i:05d}.jpg" for i in range(count)], pa.large_string())


def random_bad(rng, rows: np.ndarray, part: float) -> dict[int, str]:
    return {int(row): str(rng.choice(REASONS)) for row in rows if rng.random() < part}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_index_says_what_the_records_say_whatever_happened_to_the_store(small, rng, dtype):
    """Shards with failures, partial ones, replaced ones, a plan that grows, damage; in any order, each with an index
    that is as old as chance has it."""
    for trial in range(4):
        count = int(rng.integers(1, 30))
        store = small(f"store {trial}", rows=count, dtype=dtype, shard_rows=int(rng.choice([1, 2, 4, 8])))
        events = rng.choice(["fill", "retry", "grow", "tear", "cut", "lose", "withdraw", "index"], 12)
        for event in ["fill", *events]:
            rows = store.builder.plan().rows
            recorded = sorted(latest_records(os.listdir(store.path / "depth" / "commits")).items())  # noqa: PTH208
            if event == "fill":
                store.fill(random_bad(rng, rows, rng.choice([0, 0.2, 1])), limit=int(rng.integers(1, len(rows) + 1)))
            elif event == "retry":
                store.fill(random_bad(rng, rows, 0.1), limit=int(rng.integers(1, len(rows) + 1)), retry_failed=True)
            elif event == "grow" and len(rows) < 40:
                count += int(rng.integers(1, 5))
                plan, _ = store.builder.extend_plan(images(count))
                more = rng.standard_normal((plan.extent - len(store.features), 3, 4)).astype(np.float32)
                store.features = np.concatenate([store.features, more.astype("f2").astype("f4")])
            elif event == "index":
                store.builder.index()
            elif recorded:
                shard, revision = recorded[int(rng.integers(len(recorded)))]
                record, file = store.record_file(shard, revision), store.shard_file(shard, rng.choice(store.arrays))
                if event == "tear":
                    record.write_bytes(record.read_bytes()[: int(rng.integers(0, 50))])
                elif event == "withdraw":
                    store.writer().sweep(shard, withdraw_all=True)
                elif file.exists() and event == "cut":
                    os.truncate(file, file.stat().st_size - 1)
                elif file.exists():
                    file.unlink()
            if rng.random() < 0.4:
                assert_same(store)
        assert_same(store)
        store.fill()
        assert store.group.coverage().complete
        assert assert_same(store)["damaged"] == set()


@pytest.fixture(params=DTYPES)
def store(small, request):
    """Three shards, with failures, and an index of them."""
    store = small(dtype=request.param).fill({1: "truncated", 9: "missing"})
    store.builder.index()
    return store


def test_opening_with_an_index_parses_no_record(store, parsed):
    for look in (
        lambda group: group.coverage(),
        lambda group: group.failures(),
        lambda group: group.missing_rows(),
        lambda group: group.info(),
        lambda group: repr(group),
    ):
        look(store.group)
        assert parsed == []
    index_file(store).unlink()
    store.group.coverage()
    assert len(parsed) == 3  # the control


def test_without_an_index_a_reader_parses_each_record_once(small, parsed):
    depth = small().fill().group
    depth.coverage()
    parsed.clear()
    depth.coverage()
    depth.failures()
    assert parsed == []


def test_only_the_stale_line_is_made_anew(store, parsed):
    store.fill(limit=4, retry_failed=True)
    parsed.clear()
    assert store.group.coverage().quarantined == 1
    assert parsed == ["000000.1.json"]
    store.builder.index()
    parsed.clear()
    assert store.group.coverage().quarantined == 1
    assert parsed == []


def test_a_reader_that_keeps_its_ledger_sees_what_changed_since(store, parsed):
    depth = store.group
    assert depth.coverage().quarantined == 2
    store.fill(limit=4, retry_failed=True)
    parsed.clear()
    assert depth.coverage().quarantined == 1
    assert parsed == ["000000.1.json"]
    store.record_file(2).unlink()
    assert depth.coverage().missing == 2


def test_reading_a_row_checks_the_record_itself(store, parsed):
    store.group.read([0])
    assert parsed == ["000000.0.json"]
    store.record_file(0).write_bytes(store.record_file(0).read_bytes().replace(b"detail of 1", b"detail of 2"))
    with pytest.raises(CorruptFeatures):
        store.group[0]


def lines_of(store) -> dict[int, dict]:
    return {line["shard"]: line for line in read_index(store.group.folder, store.card["fingerprint"]).to_pylist()}


def test_writing_it_twice_does_not_change_it(store, parsed):
    before = index_file(store).read_bytes(), index_file(store).stat().st_ino, index_file(store).stat().st_mtime_ns
    store.builder.index()
    StoreBuilder(store.path).index()
    after = index_file(store).read_bytes(), index_file(store).stat().st_ino, index_file(store).stat().st_mtime_ns
    assert after == before
    assert parsed == []
    store.fill(limit=4, retry_failed=True)
    store.builder.index()
    assert index_file(store).read_bytes() != before[0]  # the control
    assert [line["revision"] for line in lines_of(store).values()] == [1, 0, 0]


def test_it_can_be_rebuilt_from_the_records_alone(store):
    before = index_file(store).read_bytes()
    index_file(store).unlink()
    store.builder.index()
    assert index_file(store).read_bytes() == before


def test_an_index_of_nothing(small, parsed):
    store = small()
    store.builder.index()
    expected = assert_same(store)
    assert (expected["covered"], expected["shards"]) == ([], {})
    store.fill()
    assert assert_same(store)["missing"] == []


# It is never believed over the records.


def changed_record(store) -> None:
    """One byte of it is another, its size and time are as they were."""
    file = store.record_file(0)
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"detail of 1", b"detail of 2"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns


def replaced_record(store) -> None:
    """Another whole record under the same name, as of a store that was restored from elsewhere."""
    record = store.group.record(0)
    store.record_file(0).unlink()
    reasons = [reason and {**reason, "reason": "empty"} for reason in record.reasons]
    replace(record, reasons=reasons).publish(store.record_file(0).parent)


def removed_record(store) -> None:
    store.record_file(0).unlink()


def withdrawn_record(store) -> None:
    store.writer().sweep(0, withdraw_all=True)


def superseded_record(store) -> None:
    store.fill(limit=4, retry_failed=True)


def torn_newer_record(store) -> None:
    store.record_file(0, 1).write_bytes(b"{")


def truncated_file(store) -> None:
    os.truncate(store.shard_file(0, store.arrays[-1]), 30)


def longer_file(store) -> None:
    with store.shard_file(0, store.arrays[-1]).open("ab") as file:
        file.write(b"\0")


def removed_file(store) -> None:
    store.shard_file(0, store.arrays[-1]).unlink()


def swapped_records(store) -> None:
    a, b = store.record_file(0), store.record_file(1)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)


def removed_all(store) -> None:
    shutil.rmtree(store.path / "depth" / "commits")
    (store.path / "depth" / "commits").mkdir()


CHANGES = [
    changed_record, replaced_record, removed_record, withdrawn_record, superseded_record, torn_newer_record,
    truncated_file, longer_file, removed_file, swapped_records, removed_all,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_it_was_written_is_seen(store, change):
    before = by_the_ledger(store)
    depth = store.group
    depth.coverage()
    change(store)
    expected = by_the_records(store)
    if change is not torn_newer_record:
        assert expected != before  # the control
    assert by_the_ledger(store) == expected
    assert depth.coverage() == store.group.coverage()  # nor is what a reader has in hand believed
    assert depth.missing_rows().tolist() == expected["missing"]
    store.builder.index()
    assert by_the_ledger(store) == expected
    assert_same(store)


def test_a_torn_record_beside_a_whole_older_one_does_not_hide_it(store):
    torn_newer_record(store)
    assert by_the_ledger(store)["shards"][0] == 0
    np.testing.assert_array_equal(store.group[0], store.expected[0])


def test_a_shard_added_after_it_was_written_is_seen(small):
    store = small().fill(limit=4)
    store.builder.index()
    assert len(lines_of(store)) == 1
    store.fill(limit=8)
    assert assert_same(store)["missing"] == [8, 9]


def test_a_shard_committed_for_more_rows_is_seen(small):
    store = small().fill(limit=5)
    store.builder.index()
    store.fill(limit=7)
    assert assert_same(store)["missing"] == [7, 8, 9]


def test_a_plan_that_grew_after_it_was_written(small):
    store = small(rows=10).fill({2: "empty"})
    store.builder.index()
    old = store.group
    store.builder.extend_plan(images(11))
    assert assert_same(store)["missing"] == [4096]
    store.features = np.concatenate([store.features, np.ones((4087, 3, 4), np.float32)])
    store.fill()
    assert assert_same(store)["missing"] == []
    # A reader of the plan as it was knows nothing of the new rows, whatever the index says.
    assert old.coverage().images == 10
    assert old.missing_rows().tolist() == []
    assert old.ledger().damaged == {}
    old._known = None
    assert str(old.coverage()) == "10 of 10 images: 9 valid, 1 quarantined (1 empty)"


def test_an_index_written_by_a_reader_of_the_smaller_plan_hides_nothing(small):
    store = small(rows=10).fill()
    old = store.group
    store.builder.extend_plan(images(11))
    store.features = np.concatenate([store.features, np.ones((4087, 3, 4), np.float32)])
    store.fill()
    write_index(old.folder, old.fingerprint, old.ledger())
    assert assert_same(store)["missing"] == []


def test_an_index_of_another_card_or_plan_is_not_used(small):
    store, other = small("a").fill({1: "empty"}), small("b").fill({2: "missing"})
    other.card = {**other.card, "size": [9, 9], "fingerprint": "other"}
    other.builder.ensure_teacher("depth", other.card, dtype="float32", shard_rows=4, replace=True)
    other.fill({2: "missing"})
    for s in (store, other):
        s.builder.index()
    kept = index_file(store).read_bytes()
    shutil.copy(index_file(store), index_file(other))
    assert read_index(other.group.folder, "other").num_rows == 0
    assert by_the_ledger(other) == by_the_records(other)
    shutil.copytree(store.path / "depth" / "commits", other.path / "depth" / "commits", dirs_exist_ok=True)
    assert by_the_ledger(other) == by_the_records(other)
    assert set(by_the_ledger(other)["damaged"]) == {0, 1, 2}
    store.builder.extend_plan(pa.array([f"x{i}" for i in range(10)], pa.large_string()), replace=True)
    store.builder.ensure_teacher("depth", store.card, dtype="float32", shard_rows=4)
    index_file(store).write_bytes(kept)
    assert by_the_ledger(store) == by_the_records(store)
    assert store.group.coverage().covered == 0


def test_records_of_another_plan_are_damaged_with_or_without_an_index(small):
    store = small().fill({1: "empty"})
    store.builder.index()
    plan = store.path / "plan" / "00000.parquet"
    plan.unlink()
    store.builder.extend_plan(pa.array([f"x{i}" for i in range(10)], pa.large_string()))
    assert assert_same(store)["damaged"] == {0, 1, 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_in_it_is_found_and_it_is_ignored(small, rng, parsed, dtype):
    store = small(dtype=dtype).fill({1: "truncated", 9: "missing"})
    store.builder.index()
    expected, sound, folder = by_the_ledger(store), index_file(store).read_bytes(), store.group.folder
    for at in range(len(sound)):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << int(rng.integers(8))
        index_file(store).write_bytes(damaged)
        assert read_index(folder, store.card["fingerprint"]).num_rows == 0
        if at % 400 == 0 or at in (31, 32, len(sound) - 1):
            parsed.clear()
            assert by_the_ledger(store) == expected
            assert len(parsed) >= 3
    index_file(store).write_bytes(sound)
    assert read_index(store.group.folder, store.card["fingerprint"]).num_rows == 3


def test_a_truncated_or_foreign_one_is_ignored(store):
    expected, sound = by_the_ledger(store), index_file(store).read_bytes()
    lengths = [0, 1, 31, 32, 33, *range(40, len(sound), 97), len(sound) - 1]
    for content in [*(sound[:length] for length in lengths), sound + b"\0", sound * 2, b"\0" * 99, b"ARROW1" * 9]:
        index_file(store).write_bytes(content)
        assert by_the_ledger(store) == expected
    store.builder.index()
    assert index_file(store).read_bytes() == sound


def test_an_index_of_another_format_number_is_ignored(store, monkeypatch, parsed):
    monkeypatch.setattr("olavlm.cache.ledger.INDEX_FORMAT", "0")
    write_index(store.group.folder, store.card["fingerprint"], store.group.ledger())
    monkeypatch.undo()
    assert read_index(store.group.folder, store.card["fingerprint"]).num_rows == 0
    assert by_the_ledger(store) == by_the_records(store)


def test_it_names_only_what_is_in_the_records(store):
    """What it holds of a shard, for whoever looks into it."""
    lines = lines_of(store)
    assert sorted(lines) == [0, 1, 2]
    content = json.loads(store.record_file(0).read_bytes())
    line = lines[0]
    assert [line["start"], line["stop"]] == content["rows"]
    assert line["segment"] == content["segment"]
    assert line["failures"] == [{"offset": 1, "reason": "truncated", "detail": "detail of 1"}]
    assert line["bytes"] == sum(file["size"] for file in content["files"].values())
    assert line["features_bytes"] == content["files"]["features"]["size"]
    assert line["norm_max"] == content["norms"]["max"]
    assert store.record_file(0).stat().st_size == int(line["stamp"].partition(":")[0])


def test_when_shards_were_committed(store):
    group = store.group
    times = Ledger.load(group.folder, group.layout, group.fingerprint, group.plan).times
    assert times == {shard: pytest.approx(store.record_file(shard).stat().st_mtime) for shard in range(3)}


def test_a_store_that_is_read_only_is_read_with_an_old_index(small_store, public_path, unprivileged):
    store = small_store(public_path / "store").fill(limit=8)
    store.builder.index()
    store.fill()

    def work():
        assert FeatureStore(store.path)["depth"].coverage().complete
        with pytest.raises(PermissionError):
            store.builder.index()

    unprivileged(work)
