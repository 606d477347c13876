"""One worker: the same bytes whatever the blocks, threads and order; faults that stay where they are; what waits for
what, and what it says of it."""

import dataclasses
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from olavlm.cache import (
    DatasetError,
    FeatureStore,
    ImageRoots,
    OpenShard,
    ShardTask,
    StoreBuilder,
    StoreError,
    lease,
    pending,
)
from olavlm.cache.lease import Lease
from olavlm.pipelines.extraction import preparer, stage_clock
from olavlm.pipelines.extraction.extractor import (
    BATCHES_AHEAD,
    COMMITS_BEHIND,
    WRITES_BEHIND,
    ShardExtractor,
    TeacherSpec,
    WorkerStatus,
)
from olavlm.pipelines.extraction.preflight import readable
from olavlm.pipelines.extraction.stage_clock import StageClock, Stages
from olavlm.teachers import Card
from olavlm.teachers.registry import TEACHERS, Entry

BATCH = 4
PATIENCE = 30.0  # seconds, before something that should happen counts as hung


class Toy:
    """Features are the picture's 8 x 8 pixels in tokens of 12, plus the number of the teacher. Hooks may interfere."""

    def __init__(self, number: int, tokens: int = 16) -> None:
        self.number = number
        self.card = Card(
            name=f"toy{number}", model="none", weights_sha256=str(number) * 64, recipe={"name": "toy"},
            geometry="reference", size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), tokens=tokens, dim=192 // tokens,
            grid=(1, tokens),
        )  # fmt: skip
        self.batches: list[np.ndarray] = []
        self.before_prepare = self.before_forward = lambda given: None
        self.after_forward = lambda features: features

    def prepare(self, image: Image.Image) -> np.ndarray:
        self.before_prepare(image)
        return np.asarray(image.resize((8, 8))).transpose(2, 0, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.before_forward(batch)
        self.batches.append(batch.numpy().copy())
        features = batch.reshape(len(batch), self.card.tokens, self.card.dim).float() / 7 + self.number
        return self.after_forward(features)

    def features_of(self, picture: Image.Image) -> np.ndarray:
        return (self.prepare(picture).astype(np.float32) / 7 + self.number).reshape(self.card.tokens, self.card.dim)


class Scene:
    """A folder of images, toy teachers `a`, `b` and `c` (one token), and stores of them with shards of 8, 8 and 32."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        self.names = [f"{i}.png" for i in range(num_images)]
        rng = np.random.default_rng(0)
        for name in self.names:
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(self.images / name)
        self.teachers = {"a": Toy(1), "b": Toy(2), "c": Toy(3, tokens=1)}
        self._opened = 0

    def store(self, keys: str = "abc", dtype: str = "float16") -> FeatureStore:
        self._opened += 1
        builder = StoreBuilder(self.folder / f"store{self._opened}")
        builder.extend_plan(pa.array(self.names, pa.large_string()))
        for key in keys:
            card = self.teachers[key].card.to_dict()
            builder.ensure_teacher(key, card, dtype=dtype, shard_rows=32 if key == "c" else 8)
        return FeatureStore(builder.path)

    def worker(self, store: FeatureStore, threads: int = 2, batch_size: int = BATCH, **options) -> ShardExtractor:
        specs = [TeacherSpec(key, key) for key in store.teachers]
        images = [str(self.images)]
        worker = ShardExtractor(
            str(store.path), specs, images, batch_size=batch_size, device="cpu", threads=threads, **options
        )
        worker.load()
        return worker

    @staticmethod
    def tasks(store: FeatureStore) -> list[ShardTask]:
        opened = FeatureStore(store.path)
        return [task for key in opened.teachers for task in pending(opened[key])]

    @staticmethod
    def files(store: FeatureStore) -> dict[str, bytes]:
        return {
            str(f.relative_to(store.path)): f.read_bytes() for f in sorted(store.path.glob("*/*/c/**/*")) if f.is_file()
        }

    @staticmethod
    def records(store: FeatureStore) -> list[dict]:
        opened = FeatureStore(store.path)
        of_all = [opened[key].record(shard) for key in opened.teachers for shard in range(8)]
        return [record.comparable() for record in of_all if record is not None]

    @staticmethod
    def left_over(store: FeatureStore) -> list[str]:
        """Staged files and leases."""
        return [str(f) for folder in ("staging", "leases") for f in store.path.glob(f"*/{folder}/*")]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """scene(num_images=20) -> Scene; its teachers can be named. The disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def make(num_images: int = 20) -> Scene:
        scene = Scene(tmp_path, num_images)
        for key, teacher in scene.teachers.items():
            entry = Entry(model="none", recipes=("toy",), load=lambda teacher=teacher, **_: teacher)
            monkeypatch.setitem(TEACHERS, key, entry)
        return scene

    return make


def outcomes(results) -> dict[str, int]:
    found = [result.outcome for result in results]
    return {outcome: found.count(outcome) for outcome in sorted(set(found))}


# what lands


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
def test_what_lands_is_what_the_teachers_answer(scene, dtype):
    scene = scene()
    store = scene.store(dtype=dtype)
    results = scene.worker(store).extract(scene.tasks(store))
    assert outcomes(results) == {"committed": 7}
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
    assert outcomes(scene.worker(whole, threads=1).extract(scene.tasks(whole))) == {"committed": 7}
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
        assert outcomes(results) == {"committed": 7}
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
    assert [batch.shape for batch in teacher.batches] == [(BATCH, 3, 8, 8)] * 2  # none for the batch without an image
    assert (teacher.batches[0].reshape(BATCH, -1).any(axis=1)).tolist() == [True, False, True, True]
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


# faults


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
    assert outcomes(results) == {"committed": 7 - len(expected), "failed": len(expected)}
    assert scene.left_over(store) == []
    broken = False  # and the same worker does what is left
    assert outcomes(worker.extract(scene.tasks(store))) == {"committed": len(expected)}


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
        str(tmp_path / "nothing"), [], [str(scene.images)], batch_size=BATCH, device="cpu", threads=1
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
        batch_size=BATCH,
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
    assert outcomes(worker.watch().results) == {"dropped": 3}
    assert scene.left_over(store) == []


# what waits for what


class Gate:
    """Holds up whoever comes, once it is shut, until it is opened; `reached` tells that somebody came."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self._opened.wait(2 * PATIENCE)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()


def hold_up_fsync(monkeypatch, gate: Gate) -> None:
    """The disk takes no staged file."""

    def fsync(fd: int) -> None:
        if "/staging/" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            gate()

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("blocks", ["one block", "two blocks"])
def test_the_next_shard_computes_while_one_is_committed(scene, monkeypatch, gate, blocks):
    scene = scene()
    store = scene.store("a")
    tasks, second = scene.tasks(store), threading.Event()
    teacher = scene.teachers["a"]
    teacher.after_forward = lambda features: (second.set() if len(teacher.batches) > 2 else None, features)[1]
    hold_up_fsync(monkeypatch, gate)
    worker = scene.worker(store)
    with ThreadPoolExecutor(2) as calls:
        given = [tasks] if blocks == "one block" else [tasks[:1], tasks[1:]]
        answers = [calls.submit(worker.extract, block) for block in given]
        assert gate.reached.wait(PATIENCE)  # the first shard is at the disk
        assert second.wait(PATIENCE)  # and the second at the device
        assert worker.watch().results == []
        gate.open()
        assert outcomes(r for answer in answers for r in answer.result(PATIENCE)) == {"committed": 3}


def test_a_slow_disk_holds_the_device_back(scene, monkeypatch, gate):
    """So that neither memory nor the disk's cache fills up."""
    scene = scene(160)
    store = scene.store("a")
    teacher, computed = scene.teachers["a"], threading.Semaphore(0)
    teacher.after_forward = lambda features: (computed.release(), features)[1]
    hold_up_fsync(monkeypatch, gate)
    worker = scene.worker(store)
    bound = 2 * (COMMITS_BEHIND + 1)  # batches of the shards that wait, of 8 rows
    with ThreadPoolExecutor(1) as calls:
        answer = calls.submit(worker.extract, scene.tasks(store))
        for _ in range(bound):
            assert computed.acquire(timeout=PATIENCE)
        assert not computed.acquire(timeout=0.3)
        gate.open()
        assert outcomes(answer.result(PATIENCE)) == {"committed": 20}
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
            assert computed.acquire(timeout=PATIENCE)
        assert not computed.acquire(timeout=0.2)
        gate.open()
        assert outcomes(answer.result(PATIENCE)) == {"committed": 1}


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
        bound = 2 * BATCH * (1 + BATCHES_AHEAD)  # of two teachers
        for _ in range(bound):
            assert prepared.acquire(timeout=PATIENCE)
        assert not prepared.acquire(timeout=0.2)
        gate.open()
        assert outcomes(answer.result(PATIENCE)) == {"committed": 40}


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


# looks from outside


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
    assert outcomes(results) == outcomes(told) == {"committed": 3}
    assert worker.watch().results == []


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
        assert gate.reached.wait(PATIENCE)
        second = calls.submit(worker.extract, blocks[1])
        for _ in range(BATCH * (1 + BATCHES_AHEAD)):
            assert prepared.acquire(timeout=PATIENCE)
        assert scene.teachers["b"].batches == []  # the device works on one block at a time
        gate.open()
        assert outcomes(first.result(PATIENCE) + second.result(PATIENCE)) == {"committed": 6}
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
        assert gate.reached.wait(PATIENCE)
        worker.stop()
        gate.open()
        results = [result for answer in answers for result in answer.result(PATIENCE)]
    assert outcomes(results).keys() == {"committed", "dropped"}
    dropped = {(r.task.key, r.task.shard) for r in results if r.outcome == "dropped"}
    assert {("b", 2), ("b", 3), ("b", 4), ("c", 0)} <= dropped
    assert {(t.key, t.shard) for t in scene.tasks(store)} == dropped  # as the store says too
    assert scene.left_over(store) == []
    assert outcomes(worker.extract(scene.tasks(store))) == {"dropped": len(dropped)}
    assert outcomes(scene.worker(store).extract(scene.tasks(store))) == {"committed": len(dropped)}
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
        hold_up_fsync(monkeypatch, gate)
    tasks, worker = scene.tasks(store), scene.worker(store)
    with ThreadPoolExecutor(2) as calls:
        answers = [calls.submit(worker.extract, tasks[:1])]
        assert waits.wait(PATIENCE)
        answers.append(calls.submit(worker.extract, tasks[1:]))
        worker.stop()
        if where != "reading an image":
            gate.open()
        results = [result for answer in answers for result in answer.result(PATIENCE)]
        gate.open()
    left = scene.tasks(store)
    assert {result.task for result in results if result.outcome == "dropped"} == set(left)
    assert len(left) >= (3 - COMMITS_BEHIND if where == "at the disk" else 3)
    assert scene.left_over(store) == []


# how it computes


def test_one_compute_thread_whatever_thread_asks(scene):
    scene = scene()
    store = scene.store("a")
    seen = []
    scene.teachers["a"].before_forward = lambda batch: seen.append(torch.get_num_threads())
    worker = scene.worker(store)
    with ThreadPoolExecutor(1) as other:
        other.submit(worker.extract, scene.tasks(store)).result()
    assert set(seen) == {1}


def test_what_is_compiled_is_the_forward_and_only_when_asked(scene, monkeypatch):
    scene, compiled = scene(), []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    store = scene.store("a")
    scene.worker(store)
    assert compiled == []
    scene.worker(store, compile=True)
    assert compiled == [scene.teachers["a"].forward]


def test_channels_last_where_patches_overlap(scene):
    scene = scene()
    store = scene.store("ab")
    networks = {"a": torch.nn.Conv2d(3, 4, kernel_size=3), "b": torch.nn.Conv2d(3, 4, kernel_size=4, stride=4)}
    for key, network in networks.items():
        scene.teachers[key].network = torch.nn.Sequential(network)
    scene.worker(store)
    is_last = {k: n.weight.is_contiguous(memory_format=torch.channels_last) for k, n in networks.items()}
    assert is_last == {"a": True, "b": False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_gpu_gives_the_same_bytes_each_time_and_nearly_those_of_the_cpu(tiny, sample_images, tmp_path, dtype):
    specs = [TeacherSpec(name, name, str(tiny[name])) for name in ("depth", "seg", "gen")]
    images = sorted(file.name for file in sample_images.iterdir())[:10]
    stores = {}
    for name, device in {"cpu": "cpu", "gpu": "cuda", "again": "cuda"}.items():
        builder = StoreBuilder(tmp_path / name)
        builder.extend_plan(pa.array(images, pa.large_string()))
        for spec in specs:
            builder.ensure_teacher(spec.key, spec.load("cpu").card.to_dict(), dtype=dtype, shard_rows=8)
        stores[name] = FeatureStore(builder.path)
        worker = ShardExtractor(
            str(builder.path), specs, [str(sample_images)], batch_size=BATCH, device=device, threads=2
        )
        worker.load()
        with ThreadPoolExecutor(2) as calls:
            results = calls.map(worker.extract, [[task] for task in Scene.tasks(stores[name])])
            assert outcomes(r for block in results for r in block) == {"committed": 6}
        assert worker.watch().stages.device > 0
    assert Scene.files(stores["gpu"]) == Scene.files(stores["again"])
    for spec in specs:
        cpu, gpu = (FeatureStore(stores[name].path)[spec.key].read(range(10))[0] for name in ("cpu", "gpu"))
        cosine = torch.cosine_similarity(torch.from_numpy(cpu).flatten(1), torch.from_numpy(gpu).flatten(1))
        assert cosine.min() > (0.99999 if dtype == "float16" else 0.98)
