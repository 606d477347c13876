"""What lands: the same bytes whatever the blocks, threads and order, and rows that keep their place."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from olavlm.cache import FeatureStore, ImageRoots, pending


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
def test_what_lands_is_what_the_teachers_answer(scene, dtype):
    scene = scene()
    store = scene.store(dtype=dtype)
    results = scene.worker(store).extract(scene.tasks(store))
    assert scene.outcomes(results) == {"committed": 7}
    opened = FeatureStore(store.path)
    for key, teacher in scene.teachers.items():
        codec = opened[key].layout.codec
        for name in scene.names:
            expected = codec.decode(codec.encode(teacher.features_of(Image.open(scene.images / name)))[0])
            np.testing.assert_array_equal(opened[key][name], expected)
        record = opened[key].record(0)
        assert record.images_sha256[3] == hashlib.sha256((scene.images / "3.png").read_bytes()).hexdigest()
        assert record.host["device"] == "cpu"
        assert {"extract_s", "forward_s", "commit_s"} <= record.timings.keys()
        assert sum(r.bytes for r in results if r.task.key == key) == opened[key].record(0).bytes + sum(
            opened[key].record(shard).bytes for shard in range(1, 3) if key != "c"
        )
    assert scene.left_over(store) == []


def test_the_same_bytes_and_records_for_any_blocks_threads_and_order(scene):
    scene = scene()
    whole = scene.store()
    assert scene.outcomes(scene.worker(whole, threads=1).extract(scene.tasks(whole))) == {"committed": 7}
    files, records = scene.files(whole), scene.records(whole)
    assert len(files) == 7

    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    tasks = scene.tasks(scene.store())
    shuffled = [tasks[i] for i in np.random.default_rng(seed).permutation(len(tasks))]
    for blocks, threads in [([[t] for t in shuffled], 3), ([shuffled[:3], shuffled[3:]], 4), ([tasks[::-1]], 2)]:
        store = scene.store()
        worker = scene.worker(store, threads)
        with ThreadPoolExecutor(2) as calls:
            results = [result for block in calls.map(worker.extract, blocks) for result in block]
        assert scene.outcomes(results) == {"committed": 7}
        assert scene.files(store) == files
        assert scene.records(store) == records
    # The control: another batch size is another thing only if the teacher's answers depend on it, and these do not.
    store = scene.store()
    scene.worker(store, batch_size=3).extract(tasks)
    assert scene.files(store) == files


def test_rejected_images_keep_their_place_and_the_last_batch_is_padded_with_zeros(scene):
    scene = scene(10)
    (scene.images / "1.png").write_bytes(b"")
    (scene.images / "8.png").unlink()
    (scene.images / "9.png").unlink()
    store = scene.store("a")
    results = scene.worker(store).extract(scene.tasks(store))
    assert [(r.outcome, r.quarantined) for r in results] == [("committed", 1), ("committed", 2)]
    teacher = scene.teachers["a"]
    size = scene.batch_size
    assert [batch.shape for batch in teacher.batches] == [(size, 3, 8, 8)] * 2  # none for the batch without an image
    assert (teacher.batches[0].reshape(size, -1).any(axis=1)).tolist() == [True, False, True, True]
    group = FeatureStore(store.path)["a"]
    assert [(row, error.reason) for row, error in group.failures()] == [(1, "empty"), (8, "missing"), (9, "missing")]
    assert group.record(0).images_sha256[1] == hashlib.sha256(b"").hexdigest()
    assert group.record(1).images_sha256 == [None, None]

    padded = scene.store("a")
    scene.worker(padded, batch_size=3).extract(scene.tasks(padded)[:1])
    assert [batch.any(axis=(1, 2, 3)).tolist() for batch in teacher.batches[2:]] == [
        [True, False, True], [True, True, True], [True, True, False],
    ]  # fmt: skip


def test_features_that_cannot_be_stored_are_quarantined(scene):
    scene = scene(8)

    def spoil(features):
        features[1, 3, 2] = np.nan
        features[2, 0, 0] = 70000
        return features

    scene.teachers["a"].after_forward = spoil
    store = scene.store("a")
    (result,) = scene.worker(store).extract(scene.tasks(store))
    assert (result.outcome, result.quarantined) == ("committed", 4)
    group = FeatureStore(store.path)["a"]
    assert [(row, error.reason) for row, error in group.failures()] == [
        (1, "non-finite"), (2, "overflow"), (5, "non-finite"), (6, "overflow"),
    ]  # fmt: skip
    assert None not in group.record(0).images_sha256


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_valid_row_whose_image_cannot_be_had_any_more_keeps_its_features(scene, dtype):
    scene = scene(10)
    store, good = scene.store("a", dtype), (scene.images / "3.png").read_bytes()
    (scene.images / "3.png").write_bytes(b"")
    (scene.images / "8.png").unlink()
    scene.worker(store).extract(scene.tasks(store))
    before = FeatureStore(store.path)["a"]
    stored, records = before.read(range(10))[0], [before.record(shard) for shard in (0, 1)]

    (scene.images / "3.png").write_bytes(good)  # mended
    for row in (4, 5, 6, 7):  # a batch of its own, with no image left
        (scene.images / f"{row}.png").unlink()
    (scene.images / "0.png").write_bytes(good[:100])  # damaged
    (scene.images / "1.png").write_bytes(good)  # another picture
    (result, other) = scene.worker(store).extract(pending(before, retry_failed=True))
    assert (result.outcome, result.quarantined, result.carried_over) == ("committed", 0, 5)
    assert (other.quarantined, other.carried_over) == (1, 0)

    after = FeatureStore(store.path)["a"]
    values, record = after.read(range(10))[0], after.record(0)
    np.testing.assert_array_equal(values[[0, 2, 4, 5, 6, 7, 9]], stored[[0, 2, 4, 5, 6, 7, 9]])
    np.testing.assert_array_equal(values[1], values[3])  # what can be read is extracted anew
    assert np.isfinite(values[3]).all()
    assert [failure.image for _, failure in after.failures()] == ["8.png"]
    kept = [0, 2, 4, 5, 6, 7]
    assert [record.images_sha256[i] for i in kept] == [records[0].images_sha256[i] for i in kept]
    assert record.images_sha256[1] == record.images_sha256[3] == hashlib.sha256(good).hexdigest()


def test_a_larger_limit_gives_up_no_row_that_was_there_and_damaged_ones_are_not_kept(scene):
    scene = scene(8)
    store = scene.store("a")
    worker = scene.worker(store)
    worker.extract(pending(store["a"], 4))
    before = FeatureStore(store.path)["a"].read(range(4))[0]
    file = store.path / "a" / "features" / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[before[0].nbytes // 2 + 4 + 7] ^= 1  # of row 1, in float16
    file.write_bytes(data)
    for row in (0, 1):
        (scene.images / f"{row}.png").unlink()
    (result,) = worker.extract(pending(FeatureStore(store.path)["a"]))
    assert (result.quarantined, result.carried_over) == (1, 1)
    after = FeatureStore(store.path)["a"]
    np.testing.assert_array_equal(after.read([0, 2, 3])[0], before[[0, 2, 3]])
    assert after.failure(1).reason == "missing"


def test_an_image_is_read_and_decoded_once_for_all_teachers_of_a_block(scene, monkeypatch):
    scene, read = scene(), []
    whole = ImageRoots.read
    monkeypatch.setattr(ImageRoots, "read", lambda self, image: read.append(image) or whole(self, image))
    store = scene.store()
    scene.worker(store).extract(scene.tasks(store))
    assert sorted(read) == sorted(scene.names)
    read.clear()  # the control: in blocks of their own it is once a teacher
    store = scene.store()
    worker = scene.worker(store)
    for task in scene.tasks(store):
        worker.extract([task])
    assert sorted(read) == sorted(3 * scene.names)


def test_a_teacher_that_changes_what_it_is_given_changes_it_for_no_other(scene):
    scene = scene()
    kept, changed = scene.store(), scene.store()
    scene.worker(kept).extract(scene.tasks(kept))
    for key in "ac":
        scene.teachers[key].before_prepare = lambda image: image.thumbnail((4, 4))
    scene.worker(changed).extract(scene.tasks(changed))
    same = {
        key: np.array_equal(*(FeatureStore(store.path)[key].read(range(20))[0] for store in (kept, changed)))
        for key in "abc"
    }
    assert same == {"a": False, "b": True, "c": False}
