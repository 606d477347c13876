"""When a cache pays: the arithmetic by hand, and what the dry run says of the recipe at hand."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import yaml

from olavlm.cache import FeatureStore
from olavlm.pipelines import train
from olavlm.pipelines.break_even import bytes_per_second, runs_to_pay, storage_seconds, waiting
from olavlm.pipelines.cache_cost import Load, known_step, needed_line, read_rate
from olavlm.pipelines.extraction.record import RunRecord, recorded_extractions
from olavlm.pipelines.extraction.stage_clock import Stages
from olavlm.pipelines.extraction.summary import Done, Tally


def test_rates_and_waits_by_hand():
    assert bytes_per_second(2_951_168, 2.0, 256) == 377_749_504
    # 4 devices, 8 samples in 2 s: 250 ms a sample; at 1 MB/s a row of 0.5 MB takes 500 ms, and all four wait for it.
    assert waiting(500_000, 2.0, 8, 4, 1e6) == pytest.approx(4 * 0.25)
    assert waiting(500_000, 4.0, 8, 4, 1e6) == 0.0
    # 2 TB-months at 20 a TB-month cost as much as 16 device-hours at 2.5.
    assert storage_seconds(1e12, 2, 20.0, 2.5) == pytest.approx(16 * 3600)


@pytest.mark.parametrize(
    ("extraction", "teachers", "stands", "runs"),
    [
        (10.0, 10.0, 0.0, 2),  # as fast in the loop: the first run is a draw
        (10.0, 25.0, 0.0, 1),
        (10.0, 4.0, 0.0, 3),  # 10 < 12
        (10.0, 5.0, 0.0, 3),  # two runs are a draw
        (10.0, 5.0, 4.0, 11),
        (10.0, 5.0, 5.0, None),
        (0.0, 1.0, 0.0, 1),
    ],
)
def test_the_first_run_that_is_cheaper(extraction, teachers, stands, runs):
    assert runs_to_pay(extraction, teachers, stands) == runs
    for n in range(1, 20):
        assert (extraction + n * stands < n * teachers) == (runs is not None and n >= runs)


@pytest.fixture
def record(store32):
    """record(keys, rows) leaves the record of an extraction in the shared store, until the test ends."""
    made = []

    def write(keys, rows=10, worker_seconds=5.0, device_seconds=4.0):
        there = set((store32 / "runs").glob("*.json"))
        teachers = {key: Done(1, rows, 100, 0) for key in keys}
        tally = Tally(teachers, worker_seconds=worker_seconds, stages=Stages(device=device_seconds), device="cpu")
        run = RunRecord(FeatureStore(store32).path, Namespace(store="x"), [])
        made.extend(set((store32 / "runs").glob("*.json")) - there)
        return run, tally

    yield write
    for file in made:
        file.unlink()


def test_what_is_on_record_adds_up(store32, record):
    path = FeatureStore(store32).path
    assert recorded_extractions(path, ["depth", "gen"]) is None
    run, tally = record(["depth"])
    assert recorded_extractions(path, ["depth"]) is None  # it has not ended
    run.end(tally, "done")
    assert recorded_extractions(path, ["depth", "gen"]) is None  # nothing says what gen cost
    run, tally = record(["gen", "seg"], rows=20, worker_seconds=2.0, device_seconds=1.0)
    run.end(tally, "done")
    found = recorded_extractions(path, ["depth", "gen"])
    assert (found.worker_seconds, found.device_seconds, found.images) == (7.0, 5.0, 15.0)
    assert (found.rows, found.devices, found.others) == ({"depth": 10, "gen": 20}, ["cpu"], ["seg"])
    (damaged, *_) = (store32 / "runs").glob("*.json")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-20])
    assert recorded_extractions(path, ["depth", "gen"]) is None
    damaged.write_bytes(content)


def test_the_dry_run_tells_the_cost(recipe, store32, record, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("olavlm.pipelines.dry_run.memory_lines", lambda *_: ["memory: takes long to estimate"])

    def told(*words):
        assert train.main(["pt", "--config", str(tmp_path / "r.yaml"), "--dry-run", *words]) == 0
        return capsys.readouterr().out

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(**{"train.epochs": 2, "targets.store": store32}).to_dict()))
    groups = [FeatureStore(store32)[key] for key in ("gen", "depth", "seg")]
    row = sum(group.layout.row_bytes for group in groups)
    out = told()
    assert f"targets: {row / 1e3:.4g} kB a sample, {row * 10 / 1e6:.4g} MB in the store" in out
    assert f"{row * 24 / 1e6:.4g} MB to read in a run" in out  # two epochs of three batches of four
    assert "by one reader (10 random rows of each teacher, " in out
    assert "a step; how long one takes is known once a run has written metrics.jsonl" in out
    assert "what it cost is not recorded in" in out
    assert "ANOTHER_STORE --dry-run" in out

    run, tally = record(["gen", "depth", "seg"], rows=10, worker_seconds=5.0, device_seconds=1.0)
    run.end(tally, "done")
    out = told()
    assert "0.0014 hours of cpu workers for 10 images: 500 ms an image, 100 ms of it in the teachers" in out
    assert "pays from run 3 on" in out  # 5 s once, 24 x 0.1 s a run
    assert "a run reads each target 2.4 times" in out

    for store in (store32, "null"):
        out = told("--targets.source=online", f"--targets.store={store}")
        assert "teachers in the loop: 24 images through each in a run" in out
        assert f"--store {'STORE' if store == 'null' else store} --dry-run" in out
        assert "targets: " not in out


def test_a_slow_disk_is_named():
    load = Load(samples=100, images=100, global_batch=8, image_share=0.5, devices=1)
    assert needed_line(1e6, load, 1e6, 2.0) == (
        "needed: 2 MB/s at 2.00 s a step (of an earlier run); at one reader's rate a step would wait 2.00 s for it"
    )
    assert needed_line(1e6, load, 1e7, 2.0).endswith("the disk gives more")
    assert needed_line(1e8, load, 1e7, None).startswith("needed: 400 MB/s at 1 s, 133 MB/s at 3 s, 40 MB/s at 10 s a")


def test_an_earlier_run_tells_how_long_a_step_takes(recipe, tmp_path):
    made = recipe()
    assert known_step(made) is None
    run = tmp_path / "pt"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(made.to_dict()))
    steps = [{"step": k, "step_ms": 9000.0 if k < 3 else 100.0 * k, "data_wait_ms": 50.0} for k in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert known_step(made) == pytest.approx(0.35)  # the median of 250, 350 and 450 ms
    assert known_step(recipe(**{"train.batch_size": 2})) is None
    (run / "metrics.jsonl").write_text("{")
    assert known_step(made) is None


def test_reading_says_whether_memory_held_the_rows(store32):
    store = FeatureStore(store32)
    groups = [store[key] for key in store.teachers]
    for group in groups:
        for file in (group.folder / "features" / "c").rglob("*"):
            if file.is_file():
                file.read_bytes()
    reading = read_rate(groups, store.rows.rows)
    assert reading.rows == 10
    assert min(reading.rate, reading.again) > 0
    assert reading.held in (1.0, None)
