"""What waits for what, how long, and what a worker that is stopped leaves."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from olavlm.cache import ImageRoots, OpenShard
from olavlm.cache.lease import Lease
from olavlm.pipelines.extraction.extractor import BATCHES_AHEAD, COMMITS_BEHIND, WRITES_BEHIND


@pytest.mark.parametrize("blocks", ["one block", "two blocks"])
def test_the_next_shard_computes_while_one_is_committed(scene, monkeypatch, gate, blocks):
    scene = scene()
    store = scene.store("a")
    tasks, second = scene.tasks(store), threading.Event()
    teacher = scene.teachers["a"]
    teacher.after_forward = lambda features: (second.set() if len(teacher.batches) > 2 else None, features)[1]
    gate.hold_up_fsync(monkeypatch)
    worker = scene.worker(store)
    with ThreadPoolExecutor(2) as calls:
        given = [tasks] if blocks == "one block" else [tasks[:1], tasks[1:]]
        answers = [calls.submit(worker.extract, block) for block in given]
        assert gate.reached.wait(gate.patience)  # the first shard is at the disk
        assert second.wait(gate.patience)  # and the second at the device
        assert worker.watch().results == []
        gate.open()
        assert scene.outcomes(r for answer in answers for r in answer.result(gate.patience)) == {"committed": 3}


def test_a_slow_disk_holds_the_device_back(scene, monkeypatch, gate):
    """So that neither memory nor the disk's cache fills up."""
    scene = scene(160)
    store = scene.store("a")
    teacher, computed = scene.teachers["a"], threading.Semaphore(0)
    teacher.after_forward = lambda features: (computed.release(), features)[1]
    gate.hold_up_fsync(monkeypatch)
    worker = scene.worker(store)
    bound = 2 * (COMMITS_BEHIND + 1)  # batches of the shards that wait, of 8 rows
    with ThreadPoolExecutor(1) as calls:
        answer = calls.submit(worker.extract, scene.tasks(store))
        for _ in range(bound):
            assert computed.acquire(timeout=gate.patience)
        assert not computed.acquire(timeout=0.3)
        gate.open()
        assert scene.outcomes(answer.result(gate.patience)) == {"committed": 20}
    assert len(teacher.batches) == 40
    stages = worker.watch().stages
    assert stages.disk > max(0.3, stages.device, stages.images)


def test_features_wait_for_the_disk_but_not_without_bound(scene, monkeypatch, gate):
    scene = scene(32)
    store = scene.store("c")
    computed, append = threading.Semaphore(0), OpenShard.append_batch
    scene.teachers["c"].before_forward = lambda batch: computed.release()
    monkeypatch.setattr(OpenShard, "append_batch", lambda *a, **k: (gate(), append(*a, **k))[1])
    worker = scene.worker(store)
    with ThreadPoolExecutor(1) as calls:
        answer = calls.submit(worker.extract, scene.tasks(store))
        for _ in range(WRITES_BEHIND + 1):
            assert computed.acquire(timeout=gate.patience)
        assert not computed.acquire(timeout=0.2)
        gate.open()
        assert scene.outcomes(answer.result(gate.patience)) == {"committed": 1}


def test_images_are_prepared_ahead_and_not_without_bound(scene, gate):
    scene = scene(160)
    store = scene.store("ab")
    prepared = threading.Semaphore(0)
    for teacher in scene.teachers.values():
        teacher.before_prepare = lambda image: prepared.release()
    scene.teachers["a"].before_forward = gate
    worker = scene.worker(store)
    with ThreadPoolExecutor(1) as calls:
        answer = calls.submit(worker.extract, scene.tasks(store))
        bound = 2 * scene.batch_size * (1 + BATCHES_AHEAD)  # of two teachers
        for _ in range(bound):
            assert prepared.acquire(timeout=gate.patience)
        assert not prepared.acquire(timeout=0.2)
        gate.open()
        assert scene.outcomes(answer.result(gate.patience)) == {"committed": 40}


def test_leases_are_renewed_also_those_of_a_block_that_waits(scene, monkeypatch, gate):
    scene = scene()
    store = scene.store("ab")
    renewed = set()
    renew = Lease.renew
    monkeypatch.setattr(Lease, "renew", lambda self: renewed.add((self.folder.parent.name, self.shard)) or renew(self))
    tasks, teacher = scene.tasks(store), scene.teachers["a"]
    blocks = [[task for task in tasks if task.key == key] for key in "ab"]
    worker = scene.worker(store)
    teacher.before_forward = gate
    prepared = threading.Semaphore(0)
    scene.teachers["b"].before_prepare = lambda image: prepared.release()
    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(worker.extract, blocks[0])
        assert gate.reached.wait(gate.patience)
        second = calls.submit(worker.extract, blocks[1])
        for _ in range(scene.batch_size * (1 + BATCHES_AHEAD)):
            assert prepared.acquire(timeout=gate.patience)
        assert scene.teachers["b"].batches == []  # the device works on one block at a time
        gate.open()
        assert scene.outcomes(first.result(gate.patience) + second.result(gate.patience)) == {"committed": 6}
    assert renewed == {(key, shard) for key in "ab" for shard in range(3)}


def test_stopped_in_the_middle(scene, gate):
    scene = scene(40)
    whole = scene.store()
    scene.worker(whole).extract(scene.tasks(whole))

    store = scene.store()
    tasks = scene.tasks(store)
    worker = scene.worker(store)
    batches = scene.teachers["b"].batches
    batches.clear()
    scene.teachers["b"].before_forward = lambda batch: gate() if len(batches) == 5 else None  # of its third shard
    with ThreadPoolExecutor(2) as calls:
        answers = [calls.submit(worker.extract, block) for block in (tasks[:-1], tasks[-1:])]
        assert gate.reached.wait(gate.patience)
        worker.stop()
        gate.open()
        results = [result for answer in answers for result in answer.result(gate.patience)]
    assert scene.outcomes(results).keys() == {"committed", "dropped"}
    dropped = {(r.task.key, r.task.shard) for r in results if r.outcome == "dropped"}
    assert {("b", 2), ("b", 3), ("b", 4), ("c", 0)} <= dropped
    assert {(t.key, t.shard) for t in scene.tasks(store)} == dropped  # as the store says too
    assert scene.left_over(store) == []
    assert scene.outcomes(worker.extract(scene.tasks(store))) == {"dropped": len(dropped)}
    assert scene.outcomes(scene.worker(store).extract(scene.tasks(store))) == {"committed": len(dropped)}
    assert scene.files(store) == scene.files(whole)


@pytest.mark.parametrize("where", ["reading an image", "waiting for its turn", "at the disk"])
def test_stopped_while_it_waits(scene, monkeypatch, gate, where):
    """`extract` returns though its image has not come; a shard that the disk is at work on may be finished."""
    scene = scene()
    store = scene.store("a")
    waits = gate.reached
    if where == "reading an image":
        read, append, waits = ImageRoots.read, OpenShard.append_batch, threading.Event()
        monkeypatch.setattr(ImageRoots, "read", lambda self, image: (image == "5.png" and gate(), read(self, image))[1])
        monkeypatch.setattr(OpenShard, "append_batch", lambda *a, **k: (append(*a, **k), waits.set()))
    elif where == "waiting for its turn":
        scene.teachers["a"].before_forward = gate
    else:
        gate.hold_up_fsync(monkeypatch)
    tasks, worker = scene.tasks(store), scene.worker(store)
    with ThreadPoolExecutor(2) as calls:
        answers = [calls.submit(worker.extract, tasks[:1])]
        assert waits.wait(gate.patience)
        answers.append(calls.submit(worker.extract, tasks[1:]))
        worker.stop()
        if where != "reading an image":
            gate.open()
        results = [result for answer in answers for result in answer.result(gate.patience)]
        gate.open()
    left = scene.tasks(store)
    assert {result.task for result in results if result.outcome == "dropped"} == set(left)
    assert len(left) >= (3 - COMMITS_BEHIND if where == "at the disk" else 3)
    assert scene.left_over(store) == []
