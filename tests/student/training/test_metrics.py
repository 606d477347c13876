"""Trackers: the same numbers in each, and what a resumed run adds."""

import importlib.util
import json
import struct

import pytest
from PIL import Image

from olavlm.student import RecipeError, TrainingError
from olavlm.student.training import metrics as metrics_module
from olavlm.student.training.metrics import JsonLines, check_trackers, open_trackers, read_metrics
from olavlm.student.training.pictures import PictureTracker
from olavlm.student.training.trainer import train

STEPS = [(1, {"loss/total": 2.5, "lr": 0.1}), (2, {"loss/total": 1.5, "lr": 0.2}), (3, {"loss/total": 0.5, "lr": 0.0})]


def log(names, folder, first, steps):
    trackers = open_trackers(names, folder, first, {"stage": "pt"})
    for step, values in steps:
        for tracker in trackers:
            tracker.log(step, values)
    for tracker in trackers:
        tracker.close()


def test_lines_that_will_be_written_again_are_taken_out(tmp_path):
    log([], tmp_path, 0, STEPS)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "loss/to')  # cut short by a kill
    JsonLines(tmp_path / "metrics.jsonl", 1).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, **STEPS[0][1]}]


def test_tensorboard_gets_the_same_numbers_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(["tensorboard"], tmp_path, 0, STEPS)
    log(["tensorboard"], tmp_path, 2, STEPS[2:])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(e.step, e.value) for e in events.Scalars("loss/total")]
    assert logged == [(step, values["loss/total"]) for step, values in STEPS]


@pytest.fixture
def wandb(monkeypatch):
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return package


def records(file, block=2**15):
    """The records of a .wandb file: a log in LevelDB's format behind seven bytes of its own."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no header fits: zeros up to the next block
            at += block - at % block
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def history(folder):
    """(step, {metric: value}) of the offline runs below a folder, as `wandb sync` would send them; and their ids."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps, ids = [], set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, records(file)):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            elif record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                step = record.history.step.num
                steps.append((step, {k: v for k, v in items.items() if not k.startswith("_")}))
    return steps, ids


def test_wandb_gets_the_same_numbers_and_goes_on_in_the_same_run(tmp_path, wandb):
    log(["wandb"], tmp_path, 0, STEPS[:2])
    log(["wandb"], tmp_path, 2, STEPS[2:])
    steps, ids = history(tmp_path)
    assert steps == STEPS
    assert ids == {(tmp_path / "wandb" / "run-id").read_text()}


def test_wandb_has_pictures_in_the_step_they_are_of(tmp_path, wandb):
    _, tracker = open_trackers(["wandb"], tmp_path, 0, {})
    assert isinstance(tracker, PictureTracker)
    tracker.log(1, {"loss/total": 3.0})
    tracker.log_pictures(1, {"00-cat": Image.new("RGB", (5, 3))})
    tracker.log(2, {"loss/total": 2.0})
    tracker.close()
    (first, values), (second, rest) = history(tmp_path)[0]
    assert (first, second, rest) == (1, 2, {"loss/total": 2.0})
    assert values["loss/total"] == 3.0
    assert any(name.startswith("pictures/00-cat") for name in values)


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, wandb, monkeypatch):
    def init(**options):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(TrainingError, match="W&B: no API key; log in, set WANDB_MODE=offline"):
        log(["wandb"], tmp_path, 0, STEPS)


def test_a_missing_package_is_said_before_anything_is_read(monkeypatch, recipe, tmp_path):
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    with pytest.raises(RecipeError, match=r"train\.trackers has wandb, .*pip install 'olavlm\[wandb\]'"):
        train(recipe(**{"train.trackers": "[wandb]", "data.file": tmp_path / "missing.json"}), "pt", {})
    monkeypatch.undo()
    assert importlib.util.find_spec("json")


def test_a_run_logs_to_every_tracker_of_its_recipe(recipe, wandb):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(recipe(**{"train.max_steps": 2, "train.trackers": "[tensorboard, wandb]"}), "pt", {"test": "1"})
    expected = [(line.pop("step"), line) for line in read_metrics(folder / "metrics.jsonl")]
    assert history(folder)[0] == expected
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in expected[0][1]:
        logged = [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)]
        assert logged == [(step, values[name]) for step, values in expected]
