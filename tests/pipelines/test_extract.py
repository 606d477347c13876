"""olavlm-extract: a Ray job that resumes, repeats nothing, survives kills, and says what is wrong in one line."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from olavlm.cache import CacheError, FeatureStore
from olavlm.cache.records import Record
from olavlm.pipelines.extract import main
from olavlm.teachers import load_teacher

SAMPLE_ROWS = 10


@pytest.fixture
def words(tiny, pt_json, sample_images, tmp_path):
    """Arguments of an extraction of one teacher into tmp_path/store."""

    def make(*more, teachers=("depth",), data=pt_json, roots=sample_images, store=tmp_path / "store"):
        named = [w for t in teachers for w in ("--teacher", f"{t}={tiny[t]}")]
        fixed = ["--data", data, "--images", roots, "--store", store, "--batch-size", 4, "--device", "cpu"]
        one = () if "--workers" in more else ("--workers", 1)  # more of them import for longer than they work
        return [str(w) for w in (*named, *fixed, *one, *more)]

    return make


def shard_bytes(store: Path) -> dict[str, bytes]:
    """What two runs must agree on: plan segments, shard files, and records without host and timings."""
    files = {str(f.relative_to(store)): f.read_bytes() for f in store.glob("plan/*.parquet")}
    files |= {str(f.relative_to(store)): f.read_bytes() for f in store.glob("*/features/c/*/0/0")}
    files |= {
        str(f.relative_to(store)): json.dumps(Record.read(f).comparable(), sort_keys=True).encode()
        for f in store.glob("*/commits/*.json")
    }
    return files


def committed_rows(store: Path, key: str) -> int:
    """Rows of a teacher that a reader finds; 0 as long as there is no store to read."""
    try:
        return FeatureStore(store)[key].coverage().valid
    except (CacheError, KeyError, OSError):
        return 0


def wait_for_rows(number: int, store: Path, key: str, extraction: subprocess.Popen) -> None:
    """Until so many rows are committed.

    The commit is made by an actor and said by nobody, and the standard library does not wait for files: the store is
    asked again and again, as long as the extraction lives, for two minutes at most.
    """
    deadline = time.monotonic() + 120
    while committed_rows(store, key) < number:
        assert time.monotonic() < deadline, f"fewer than {number} rows in two minutes"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = extraction.wait(0.02)
            raise AssertionError(f"the extraction ended with status {status} before it had {number} rows")


def test_all_teachers_at_once_equal_encode_and_a_second_run_does_nothing(
    words, tiny, pt_json, sample_images, tmp_path, capsys
):
    arguments = words("--shard-rows", 4, "--dtype", "float32", teachers=("depth", "seg", "gen"))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "extracted 30 rows" in out
    assert "is the bottleneck" in out
    store = FeatureStore(tmp_path / "store")
    assert store.teachers == ["depth", "gen", "seg"]
    (run,) = (json.loads(f.read_text()) for f in (tmp_path / "store" / "runs").glob("*.json"))
    cost = run["cost"]
    assert (run["outcome"], run["arguments"]["batch_size"], len(run["teachers"])) == ("done", 4, 3)
    assert (cost["rows"], cost["quarantined"], cost["workers"], cost["nodes"], cost["deaths"]) == (30, 0, 1, 1, 0)
    assert cost["bytes"] == sum(f.stat().st_size for f in (tmp_path / "store").glob("*/features/c/*/0/0"))
    assert cost["rows_per_second"] == pytest.approx(30 / (3600 * cost["hours"]))
    assert 0 < sum(cost["shares"].values()) <= 1
    from olavlm.cache import ImageRoots

    image = store.plan["image"][7].as_py()
    for name in store.teachers:
        teacher = load_teacher(name, model=tiny[name], device="cpu")
        expected = teacher.encode([ImageRoots([str(sample_images)]).open(image)])[0].numpy()
        np.testing.assert_allclose(store[name][image], expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(zarr.open_group(store.path, mode="r")[f"{name}/features"][7], store[name][7])

    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "store").glob("*/**/*") if f.is_file()}
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("all committed, nothing to do") == 3
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_one_teacher_at_a_time_and_any_number_of_workers_give_the_same_bytes(words, tmp_path, request):
    assert main(words("--shard-rows", 2, "--workers", 2, teachers=("depth", "gen"))) == 0
    request.getfixturevalue("without_ray")
    for name in ("gen", "depth"):
        assert main(words("--shard-rows", 2, "--workers", 1, teachers=(name,), store=tmp_path / "other")) == 0
    assert shard_bytes(tmp_path / "other") == shard_bytes(tmp_path / "store")
    assert len(shard_bytes(tmp_path / "store")) == 1 + 2 * 2 * 5


def test_killed_half_way_then_run_again_ends_with_the_same_bytes(words, tmp_path, without_ray):
    arguments = words("--shard-rows", 1, "--workers", 1, teachers=("seg",), store=tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "olavlm.pipelines.extract", *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_rows(3, tmp_path / "killed", "seg", process)
    os.kill(process.pid, signal.SIGKILL)  # the driver alone: its actors have to notice
    process.wait()
    rows = committed_rows(tmp_path / "killed", "seg")
    assert 3 <= rows < SAMPLE_ROWS, "the control: some shards were committed before the kill, not all"

    again = words("--shard-rows", 1, "--workers", 1, teachers=("seg",), store=tmp_path / "killed")
    assert main(again) == 0
    assert main(words("--shard-rows", 1, "--workers", 2, teachers=("seg",), store=tmp_path / "whole")) == 0
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("seg/leases/*"))
    assert not list((tmp_path / "killed").glob("seg/staging/*"))


def test_stopped_by_sigterm_it_drops_what_is_in_flight_and_exits_1(words, tmp_path):
    """SIGINT is `test_cluster`'s."""
    arguments = words("--shard-rows", 1, "--workers", 1, teachers=("seg",))
    process = subprocess.Popen(
        [sys.executable, "-m", "olavlm.pipelines.extract", *arguments], stderr=subprocess.PIPE, text=True
    )
    wait_for_rows(1, tmp_path / "store", "seg", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped by SIGTERM" in errors
    assert "Traceback" not in errors
    assert committed_rows(tmp_path / "store", "seg") < SAMPLE_ROWS, "the control: it was stopped before its end"
    assert not list((tmp_path / "store" / "seg" / "leases").iterdir())
    assert not list((tmp_path / "store" / "seg" / "staging").iterdir())


def test_stopped_by_sigterm_while_ray_starts(words, tmp_path):
    """Ray has a handler of its own then, which would exit without a word."""
    arguments = words("--shard-rows", 1, "--workers", 1, teachers=("seg",))
    process = subprocess.Popen(
        [sys.executable, "-m", "olavlm.pipelines.extract", *arguments], stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def started() -> bool:
        names = [Path(f"/proc/{child}/comm") for child in children.read_text().split()]
        return any(name.exists() and name.read_text().startswith("gcs_server") for name in names)

    while not started():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "stopped by SIGTERM" in errors
    assert "Traceback" not in errors
    (run,) = (tmp_path / "store" / "runs").glob("*.json")
    assert json.loads(run.read_text())["outcome"] == "stopped by SIGTERM"


def test_zip_gives_the_same_bytes_as_the_folder(words, sample_images, tmp_path, without_ray):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sample_images.iterdir():
            archive.write(file, file.name)
    assert main(words("--shard-rows", 4)) == 0
    assert main(words("--shard-rows", 4, roots=tmp_path / "images.zip", store=tmp_path / "zipped")) == 0
    assert shard_bytes(tmp_path / "zipped") == shard_bytes(tmp_path / "store")


def test_bad_images_are_quarantined_named_and_tried_again(words, sample_images, pt_json, tmp_path, capsys, without_ray):
    broken = tmp_path / "images"
    shutil.copytree(sample_images, broken)
    names = [s["image"] for s in json.loads(pt_json.read_text())]
    (broken / names[1]).unlink()
    (broken / names[2]).write_bytes(b"")
    (broken / names[5]).write_bytes(b"this is no image")
    whole = (broken / names[6]).read_bytes()
    (broken / names[6]).write_bytes(whole[: len(whole) // 2])
    arguments = words("--shard-rows", 4, roots=broken)
    for _ in range(2):  # on a re-run too
        assert main(arguments) == 1
        errors = capsys.readouterr().err
        for row, reason in ((1, "missing"), (2, "empty"), (5, "not-an-image"), (6, "truncated")):
            assert f"depth row {row}: {names[row]}: {reason}" in errors
        assert "4 rows quarantined, 0 missing" in errors
    store = FeatureStore(tmp_path / "store")
    values, valid = store["depth"].read(range(SAMPLE_ROWS))
    assert [i for i, ok in enumerate(valid) if not ok] == [1, 2, 5, 6]
    assert np.isnan(values[~valid]).all()
    assert np.isfinite(values[valid]).all()
    assert main([*arguments, "--limit", "1"]) == 0  # no wanted row is quarantined

    shutil.copytree(sample_images, broken, dirs_exist_ok=True)
    assert main([*arguments, "--retry-failed"]) == 0
    assert main(words("--shard-rows", 4, store=tmp_path / "good")) == 0
    repaired = FeatureStore(tmp_path / "store")["depth"]
    good = FeatureStore(tmp_path / "good")["depth"]
    np.testing.assert_array_equal(repaired.read(range(SAMPLE_ROWS))[0], good.read(range(SAMPLE_ROWS))[0])


def test_limit_then_all(words, tmp_path, without_ray):
    assert main(words("--shard-rows", 4, "--limit", 6)) == 0
    group = FeatureStore(tmp_path / "store")["depth"]
    assert group.shape[0] == SAMPLE_ROWS
    assert group.coverage().valid == 6
    assert main(words("--shard-rows", 4)) == 0
    assert main(words("--shard-rows", 4, store=tmp_path / "whole")) == 0
    rows = range(SAMPLE_ROWS)
    whole = FeatureStore(tmp_path / "whole")["depth"].read(rows)[0]
    np.testing.assert_array_equal(FeatureStore(tmp_path / "store")["depth"].read(rows)[0], whole)


def test_dry_run_writes_nothing(words, tmp_path, capsys):
    assert main(words("--dry-run", teachers=("depth", "gen"))) == 0
    out = capsys.readouterr().out
    assert "10 rows, 0 of 10 images tried cannot be read" in out
    assert re.search(r"^depth: 576 x 32 float16, 0.000 GB, 0 rows done; alone [\d.]+ rows/s a worker, ETA", out, re.M)
    assert "GB free" in out
    assert "with 1 cpu worker" in out
    assert not (tmp_path / "store").exists()


def test_dry_run_tells_what_is_done_and_what_would_be_refused(
    words, sample_images, pt_json, tmp_path, capsys, without_ray
):
    assert main(words("--shard-rows", 4, "--limit", 6, teachers=("gen",))) == 0
    capsys.readouterr()
    everything = {f: f.stat().st_mtime_ns for f in (tmp_path / "store").rglob("*")}
    assert main(words("--dry-run", "--workers", 2, "--limit", 7, teachers=("depth", "gen"))) == 0
    out = capsys.readouterr().out
    assert "7 rows" in out
    assert "depth: 576 x 32 float16, 0.000 GB, 0 rows done" in out
    assert "gen: 1 x 48 float16, 0.000 GB, 6 rows done" in out
    assert "cpu workers" in out
    assert main(words("--dry-run", "--dtype", "int8", teachers=("gen",))) == 1
    assert "a run would be refused" in capsys.readouterr().err
    assert main(words("--dry-run", "--dtype", "int8", "--replace", teachers=("gen",))) == 0
    assert main(words("--dry-run", "--shard-rows", 8, teachers=("gen",))) == 1
    assert "another card, dtype, compression or shard size" in capsys.readouterr().err
    samples = [{**sample, "image": f"other/{sample['image']}"} for sample in json.loads(pt_json.read_text())]
    (tmp_path / "other.json").write_text(json.dumps(samples))
    other = {"data": tmp_path / "other.json", "roots": f"other={sample_images}", "teachers": ("gen",)}
    assert main(words("--dry-run", **other)) == 1
    assert "the dataset is not the plan's" in capsys.readouterr().err
    assert main(words("--dry-run", "--replace", **other)) == 0
    assert "gen: 1 x 48 float16, 0.000 GB, 0 rows done" in capsys.readouterr().out
    assert main(words("--dry-run", "--worker-cpus", 10_000, teachers=("gen",))) == 1
    assert "there is no room for a cpu worker" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(words("--dry-run", roots=tmp_path / "empty")) == 1
    assert "none of 10 images can be read; the first: " in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "store").rglob("*")} == everything


def test_a_grown_dataset_is_appended(words, pt_json, tmp_path, capsys, without_ray):
    samples = json.loads(pt_json.read_text())
    (tmp_path / "half.json").write_text(json.dumps(samples[:4]))
    assert main(words("--shard-rows", 4, data=tmp_path / "half.json")) == 0
    before = shard_bytes(tmp_path / "store")
    assert main(words("--shard-rows", 4)) == 0
    assert "10 images, 6 of them new" in capsys.readouterr().out
    after = shard_bytes(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    store = FeatureStore(tmp_path / "store")
    assert store["depth"].coverage().valid == 10
    last = samples[-1]["image"]
    row = store.rows.row_of(last)
    np.testing.assert_array_equal(store["depth"][last], zarr.open_group(store.path)["depth/features"][row].astype("f4"))


@pytest.mark.usefixtures("without_ray")
class TestErrors:
    @pytest.mark.parametrize(
        ("change", "status", "message"),
        [
            ({"--teacher": "dpth"}, 2, "teacher 'dpth': unknown; use one of depth, seg, gen"),
            ({"--teacher": "depth=no/such/folder"}, 1, "no/such/folder"),
            ({"--teacher": "depth=someone/on-the-hub"}, 1, "someone/on-the-hub"),
            ({"--data": "none.json"}, 1, "dataset file none.json does not exist"),
            ({"--images": "none"}, 1, "image root none does not exist"),
            ({"--dtype": "float8"}, 2, "invalid choice"),
            ({"--limit": "0"}, 2, "not a positive number"),
            ({"--worker-gpus": "2"}, 2, "a worker computes on one GPU; give 1, or less to share it"),
            ({"--stall": "0"}, 2, "not a positive number"),
            ({"--recipe": "mean5"}, 2, "recipe 'mean5': unknown to depth; use one of mean4, last"),
            ({"--teacher": "dpth", "--as": "x"}, 2, "teacher 'dpth': unknown; use one of depth, seg, gen"),
            ({"--recipe": "mean5", "--as": "x"}, 2, "recipe 'mean5': unknown to depth; use one of mean4, last"),
            ({"--as": "plan"}, 2, "--as: store key 'plan' is not usable"),
            ({"--as": "a/b"}, 2, "--as: store key 'a/b' is not usable"),
            ({"--teacher": "gen="}, 2, "--teacher gen=: the model is empty; name a hub id or a folder"),
            ({"--teacher": "gen", "--model": ""}, 2, "--teacher gen: the model is empty; name a hub id or a folder"),
        ],
    )
    def test_one_line_and_the_right_status(self, words, tmp_path, change, status, message, capsys):
        arguments = words()
        for flag, value in change.items():
            if flag in arguments:
                arguments[arguments.index(flag) + 1] = value
            else:
                arguments += [flag, value]
        with pytest.raises(SystemExit) as ended:
            sys.exit(main(arguments))
        errors = capsys.readouterr().err
        assert ended.value.code == status, errors
        assert message in errors
        *usage, error = errors.splitlines()
        assert error.startswith("olavlm-extract: error: ")
        assert usage == [] or usage[0].startswith("usage: olavlm-extract"), "argparse shows the usage, we one line"
        assert "Traceback" not in errors
        assert not (tmp_path / "store").exists()

    def test_another_card_dtype_or_dataset_is_refused_with_the_difference(self, words, pt_json, tmp_path, capsys):
        assert main(words()) == 0
        for more, text in (
            (("--recipe", "last", "--as", "depth"), "recipe is"),
            (("--dtype", "float32"), "dtype is float16 there and float32 here"),
            (("--geometry", "pad"), 'geometry is "reference" there and "pad" here'),
        ):
            assert main(words(*more)) == 1
            assert text in capsys.readouterr().err
        (tmp_path / "other.json").write_text(json.dumps(json.loads(pt_json.read_text())[5:]))
        assert main(words(data=tmp_path / "other.json")) == 1
        assert "5 of its 10 images are not in the dataset" in capsys.readouterr().err
        assert main(words("--dtype", "float32", "--replace")) == 0
        assert FeatureStore(tmp_path / "store")["depth"].dtype == np.float32

    def test_flags_that_need_one_teacher(self, words, capsys):
        assert main(words("--recipe", "last", teachers=("depth", "seg"))) == 2
        assert "--recipe goes with exactly one --teacher; 2 were given" in capsys.readouterr().err

    def test_a_folder_with_other_content_is_no_store(self, words, tmp_path, capsys):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "thesis.tex").write_text("years of work")
        assert main(words()) == 1
        assert "is a folder with other content (thesis.tex, ...)" in capsys.readouterr().err
