"""olavlm-cache as its users see it: answers, exit status, and what it leaves behind."""

import argparse
import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from olavlm.cache import FeatureStore, StoreBuilder, pending
from olavlm.pipelines import store as store_command
from olavlm.pipelines.extraction.extractor import TeacherSpec
from olavlm.pipelines.extraction.record import Running, RunRecord, running_extractions
from olavlm.pipelines.extraction.summary import Tally
from olavlm.pipelines.reextract import spec_of
from olavlm.pipelines.store import main, running_job

BATCH = 4  # rows a shard of the shared stores, and their batch


@pytest.fixture
def store(store32, tmp_path):
    """A copy of the shared store, depth, gen and seg in float32."""
    return shutil.copytree(store32, tmp_path / "features")


@pytest.fixture
def answer(capsys):
    """answer(command, ...) -> (exit status, what it prints with --json)."""

    def ask(*words) -> tuple[int, dict]:
        status = main([str(w) for w in (*words, "--json")])
        return status, json.loads(capsys.readouterr().out)

    return ask


def shard_files(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.glob("*/*/c/**/*")) if f.is_file()}


def flip(file, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def commit_anew(folder, key: str, shard: int, change) -> None:
    """Replace a shard by other features, or with `change` None by rows in quarantine, with all its checksums right."""
    group = FeatureStore(folder)[key]
    record, rows = group.record(shard), list(range(*group.record(shard).rows))
    values, _ = group.read(rows)
    with StoreBuilder(folder).writer(group).begin(shard, record.rows, record.segment) as new:
        for row, sha256 in zip(rows, record.images_sha256, strict=True):
            if change is None:
                new.append(None, image_sha256=sha256, reason="missing")
            else:
                new.append(change(values[row - rows[0]]), image_sha256=sha256)
        new.commit()


class TestStatusAndInfo:
    def test_what_they_say(self, store, answer, capsys):
        status, value = answer("status", store)
        assert status == 0
        assert value["images"] == 10
        depth = value["teachers"]["depth"]
        assert (depth["valid"], depth["missing"], depth["complete"], depth["running"]) == (10, 0, True, None)
        assert depth["bytes"] == sum(len(b) for name, b in shard_files(store).items() if name.startswith("depth"))
        _, about = answer("info", store)
        depth = about["teachers"]["depth"]
        assert depth["shape"] == [10, 576, 32]
        assert (depth["dtype"], depth["compress"], depth["shards"]) == ("float32", "none", 3)
        assert depth["statistics"]["cosine_mean"] == 1.0
        assert depth["card"] == FeatureStore(store)["depth"].card
        assert main(["status", str(store)]) == main(["info", str(store)]) == 0
        text = capsys.readouterr().out
        assert "shape (10, 576, 32), float32, 4 rows a shard" in text

    def test_damage_is_told_and_counts_as_missing(self, store, answer, capsys):
        (store / "depth" / "commits" / "000001.0.json").write_bytes(b"{")
        (store / "gen" / "zarr.json").write_bytes(b"{")
        status, value = answer("status", store)
        assert status == 0
        assert value["teachers"]["depth"]["missing"] == 4
        assert list(value["teachers"]["depth"]["damaged_shards"]) == ["1"]
        assert "damaged" in value["teachers"]["gen"]
        assert value["teachers"]["seg"]["complete"]
        main(["status", str(store)])
        assert "commits/000001.0.json is damaged" in capsys.readouterr().out

    def test_a_running_job_has_a_rate_and_an_eta(self, store, monkeypatch):
        builder = StoreBuilder(store)
        group = FeatureStore(store)["depth"]
        assert running_job(group, Running(0.0, None)) is None
        for shard in range(3):
            builder.writer(group).sweep(shard, withdraw_all=True)
        tasks = pending(FeatureStore(store)["depth"])
        for task in tasks[:2]:
            with builder.writer(group).begin(task.shard, (task.start, task.stop), task.segment) as shard:
                for _ in range(task.num_rows):
                    shard.append(np.zeros((576, 32), np.float32), image_sha256=None)
                shard.commit()
        with builder.writer(group).begin(2, (8, 10), tasks[2].segment):
            ledger = group.ledger()
            ledger.times.update({0: time.time() - 100, 1: time.time() - 8})
            monkeypatch.setattr(type(group), "ledger", lambda self: ledger)
            job = running_job(group, Running(time.time() - 10, None))  # one shard of 4 rows since it began
            limited = running_job(group, Running(time.time() - 10, 9))
            no_extraction = running_job(group, None)
        assert (job["shards"], job["rows_wanted"]) == (1, 10)
        assert job["rows_per_second"] == pytest.approx(0.4, rel=0.05)
        assert job["eta_seconds"] == pytest.approx(5, rel=0.05)  # two rows are missing
        assert limited["eta_seconds"] == pytest.approx(2.5, rel=0.05)  # of those that it wants, one
        assert no_extraction["shards"] == 1
        assert no_extraction["rows_per_second"] is no_extraction["eta_seconds"] is None

    def test_which_extractions_run(self, store):
        """Those whose record does not say that they ended, and whose process is there."""

        def begin(key: str, **arguments) -> RunRecord:
            return RunRecord(store, argparse.Namespace(**arguments), [TeacherSpec(key, key)])

        assert running_extractions(store) == {}
        begin("gen", limit=None).end(Tally(), "done")
        begin("depth", limit=7)
        first = running_extractions(store)["depth"]
        assert (first.limit, time.time() - first.began) == (7, pytest.approx(0, abs=60))
        second = begin("depth", limit=9)
        assert list(running_extractions(store)) == ["depth"]
        assert running_extractions(store)["depth"] == Running(first.began, 9)
        second.end(Tally(), "stopped by SIGINT")
        assert running_extractions(store)["depth"].limit == 7
        for file in (store / "runs").glob("*.json"):
            run = json.loads(file.read_text())
            run["driver"]["started"] = "long ago"  # another process has its number now
            file.write_text(json.dumps(run))
        assert running_extractions(store) == {}
        (store / "runs" / "notes.json").write_text("[]")
        assert running_extractions(store) == {}


class TestVerify:
    def test_sound(self, store, answer):
        for options in ([], ["--fast"], ["--teacher", "gen"]):
            status, value = answer("verify", store, *options)
            assert (status, value["sound"], value["findings"]) == (0, True, [])
        assert list(value["checked"]) == ["gen"]

    def test_a_flipped_bit_is_found_and_not_by_fast(self, store, answer, capsys):
        flip(store / "seg" / "features" / "c" / "1" / "0" / "0")
        status, value = answer("verify", store)
        assert status == 1
        assert {(f["key"], f["shard"], f["kind"]) for f in value["findings"]} == {("seg", 1, "row"), ("seg", 1, "file")}
        assert answer("verify", store, "--fast")[0] == 0
        assert main(["verify", str(store)]) == 1
        assert "seg shard 1: row: features of row 4" in capsys.readouterr().out

    def test_live_finds_what_no_checksum_can(self, store, sample_images, answer):
        live = ["--live", 10, "--images", sample_images, "--teacher", "gen"]
        status, value = answer("verify", store, *live)
        assert (status, value["live"]["teachers"]["gen"]["rows"]) == (0, 10)
        assert value["live"]["teachers"]["gen"]["worst"] > 0.9999
        commit_anew(store, "gen", 1, lambda row: np.roll(row, 1, axis=-1))
        assert answer("verify", store)[0] == 0  # the control: every checksum is right
        status, value = answer("verify", store, *live, "--seed", 7)
        assert (status, value["live"]["seed"]) == (1, 7)
        assert {(f["shard"], f["kind"]) for f in value["findings"]} == {(1, "live")}
        assert len(value["findings"]) == 4

    @pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
    def test_live_compares_what_is_stored_alike(self, store, sample_images, tmp_path, answer, dtype):
        """Of int4 the rounding alone takes more from the cosine than `LIVE_COSINE` allows."""
        assert answer("convert", store, tmp_path / "small", "--dtype", dtype)[0] == 0
        live = ["--live", 10, "--images", sample_images, "--teacher", "depth"]
        status, value = answer("verify", tmp_path / "small", *live)
        assert (status, value["findings"]) == (0, [])
        assert value["live"]["teachers"]["depth"]["worst"] > 0.9999
        commit_anew(tmp_path / "small", "depth", 1, lambda row: np.roll(row, 1, axis=0))
        assert answer("verify", tmp_path / "small", *live)[0] == 1

    def test_live_finds_an_image_that_changed_and_one_that_is_gone(self, store, sample_images, tmp_path, answer):
        images = shutil.copytree(sample_images, tmp_path / "images")
        plan = FeatureStore(store).rows
        (images / plan.image_of(2)).unlink()
        shutil.copy(images / plan.image_of(4), images / plan.image_of(3))
        status, value = answer("verify", store, "--live", 10, "--images", images, "--teacher", "gen")
        assert status == 1
        details = " ".join(f["detail"] for f in value["findings"])
        assert "the image cannot be read now: missing" in details
        assert "the image is not the one that was extracted" in details
        assert {f"row {r} " in details for r in (2, 3)} == {True}

    def test_another_teacher_is_not_compared_with(self, store, sample_images, tiny, tmp_path, capsys):
        from olavlm.teachers.tiny import make_tiny

        other = make_tiny(tmp_path / "other", seed=1)["gen"]
        words = ["verify", store, "--live", "2", "--images", sample_images, "--teacher", "gen"]
        assert main([str(w) for w in [*words, "--model", f"gen={other}"]]) == 1
        assert "is not the teacher that filled" in capsys.readouterr().err
        assert main([str(w) for w in [*words, "--model", "gen"]]) == 2
        assert main([str(w) for w in [*words, "--model", f"gem={tiny['gen']}"]]) == 1
        assert "has no features 'gem'; it has " in capsys.readouterr().err
        assert main([str(w) for w in [*words, "--model", f"gen={tiny['gen']}"]]) == 0


def test_what_was_found_is_told_though_the_teachers_cannot_be_run(store, monkeypatch, capsys):
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0")
    assert main(["verify", str(store), "--live", "1"]) == 1
    said = capsys.readouterr().err
    assert "depth shard 0: row: " in said
    assert "give --images" in said

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("olavlm.pipelines.reextract.compare_live", stopped)
    assert main(["verify", str(store), "--live", "1"]) != 0
    assert "depth shard 0: row: " in capsys.readouterr().err


def test_verify_names_the_remedy_that_there_is(store, capsys):
    (store / "seg" / "zarr.json").write_bytes(b"{")
    assert main(["verify", str(store)]) == 1
    assert capsys.readouterr().out.endswith(
        "1 finding; restore these files from a copy, or drop seg and extract it anew\n"
    )
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0")
    assert main(["verify", str(store)]) == 1
    assert "; olavlm-cache repair" in capsys.readouterr().out


def test_repair_does_again_exactly_what_is_broken(store, sample_images, answer, capsys, without_ray):
    before = shard_files(store)
    untouched = store / "depth" / "commits" / "000001.0.json"
    record = untouched.read_bytes()
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0")
    (store / "depth" / "commits" / "000002.0.json").unlink()
    (store / "gen" / "features" / "c" / "1" / "0" / "0").unlink()
    one = ["--images", str(sample_images), "--workers", "1"]
    assert main(["repair", str(store), *one, "--teacher", "gen"]) == 0
    capsys.readouterr()
    assert answer("verify", store, "--teacher", "gen")[0] == 0
    assert answer("verify", store, "--teacher", "depth")[0] == 1  # the control: not asked for
    status, value = answer("repair", store, *one)
    assert (status, value["sound"], value["left"]) == (0, True, [])
    assert value["repaired"] == {"depth": [0, 2]}
    records = [json.loads(file.read_text()) for file in sorted((store / "runs").glob("*.json"))]
    repairs = [run for run in records if run["arguments"].get("command") == "repair"]
    assert sorted(run["cost"]["rows"] > 0 for run in repairs) == [True, True]
    assert {run["outcome"] for run in repairs} == {"done"}
    assert {tuple(run["arguments"]["images"]) for run in repairs} == {(str(sample_images),)}
    assert shard_files(store) == before
    assert untouched.read_bytes() == record
    assert answer("repair", store) == (0, {"findings": [], "repaired": {}, "sound": True})


def test_a_repair_computes_as_the_extraction_did():
    card = {"name": "depth", "model": "tiny/depth", "recipe": {"name": "last"}, "geometry": "pad"}
    group = SimpleNamespace(key="mine", card={**card, "revision": "abc", "compute_dtype": "bfloat16"})
    spec = spec_of(group, argparse.Namespace(model=[]))
    assert spec == TeacherSpec("mine", "depth", "tiny/depth", "abc", "last", "pad", "bfloat16")
    assert spec_of(group, argparse.Namespace(model=["mine=elsewhere"])).model == "elsewhere"


def test_repair_withdraws_nothing_that_it_cannot_make_again(store, sample_images, capsys):
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0")
    everything = {f: f.read_bytes() for f in store.rglob("*") if f.is_file()}
    assert main(["repair", str(store)]) == 1
    assert "give --images" in capsys.readouterr().err
    assert main(["repair", str(store), "--images", str(sample_images), "--model", "depth=nowhere"]) == 1
    assert {f: f.read_bytes() for f in store.rglob("*") if f.is_file()} == everything
    (store / "seg" / "zarr.json").write_bytes(b"{")
    assert main(["repair", str(store), "--images", str(sample_images), "--teacher", "seg"]) == 1
    assert "this is not mended by extracting again" in capsys.readouterr().err
    assert main(["repair", str(store), "--images", str(sample_images), "--workers", "1"]) == 1  # of the rest it mends
    said = capsys.readouterr().out
    assert "extracted again: depth shards 0" in said
    assert "seg: metadata" in said


def test_repair_touches_nothing_that_a_lost_plan_hides(store, sample_images, answer, capsys):
    everything = {f: f.read_bytes() for f in store.rglob("*") if f.is_file() and "plan" not in f.parts}
    (store / "plan" / "00000.parquet").rename(store / "lost")
    status, value = answer("verify", store)
    assert status == 1
    assert {f["kind"] for f in value["findings"]} == {"plan"}
    assert main(["repair", str(store), "--images", str(sample_images)]) == 1
    assert "this is not mended by extracting again" in capsys.readouterr().err
    (store / "lost").rename(store / "plan" / "00000.parquet")
    assert {f: f.read_bytes() for f in store.rglob("*") if f.is_file() and "plan" not in f.parts} == everything
    assert answer("verify", store)[0] == 0


def test_a_repair_that_was_stopped_is_run_again(store, sample_images, answer, monkeypatch, capsys, without_ray):
    from olavlm.pipelines.extraction import cluster

    before = shard_files(store)
    flip(store / "gen" / "features" / "c" / "1" / "0" / "0")
    with monkeypatch.context() as m:
        m.setattr(cluster, "run_tasks", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["repair", str(store), "--images", str(sample_images), "--workers", "1"]) == 1
    assert answer("verify", store)[0] == 1  # it is still known to be broken
    assert answer("repair", store, "--images", sample_images, "--workers", 1)[0] == 0
    assert shard_files(store) == before


def record_run(folder, name: str, images: list) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    arguments = {"images": [str(i) for i in images], "store": str(folder), "batch_size": BATCH}
    run = {"teachers": [{"key": key} for key in ("depth", "gen", "seg")], "arguments": arguments}
    (folder / "runs" / f"{name}.json").write_text(json.dumps(run))


ROW = 576 * 32 * 4 + 4  # bytes of a row of depth and its checksum


def test_repair_wants_every_image_root_on_record_that_it_needs(
    store, sample_images, tmp_path, answer, capsys, without_ray
):
    plan, before = FeatureStore(store).rows, shard_files(store)
    for row in range(10):
        root = tmp_path / ("a" if row < 4 else "b")
        (root / plan.image_of(row)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample_images / plan.image_of(row), root / plan.image_of(row))
    record_run(store, "20250101T000000Z-1", [tmp_path / "a"])
    record_run(store, "20250102T000000Z-1", [tmp_path / "b"])  # of a data set that has grown
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0", 2 * ROW)
    (tmp_path / "a").rename(tmp_path / "away")
    everything = {f: f.read_bytes() for f in store.rglob("*") if f.is_file()}
    assert main(["repair", str(store), "--workers", "1"]) == 1
    assert f"and {tmp_path / 'a'}, on record as an image root, is not here" in capsys.readouterr().err
    assert {f: f.read_bytes() for f in store.rglob("*") if f.is_file()} == everything

    flip(store / "gen" / "features" / "c" / "1" / "0" / "0")
    (status, value) = answer("repair", store, "--workers", 1, "--teacher", "gen")  # for which it takes b alone
    assert (status, value["repaired"]) == (0, {"gen": [1]})
    (record,) = (
        r for f in (store / "runs").glob("*.json") if "command" in (r := json.loads(f.read_text())["arguments"])
    )
    assert record["images"] == [str(tmp_path / "b"), str(tmp_path / "a")]  # for the next repair
    (tmp_path / "away").rename(tmp_path / "a")
    assert answer("repair", store, "--workers", 1)[0] == 0
    assert shard_files(store) == before


def test_repair_extracts_no_other_data_set_that_lies_where_the_roots_were(
    store, sample_images, tmp_path, answer, capsys, without_ray
):
    """Relative roots on record, and another project's `images` in the working directory."""
    images, before = shutil.copytree(sample_images, tmp_path / "images"), shard_files(store)
    record_run(store, "20250101T000000Z-1", [images])
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0")
    damaged, plan = shard_files(store), FeatureStore(store).rows
    kept = {row: (images / plan.image_of(row)).read_bytes() for row in range(10)}
    for row in kept:
        (images / plan.image_of(row)).write_bytes(kept[9 - row])
    assert main(["repair", str(store), "--workers", "1"]) == 1
    assert f"under {images} lie other images than those that were extracted" in capsys.readouterr().err
    record = store / "depth" / "commits" / "000000.0.json"
    intact = record.read_bytes()
    record.write_bytes(b"{")  # then those of the other shards tell
    assert main(["repair", str(store), "--workers", "1"]) == 1
    assert "lie other images than those that were extracted" in capsys.readouterr().err
    record.write_bytes(intact)
    assert shard_files(store) == damaged
    (images / plan.image_of(3)).write_bytes(kept[3])  # one that is the same: the others have changed since
    assert answer("repair", store, "--workers", 1)[1]["repaired"] == {"depth": [0]}
    assert shard_files(store) != before
    for row, content in kept.items():
        (images / plan.image_of(row)).write_bytes(content)
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0")
    for row in (0, 1, 2):  # which were extracted from other images now, and are meant to be these
        (images / plan.image_of(row)).write_bytes(kept[row])
    assert answer("repair", store, "--images", images, "--workers", 1)[0] == 0
    assert shard_files(store) == before


def test_repair_keeps_sound_rows_whose_images_are_gone_and_names_the_others(
    store, sample_images, tmp_path, answer, capsys, without_ray
):
    images, plan = shutil.copytree(sample_images, tmp_path / "images"), FeatureStore(store).rows
    before = FeatureStore(store)["depth"].read(range(10))[0]
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0", ROW + 100)
    for row in (1, 2):
        (images / plan.image_of(row)).unlink()
    status, value = answer("repair", store, "--images", images, "--workers", 1)
    assert (status, value["sound"], value["carried_over"], value["left"]) == (1, True, 1, [])
    assert [(r["row"], r["reason"]) for r in value["quarantined"]["depth"]] == [(1, "missing")]
    after, valid = FeatureStore(store)["depth"].read(range(10))
    assert np.flatnonzero(~valid).tolist() == [1]
    np.testing.assert_array_equal(after[valid], before[valid])
    flip(store / "depth" / "features" / "c" / "0" / "0" / "0", 100)
    assert main(["repair", str(store), "--images", str(images), "--workers", "1"]) == 0  # row 1 was known to be lost
    assert "1 valid row kept the features they had" in capsys.readouterr().out
    np.testing.assert_array_equal(FeatureStore(store)["depth"].read(range(10))[0], after)


def test_repair_does_again_what_a_replacement_left_undone(store, sample_images, answer, without_ray):
    before, group = shard_files(store), FeatureStore(store)["gen"]

    def fail(step: str) -> None:
        if step == "place":
            raise KeyboardInterrupt

    record = group.record(1)
    with StoreBuilder(store).writer(group, fail).begin(1, record.rows, record.segment) as shard:
        for row in range(*record.rows):
            shard.append(group[row], image_sha256=None)
        with pytest.raises(KeyboardInterrupt):
            shard.commit()
    status, value = answer("verify", store)
    assert (status, [(f["shard"], f["kind"]) for f in value["findings"]]) == (1, [(1, "withdrawn")])
    assert answer("repair", store, "--images", sample_images, "--workers", 1)[0] == 0
    assert shard_files(store) == before


def test_repair_removes_what_the_plan_has_no_shard_for(store, answer, monkeypatch):
    from olavlm.pipelines.extraction import cluster

    monkeypatch.setattr(cluster, "run_tasks", lambda *args: pytest.fail("there is nothing to extract"))
    before, lost = shard_files(store), store / "gen" / "features" / "c" / "99" / "0" / "0"
    lost.parent.mkdir(parents=True)
    shutil.copy(store / "gen" / "features" / "c" / "0" / "0" / "0", lost)
    (store / "gen" / "commits" / "000098.0.json").write_bytes(b"{")
    assert answer("verify", store)[0] == 1
    status, value = answer("repair", store)
    assert (status, value["repaired"], value["removed"]) == (0, {}, {"gen": [98, 99]})
    assert shard_files(store) == before
    assert answer("verify", store)[0] == 0


def test_convert_names_the_rows_that_the_dtype_cannot_hold(store, tmp_path, answer, capsys):
    commit_anew(store, "depth", 1, lambda row: np.where(np.arange(32) == 3, 1e6, row).astype(np.float32))
    words = ["convert", store, tmp_path / "half", "--dtype", "float16", "--teacher", "depth"]
    for copied in (3, 0):
        status, value = answer(*words)
        depth = value["teachers"]["depth"]
        assert (status, depth["copied"]) == (1, copied)
        assert [(r["row"], r["reason"]) for r in depth["quarantined"]] == [(row, "overflow") for row in range(4, 8)]
    assert main([str(w) for w in words]) == 1
    assert f"depth row 4 {FeatureStore(store).rows.image_of(4)}: overflow" in capsys.readouterr().out
    assert answer("merge", tmp_path / "both", tmp_path / "half")[0] == 0  # which names them too
    assert main(["merge", str(tmp_path / "both"), str(tmp_path / "half")]) == 0
    assert "depth row 7" in capsys.readouterr().out


def test_convert_reports_what_it_saved_and_what_it_cost(store, tmp_path, answer):
    status, value = answer("convert", store, tmp_path / "small", "--dtype", "int8", "--teacher", "depth")
    depth = value["teachers"]["depth"]
    assert (status, list(value["teachers"])) == (0, ["depth"])
    assert depth["from"] == {"dtype": "float32", "compress": "none", "bytes": 3 * 68 + 10 * (576 * 32 * 4 + 4)}
    assert depth["to"]["bytes"] == 2 * 3 * 68 + 10 * (576 * 32 + 4 + 576 * 4 + 4)
    assert depth["saved"] == pytest.approx(1 - depth["to"]["bytes"] / depth["from"]["bytes"])
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "small" / "runs").glob("*.json"))
    assert (record["arguments"]["dtype"], record["outcome"], record["teachers"]) == ("int8", "done", [])
    assert record["versions"]["zarr"]
    assert 0.999 < depth["fidelity"]["cosine_worst"] <= depth["fidelity"]["cosine_mean"] < 1
    assert answer("verify", tmp_path / "small")[0] == 0
    status, value = answer("convert", store, tmp_path / "archive", "--compress", "zstd")
    assert value["teachers"]["seg"]["fidelity"]["cosine_worst"] == 1.0
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "x"), "--dtype", "float16"]) == 1


def test_merge_gc_and_drop(store, tmp_path, answer, capsys):
    status, value = answer("merge", tmp_path / "new", store)
    assert status == 0
    assert {t["key"]: t["copied"] for t in value["transfers"]} == {"depth": 3, "gen": 3, "seg": 3}
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "new" / "runs").glob("*.json"))
    assert (record["arguments"]["command"], record["arguments"]["sources"]) == ("merge", [str(store)])
    assert shard_files(tmp_path / "new") == shard_files(store)
    (tmp_path / "new" / "depth" / "commits" / ".000000.0.json.0123456789abcdef").write_bytes(b"half")
    _, value = answer("gc", tmp_path / "new", "--older-than", 0, "--dry-run")
    assert [(i["what"], i["bytes"]) for i in value["items"]] == [("private file", 4)]
    _, value = answer("gc", tmp_path / "new", "--older-than", 0)
    assert value["bytes"] == 4
    assert answer("gc", tmp_path / "new", "--older-than", 0)[1]["items"] == []
    status, value = answer("drop", tmp_path / "new", "seg")
    assert (status, value["left"]) == (0, ["depth", "gen"])
    for words in ([], ["seg", "--teacher", "gen"]):
        assert main(["drop", str(tmp_path / "new"), *words]) == 2
    assert main(["drop", str(tmp_path / "new"), "seg"]) == 1
    assert "it has depth, gen" in capsys.readouterr().err


def test_a_merge_that_leaves_wanted_rows_behind_ends_with_1(store, tmp_path, answer):
    shutil.copytree(store, tmp_path / "new")
    damaged = shutil.copytree(store, tmp_path / "damaged")
    flip(damaged / "depth" / "features" / "c" / "0" / "0" / "0")
    (damaged / "gen" / "commits" / "000000.0.json").write_bytes(b"{")
    commit_anew(tmp_path / "new", "gen", 1, None)
    commit_anew(damaged, "gen", 1, None)
    assert answer("merge", tmp_path / "new", damaged)[0] == 0  # what is damaged there is here
    commit_anew(tmp_path / "new", "depth", 0, None)
    status, value = answer("merge", tmp_path / "new", damaged)  # and now it is quarantined
    assert (status, [len(t["damaged"]) for t in value["transfers"] if t["key"] == "depth"]) == (1, [1])
    assert answer("merge", tmp_path / "new", store)[0] == 0


@pytest.mark.parametrize("command", ["status", "info", "verify", "repair", "gc"])
def test_where_there_is_no_store(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert "is not a feature store" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["verify"],
        ["convert", "a"],
        ["merge", "a"],
        ["verify", "a", "--live", "x"],
        ["foo"],
        ["repair", "a", "--workers", "0"],
    ],
)
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_a_teacher_that_is_not_there(store, capsys):
    for command in (["verify"], ["repair"], ["convert", "out"]):
        assert main([command[0], str(store), *command[1:], "--teacher", "depht"]) == 1
        assert "has no features 'depht'; it has depth, gen, seg" in capsys.readouterr().err


def test_every_subcommand_shows_an_example_that_parses(capsys):
    for name in store_command.EXAMPLES:
        with pytest.raises(SystemExit) as left:
            store_command.main([name, "--help"])
        assert left.value.code == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("example: olavlm-cache ")]
        assert store_command.arguments().parse_args(line.split()[2:]).command == name
    subcommands = {"plan", "status", "info", "verify", "repair", "convert", "merge", "gc", "drop"}
    assert set(store_command.EXAMPLES) == subcommands
