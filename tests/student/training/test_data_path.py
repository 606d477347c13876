"""The meters of the data path move when it is slow, name what is slow, and stay at rest when it is not."""

import json
import time
from statistics import median

import pytest
import torch
from PIL import Image

from olavlm.cache import ImageRoots, TeacherFeatures
from olavlm.student.data.load_times import clocked, load_metrics
from olavlm.student.errors import RecipeError
from olavlm.student.training import data_watch
from olavlm.student.training.copy_clock import CopyClock
from olavlm.student.training.data_watch import WINDOW, DataWatch
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import train

SLOW = 0.6  # seconds: what a micro-batch is slowed by
STEPS = 7


@pytest.fixture
def short_run(recipe, pt_json, tmp_path, monkeypatch):
    """short_run(**overrides) -> metrics of a run over pictures that are decoded in no time."""
    images = tmp_path / "images"
    for sample in json.loads(pt_json.read_text()):
        (images / sample["image"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(images / sample["image"], "PNG")
    monkeypatch.setattr(data_watch, "WINDOW", STEPS - 2)

    def run(**overrides):
        settings = {"data.images": images, "data.workers": 1, "train.batch_size": 2, "train.save_every": 1000}
        settings |= {"train.epochs": 10, "train.max_steps": STEPS, "tasks.seg": "null", "tasks.gen": "null"}
        return read_metrics(train(recipe(**{**settings, **overrides}), "pt", {}) / "metrics.jsonl")

    return run


def slowed(monkeypatch, owner: type, name: str, seconds: float) -> None:
    """Inherited by the loader processes, which are forked."""
    real = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


def wait_share(metrics) -> float:
    return sum(step["data_wait_ms"] for step in metrics[1:]) / sum(step["step_ms"] for step in metrics[1:])


def test_control_a_quick_data_path_is_not_waited_for(short_run, monkeypatch, capfd):
    slowed(monkeypatch, OptimizerStep, "__call__", 0.1)
    metrics = short_run()
    assert wait_share(metrics) < 0.1
    assert "waits for data" not in capfd.readouterr().err
    for step in metrics:
        assert 0 <= step["h2d_ms"] < step["step_ms"]
        assert {name for name in step if name.startswith("load_")} == {
            "load_images_ms", "load_targets_ms", "load_text_ms"
        }  # fmt: skip
        assert all(step[name] > 0 for name in step if name.startswith("load_"))


@pytest.mark.parametrize(
    ("owner", "name", "calls", "part", "remedy"),
    [
        (ImageRoots, "open", 2, "images", "data.encoder_features, which are read in place of images"),
        (TeacherFeatures, "read_stored", 1, "targets", "a faster disk, or features in int8 (olavlm-cache convert"),
    ],
    ids=["images", "targets"],
)
def test_what_is_slowed_on_purpose_is_measured_and_named_once(
    short_run, monkeypatch, capfd, owner, name, calls, part, remedy
):
    slowed(monkeypatch, owner, name, SLOW / calls)
    metrics = short_run()
    assert wait_share(metrics) > 0.3
    assert median(step[f"load_{part}_ms"] for step in metrics) >= 1000 * SLOW
    others = {"images", "targets", "text"} - {part}
    assert all(median(step[f"load_{other}_ms"] for step in metrics) < 1000 * SLOW for other in others)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "waits for data" in line]
    assert line.startswith("warning: training waits for data: ")
    assert f"of the last {STEPS - 2} steps; loaders spend " in line
    assert f"% on {part}: " in line
    assert remedy in line


class TestWatch:
    def lines(self, watch, *phases):
        """What it says of phases, (steps, milliseconds waited of 100, milliseconds of loading by part)."""
        said = []
        for steps, waited, loads in phases:
            values = {"step_ms": 100.0, "data_wait_ms": waited, **{f"load_{k}_ms": v for k, v in loads.items()}}
            said += [line for _ in range(steps) if (line := watch.see(values))]
        return said

    @pytest.fixture
    def cores(self, monkeypatch):
        monkeypatch.setattr("os.cpu_count", lambda: 8)

    def test_the_first_step_and_a_little_waiting_are_nothing(self, recipe, cores):
        assert self.lines(DataWatch(recipe()), (1, 99.0, {}), (100, 10.0, {"images": 1.0})) == []

    def test_the_window(self, recipe, cores):
        phases = (1, 0.0, {}), (WINDOW - 1, 99.0, {"images": 1.0})
        assert self.lines(DataWatch(recipe()), *phases) == []
        assert len(self.lines(DataWatch(recipe()), *phases, (1, 99.0, {"images": 1.0}))) == 1

    def test_it_is_said_once_and_again_after_growing(self, recipe, cores):
        loads = {"images": 81.0, "targets": 9.0, "text": 10.0}
        made = recipe(**{"data.workers": 1})
        phases = (1 + WINDOW, 20.0), (15 * WINDOW, 29.0), (2 * WINDOW, 38.0), (15 * WINDOW, 40.0)
        said = self.lines(DataWatch(made), *((*phase, loads) for phase in phases))
        assert said == [
            f"training waits for data: {share} of the last 20 steps; loaders spend 81% on images: more data.workers "
            "(now 1, 8 cores a process), or data.encoder_features, which are read in place of images"
            for share in ("20%", "30%")  # of the window in which it has grown by half
        ]

    @pytest.mark.parametrize(
        ("settings", "processes", "part", "told"),
        [
            ({"data.workers": 0}, 1, "text",
             "loading, in the training process itself, spends 90% on text: more data.workers (now 0, 8 cores a pro"),
            ({"data.workers": 1}, 8, "text", "loaders spend 90% on text: faster cores"),
            ({"data.workers": 2}, 4, "targets",
             "90% on targets: a faster disk, or features in int8 (olavlm-cache convert --dtype int8)"),
            ({"data.workers": 2, "targets.store": "s3://b/s"}, 4, "targets",
             "on targets: targets.local_cache, if they are read more than once, or a store nearby, or features in"),
            ({"data.workers": 2, "targets.store": "s3://b/s", "targets.local_cache": "kept"}, 4, "targets",
             "on targets: a store nearby, or features in int8"),
            ({"data.workers": 2, "targets.source": "online"}, 4, "targets", "on targets: targets.source cache"),
            ({"data.workers": 2, "data.encoder_features": "features"}, 4, "encoder_features",
             "on features of the base encoder: a faster disk"),
        ],
    )  # fmt: skip
    def test_the_remedy(self, recipe, cores, settings, processes, part, told):
        watch = DataWatch(recipe(**settings), processes)
        (said,) = self.lines(watch, (1 + WINDOW, 50.0, {"images": 10.0, part: 90.0}))
        assert told in said


def test_times_of_parts_are_summed_over_micro_batches(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    first, second = {}, {}
    for times, part in ((first, "images"), (first, "text"), (second, "images")):
        with clocked(times, part):
            pass
    assert (first, second) == ({"images": 2.0, "text": 0.5}, {"images": 0.25})
    assert load_metrics([first, second]) == {"load_images_ms": 2250.0, "load_text_ms": 500.0}


class TestCopyClock:
    def test_the_hosts_clock(self, monkeypatch):
        clock, now = CopyClock(torch.device("cpu")), iter([1.0, 1.25, 5.0, 5.5])
        monkeypatch.setattr(time, "perf_counter", lambda: next(now))
        for _ in range(2):
            with clock.copies():
                pass
        assert (clock.take(), clock.take()) == (750.0, 0.0)

    def test_events_of_the_stream(self, monkeypatch):
        """Two a block, read when they are asked for and not before."""
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.number = len([entry for entry in log if entry == "event"])
                log.append("event")

            def record(self):
                log.append(f"record {self.number}")

            def synchronize(self):
                log.append(f"wait {self.number}")

            def elapsed_time(self, end):
                return 10.0 * (end.number - self.number)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        clock = CopyClock(torch.device("cuda"))
        for _ in range(2):
            with clock.copies():
                log.append("copies")
        assert log == [
            *["event"] * 2,
            "record 0",
            "copies",
            "record 1",
            *["event"] * 2,
            "record 2",
            "copies",
            "record 3",
        ]
        assert (clock.take(), clock.take()) == (20.0, 0.0)
        assert log[-2:] == ["wait 1", "wait 3"]


def test_a_local_cache_of_nothing(recipe):
    with pytest.raises(RecipeError, match=r"targets.local_cache_gb is 0.0: above 0; without a cache, leave"):
        recipe(**{"targets.local_cache_gb": 0})


def test_a_run_is_resumed_with_another_local_cache(recipe):
    assert recipe().hash() == recipe(**{"targets.local_cache": "kept", "targets.local_cache_gb": 5}).hash()
    assert recipe().hash() != recipe(**{"targets.geometry": "pad"}).hash()
