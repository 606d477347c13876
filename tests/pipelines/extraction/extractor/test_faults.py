"""Faults that stay where they are, and other writers of the same store."""

import dataclasses

import pyarrow as pa
import pytest
import torch

from olavlm.cache import DatasetError, ImageRoots, OpenShard, StoreBuilder, StoreError, lease
from olavlm.pipelines.extraction import preparer
from olavlm.pipelines.extraction.extractor import ShardExtractor
from olavlm.pipelines.extraction.preflight import readable


@pytest.mark.parametrize("where", ["forward", "prepare", "decode", "features", "append_batch", "commit"])
def test_a_fault_of_one_shard_is_its_own(scene, monkeypatch, where):
    """Of row 10, in shard 1 of `a`. A decoder's fault is that of all who want the image."""
    scene, broken = scene(), True
    teacher, data = scene.teachers["a"], (scene.images / "10.png").read_bytes()
    picture = preparer.decode_rgb(data)
    pixels = teacher.prepare(picture)

    def break_down(on: bool) -> None:
        if broken and on:
            raise OSError(28, "No space\n  left")

    original = getattr(OpenShard, where, None)

    def at_disk(self, *args, **kwargs):
        break_down((self.shard, self.writer.group.name) == (1, "a"))
        return original(self, *args, **kwargs)

    def short(features):
        return features[:, 1:] if broken and (features[2] == features_of_10).all() else features

    features_of_10 = torch.from_numpy(teacher.features_of(picture))
    if where == "forward":
        teacher.before_forward = lambda batch: break_down((batch.numpy() == pixels).all(axis=(1, 2, 3)).any())
    elif where == "prepare":
        teacher.before_prepare = lambda image: break_down(image.tobytes() == picture.tobytes())
    elif where == "decode":
        decode = preparer.decode_rgb
        monkeypatch.setattr(preparer, "decode_rgb", lambda d, image: break_down(d == data) or decode(d, image))
    elif where == "features":
        teacher.after_forward = short
    else:
        monkeypatch.setattr(OpenShard, where, at_disk)

    store = scene.store()
    worker = scene.worker(store)
    results = worker.extract(scene.tasks(store))
    failed = [result for result in results if result.outcome == "failed"]
    expected = {("a", 1), ("b", 1), ("c", 0)} if where == "decode" else {("a", 1)}
    assert {(r.task.key, r.task.shard) for r in failed} == expected
    said = "ValueError: the teacher gave features (4, 15, 12) for a batch, its card says (4, 16, 12)"
    assert {r.detail for r in failed} == {said if where == "features" else "OSError: [Errno 28] No space left"}
    assert scene.outcomes(results) == {"committed": 7 - len(expected), "failed": len(expected)}
    assert scene.left_over(store) == []
    broken = False  # and the same worker does what is left
    assert scene.outcomes(worker.extract(scene.tasks(store))) == {"committed": len(expected)}


def test_a_teacher_that_is_not_the_stores_and_one_that_the_store_has_not(scene):
    scene = scene()
    store = scene.store()
    tasks = scene.tasks(store)
    scene.teachers["a"].card = dataclasses.replace(scene.teachers["a"].card, weights_sha256="f" * 64)
    worker = scene.worker(store)
    StoreBuilder(store.path).drop("b")
    results = worker.extract(tasks)
    details = {result.task.key: result.detail for result in results}
    assert details["a"].endswith("the teacher loaded here for 'a' is not the store's: the model files changed")
    assert "has no features 'b'" in details["b"]
    assert {result.task.key: result.outcome for result in results} == {"a": "failed", "b": "failed", "c": "committed"}
    assert worker.watch().results == results


def test_a_worker_without_the_store_says_so_before_it_has_work(scene, tmp_path):
    scene = scene()
    worker = ShardExtractor(
        str(tmp_path / "nothing"), [], [str(scene.images)], batch_size=scene.batch_size, device="cpu", threads=1
    )
    with pytest.raises(StoreError, match="is not a feature store"):
        worker.load()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("root", ["photos", "elsewhere"])
def test_a_worker_that_lacks_an_image_root_refuses_before_it_has_work(scene, tmp_path, root):
    """It would quarantine every image of that root. One that is missing for the driver too is no sign of it."""
    scene = scene()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos").symlink_to(scene.images)
    known = readable(ImageRoots([str(scene.images)]), pa.array(["no.png", *scene.names], pa.large_string()))
    assert known
    assert "no.png" not in known
    worker = ShardExtractor(
        str(scene.store().path),
        [],
        [str(tmp_path / root)],
        batch_size=scene.batch_size,
        device="cpu",
        threads=1,
        known_images=known,
    )
    if root == "photos":
        return worker.load()
    with pytest.raises(DatasetError, match=rf"'{known[0]}', which the driver reads, is missing here; mount"):
        worker.load()


def test_shards_of_other_writers_are_left_alone(scene):
    scene = scene()
    store = scene.store()
    tasks = scene.tasks(store)
    others = {task.shard: store["a"] for task in tasks if task.key == "a"}
    (first,) = (task for task in tasks if (task.key, task.shard) == ("a", 0))
    scene.worker(store).extract([first])
    writer = StoreBuilder(store.path).writer(store["a"])
    with writer.begin(1, (8, 16), others[1].plan.segments[0].hash):
        results = {(r.task.key, r.task.shard): r.outcome for r in scene.worker(store).extract(tasks)}
    assert results.pop(("a", 0)) == "done"
    assert results.pop(("a", 1)) == "held"
    assert set(results.values()) == {"committed"}
    assert scene.left_over(store) == []


def test_a_shard_that_is_taken_over_is_lost(scene):
    scene = scene()
    store = scene.store("a")

    def take_over(batch) -> None:
        (lease,) = (store.path / "a" / "leases").glob("000000.*")
        lease.write_text(lease.read_text().replace('"nonce": "', '"nonce": "of another '))
        scene.teachers["a"].before_forward = lambda batch: None

    scene.teachers["a"].before_forward = take_over
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "PATIENCE_SECONDS", 0)
        results = scene.worker(store).extract(scene.tasks(store))
    assert {r.task.shard: r.outcome for r in results} == {0: "lost", 1: "committed", 2: "committed"}


def test_a_device_that_is_beyond_use_ends_the_worker_and_not_shard_after_shard(scene):
    scene = scene()
    store = scene.store("a")

    def fault(batch) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    scene.teachers["a"].before_forward = fault
    worker = scene.worker(store)
    with pytest.raises(torch.AcceleratorError):
        worker.extract(scene.tasks(store))
    assert scene.outcomes(worker.watch().results) == {"dropped": 3}
    assert scene.left_over(store) == []
