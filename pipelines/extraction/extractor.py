"""One worker of an extraction: blocks of shards in, committed shards out.

    image roots --(prepare threads)--> batches --(device)--> encoded features --(write thread)--> staged shards
                                                                        --(commit threads)--> committed shards

Images are read and prepared ahead of the device, features are written behind it, and a shard is committed while the
next ones compute; all of it bounded, so that the slowest stage holds the others back and memory stays flat. A batch
never crosses a shard, a rejected image keeps its place and the last batch is padded, so that a row's bytes do not
depend on which shards a block has, on threads, on how many workers there are, or on which run came before.

Knows nothing of Ray: `cluster.py` makes an actor of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from olavlm.cache import BadImage, DatasetError, FeatureStore, ImageRoots, ShardTask
from olavlm.pipelines.cli import quiet_models
from olavlm.teachers import Teacher, load_teacher

from .device import Computed, Computing, Cpu, Gpu, open_device, tune
from .preparer import Batch, Preparer
from .shard_job import ShardJob, ShardResult, one_line
from .stage_clock import StageClock, Stages

BATCHES_AHEAD = 2  # batches a teacher, of images that are prepared before the device asks for them
BATCHES_QUEUED = 1  # that a GPU has before it beside the one it computes
WRITES_BEHIND = 2  # batches of features that wait for the disk
COMMITS_BEHIND = 2  # shards that are committed while others compute


@dataclass(frozen=True)
class TeacherSpec:
    """How to load the teacher behind a store key."""

    key: str
    name: str
    model: str | None = None
    revision: str | None = None
    recipe: str | None = None
    geometry: str = "reference"
    compute_dtype: str = "float32"

    def load(self, device: str) -> Teacher:
        quiet_models()
        return load_teacher(
            self.name,
            model=self.model,
            revision=self.revision,
            recipe=self.recipe,
            geometry=self.geometry,
            device=device,
            compute_dtype=self.compute_dtype,
        )


@dataclass
class WorkerStatus:
    """What a worker is at."""

    progress: int
    """Grows whenever an image was prepared, a batch computed, a batch written, a shard committed."""
    results: list[ShardResult]
    """Finished since the last look."""
    stages: Stages


class _Block:
    def __init__(self, jobs: list[ShardJob], size: int, device: Cpu | Gpu) -> None:
        self.jobs = jobs
        batches = [
            Batch(job, row, min(row + size, job.task.stop), size, device)
            for job in jobs
            for row in range(job.task.start, job.task.stop, size)
        ]
        self.batches = sorted(batches, key=lambda batch: (batch.stop, batch.start, batch.job.task.key))
        """In the order in which they compute: their images come in row order, for all teachers at once."""
        self.ahead = BATCHES_AHEAD * len({job.task.key for job in jobs})

    def drop(self) -> None:
        for job in self.jobs:
            job.give_up("dropped")
        for batch in self.batches:
            batch.ready.set()  # nobody waits for its images


@dataclass(frozen=True)
class _Loaded:
    teacher: Teacher
    forward: Callable[[torch.Tensor], torch.Tensor]
    fingerprint: str


class ShardExtractor:
    """Extracts shards with one set of teachers on one device (cpu, cuda or cuda:N), with `threads` to prepare images.

    Where one of `known_images`, which can be read elsewhere, is missing, it refuses to work: an image root that a node
    has not mounted would have all of its images quarantined.

    `extract` may be called from two threads at once: the device then works on one block at a time, while the images
    of the next are prepared and the last shards of the other are committed.
    """

    def __init__(
        self,
        store: str,
        specs: list[TeacherSpec],
        images: list[str],
        *,
        batch_size: int,
        device: str,
        threads: int,
        compile: bool = False,
        known_images: Sequence[str] = (),
    ) -> None:
        self._known_images = known_images
        self._store, self._batch_size, self._device_name, self._compile = store, batch_size, device, compile
        self._specs = {spec.key: spec for spec in specs}
        self._roots = ImageRoots(images)
        self._device = open_device(device)
        self._teachers: dict[str, _Loaded] = {}
        self._prepare = ThreadPoolExecutor(threads, "prepare")
        self._open = ThreadPoolExecutor(1, "open")
        self._write = ThreadPoolExecutor(1, "write")
        self._commit = ThreadPoolExecutor(COMMITS_BEHIND, "commit")
        self._turn = threading.Lock()  # of blocks, at the device
        self._lock = threading.Lock()  # of what follows
        self._clock = StageClock()
        self._progress = 0
        self._results: list[ShardResult] = []
        self._at_work: list[_Block] = []
        self._stopped = False

    def load(self) -> None:
        """Load the teachers, and look whether store and images are there; raises what either raises."""
        FeatureStore(self._store)
        for image in self._known_images:
            try:
                self._roots.read(image)
            except BadImage as e:
                if e.reason == "missing":
                    raise DatasetError(
                        f"image {image!r}, which the driver reads, is missing here; mount the image roots at the same "
                        "paths on every node"
                    ) from None
        for key, spec in self._specs.items():
            teacher = spec.load(self._device_name)
            forward = tune(teacher, compile=self._compile)
            self._teachers[key] = _Loaded(teacher, forward, teacher.card.fingerprint())

    def extract(self, tasks: Sequence[ShardTask]) -> list[ShardResult]:
        """Extract and commit one block: shards of one or several teachers over overlapping rows.

        Every image is read and decoded once, for all its teachers. What is one shard's fault is that shard's result.
        Raises `torch.AcceleratorError` when the device is beyond use: the process must be replaced, and what it had
        not committed done again.
        """
        jobs, failed = self._jobs(tasks)
        block = _Block(jobs, self._batch_size, self._device)
        preparer = Preparer(block.batches, self._roots, self._prepare, self._moved)
        with self._lock:
            self._at_work.append(block)
            if self._stopped:
                block.drop()
        try:
            self._ask(preparer, block, 0)
            with self._turn, self._clock.turn():
                self._compute(preparer, block)
        except BaseException:
            block.drop()
            raise
        finally:
            for job in jobs:
                self._end(job)
            with self._clock.last_commits():
                for job in jobs:
                    job.done.wait()
            with self._lock:
                self._at_work.remove(block)
        return failed + [job.result for job in jobs]

    def watch(self) -> WorkerStatus:
        """Cheap; from any thread, also while `extract` runs."""
        with self._lock:
            results, self._results = self._results, []
            return WorkerStatus(self._progress, results, self._clock.read())

    def stop(self) -> None:
        """Drop what is in flight, with its staged files and leases; `extract` returns soon, now and from now on."""
        with self._lock:
            self._stopped = True
            for block in self._at_work:
                block.drop()

    def _jobs(self, tasks: Sequence[ShardTask]) -> tuple[list[ShardJob], list[ShardResult]]:
        """Jobs of the tasks, and the results of those that cannot be begun."""
        store, jobs, failed = None, [], []
        for task in tasks:
            try:
                store = store or FeatureStore(self._store)
                group, loaded = store[task.key], self._teachers[task.key]
                if loaded.fingerprint != group.fingerprint:
                    raise ValueError(
                        f"the teacher loaded here for '{task.key}' is not the store's: the model files changed"
                    )
                jobs.append(ShardJob(task, loaded.teacher, group, self._device_name))
            except Exception as e:
                failed.append(ShardResult(task, "failed", one_line(e)))
        with self._lock:
            self._results += failed
        return jobs, failed

    def _ask(self, preparer: Preparer, block: _Block, at: int) -> None:
        """Let come what batch `at` needs and the next ones will: their shards' leases, and their images."""
        for batch in block.batches[at : at + 1 + block.ahead]:
            if batch.job.opening is None:
                batch.job.opening = self._open.submit(batch.job.open)
            preparer.ask(batch)

    def _compute(self, preparer: Preparer, block: _Block) -> None:
        queued: deque[Computed | Computing] = deque()
        writing: deque[Future] = deque()
        ending: deque[ShardJob] = deque()
        for at, batch in enumerate(block.batches):
            job = batch.job
            self._ask(preparer, block, at)
            if job.live:
                with self._idle("disk", queued):
                    job.opening.result()
                with self._idle("images", queued):
                    batch.ready.wait()
            if job.live:
                computed = self._forward(batch)
                writing.append(self._write.submit(self._append, batch, computed))
                if computed is not None:
                    queued.append(computed)
            if (batch.is_last or not job.live) and self._end(job):
                ending.append(job)
            if len(queued) > BATCHES_QUEUED:
                queued.popleft().wait_for_device()
            with self._idle("disk", queued):
                while len(writing) > WRITES_BEHIND:
                    writing.popleft().result()
                while len(ending) > COMMITS_BEHIND:
                    ending.popleft().done.wait()
        for written in writing:
            written.result()  # a device that broke in the last batches is reported too

    @contextmanager
    def _idle(self, stage: str, queued: Sequence[Computed | Computing]) -> Iterator[None]:
        """Count what is done inside to a stage, unless the device had work all the while."""
        began = time.perf_counter()
        yield
        if not any(batch.computing for batch in queued):
            self._clock.add(stage, time.perf_counter() - began)

    def _forward(self, batch: Batch) -> Computed | Computing | None:
        """None if there is nothing to compute: no image could be prepared, or it failed."""
        job, pixels = batch.job, batch.take()
        if pixels is None:
            return None
        layout = job.group.layout
        try:
            computed = self._device.compute(self._teachers[job.task.key].forward, pixels, layout.codec)
            shape, expected = tuple(computed.encoded.features.shape), (len(pixels), layout.tokens, layout.dim)
            if shape != expected:
                raise ValueError(f"the teacher gave features {shape} for a batch, its card says {expected}")
        except torch.AcceleratorError:
            raise
        except Exception as e:
            job.fail(e)
            return None
        self._moved()
        return computed

    def _append(self, batch: Batch, computed: Computed | Computing | None) -> None:
        """In the write thread."""
        try:
            seconds = 0.0 if computed is None else computed.wait()
        except Exception as e:
            batch.job.fail(e)
            raise
        self._clock.add("device", seconds)
        batch.job.append(computed and computed.encoded, seconds, batch.images_sha256, batch.rejections)
        if computed is not None:
            computed.release()
        with self._lock:
            leased = [job for block in self._at_work for job in block.jobs]
        for job in leased:  # of a block that waits for its turn too
            job.renew()
        self._moved()

    def _end(self, job: ShardJob) -> bool:
        """Commit the shard, or drop it if it was given up, once its batches are written; False if it ends already."""
        if job.ending:
            return False
        job.ending = True
        self._write.submit(lambda: self._commit.submit(self._close, job))
        return True

    def _close(self, job: ShardJob) -> None:
        """In a commit thread."""
        job.close()
        with self._lock:
            self._results.append(job.result)
        self._moved()
        job.done.set()

    def _moved(self) -> None:
        with self._lock:
            self._progress += 1
