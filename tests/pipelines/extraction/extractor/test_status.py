"""What a worker tells of itself: its slowest stage, its progress, its results."""

import dataclasses
import threading

import pytest

from olavlm.cache import ImageRoots, OpenShard
from olavlm.pipelines.extraction import stage_clock
from olavlm.pipelines.extraction.extractor import WorkerStatus
from olavlm.pipelines.extraction.stage_clock import StageClock, Stages


@pytest.mark.parametrize("slow", ["device", "images", "disk"])
def test_the_slowest_stage_is_named(scene, monkeypatch, slow):
    scene = scene()
    store = scene.store("a")
    wait = threading.Event().wait
    if slow == "device":
        scene.teachers["a"].before_forward = lambda batch: wait(0.05)
    elif slow == "images":
        read = ImageRoots.read
        monkeypatch.setattr(ImageRoots, "read", lambda self, image: (wait(0.02), read(self, image))[1])
    else:
        append = OpenShard.append_batch
        monkeypatch.setattr(OpenShard, "append_batch", lambda *a, **k: (wait(0.05), append(*a, **k))[1])
    worker = scene.worker(store, threads=1)
    worker.extract(scene.tasks(store))
    stages = dataclasses.asdict(worker.watch().stages)
    print(stages)
    assert max(stages, key=stages.get) == slow
    assert stages[slow] > 0.1


def test_stages_add_up_and_commits_count_only_while_nobody_computes(monkeypatch):
    assert Stages(1, 2, 3) + Stages(0.5, 0, 1) == Stages(1.5, 2, 4)
    now = 0.0
    monkeypatch.setattr(stage_clock.time, "perf_counter", lambda: now)
    clock = StageClock()
    with clock.last_commits():
        now = 1.0
        with clock.turn():  # another block computes
            now = 5.0
        now = 7.0
        assert clock.read() == Stages(0, 0, 3)
    now = 9.0
    clock.add("images", 1.0)
    assert clock.read() == Stages(0, 1, 3)


def test_progress_grows_and_a_result_is_told_once(scene):
    scene = scene()
    store = scene.store("a")
    worker = scene.worker(store)
    assert worker.watch() == WorkerStatus(0, [], Stages())
    looks = []
    scene.teachers["a"].before_forward = lambda batch: looks.append(worker.watch())
    results = worker.extract(scene.tasks(store))
    looks.append(worker.watch())
    progress = [look.progress for look in looks]
    assert progress == sorted(set(progress))
    assert progress[-1] == 20 + 5 + 5 + 3  # images, batches computed and written, shards
    told = [result for look in looks for result in look.results]
    assert sorted(result.task.shard for result in told) == [0, 1, 2]
    assert scene.outcomes(results) == scene.outcomes(told) == {"committed": 3}
    assert worker.watch().results == []
