"""What an extraction would take, before it is begun: the dry run. Finds what can be wrong, and writes nothing."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from olavlm.cache import BadImage, FeatureStore, ImageRoots, PlanError, StoreError
from olavlm.cache.codec import CODECS
from olavlm.cache.files import exists, is_local, location
from olavlm.cache.images import decode_rgb
from olavlm.cache.wording import counted
from olavlm.pipelines.cli import JobFailed
from olavlm.teachers import Teacher
from olavlm.teachers.base import resolve_device

from .extractor import TeacherSpec
from .places import Job, find_places

TRIED = 16  # images read, spread over all that are wanted
MEASURED_SECONDS = 1.0  # of forwards of a teacher, after one to warm up


@dataclass(frozen=True)
class Workers:
    """Those that a run would have."""

    number: int
    device: str
    threads: int
    """That each prepares images with."""

    def hours(self, preparing: float, forward: float) -> float:
        """Hours of these seconds of one thread and of the device. On a GPU they overlap, on the CPU they share one."""
        one = preparing + forward if self.device == "cpu" else max(preparing / self.threads, forward)
        return one / 3600 / self.number


def dry_run(args: argparse.Namespace, specs: Sequence[TeacherSpec], images: pa.LargeStringArray, job: Job) -> int:
    """Print rows, bytes a teacher, what is done of it, free space, rows/s measured on a few images, and the ETA.

    Raises what a real run would: unusable teachers and image roots, a store of other features, a disk too small.
    """
    rows = min(args.limit or len(images), len(images))
    roots, device = ImageRoots(args.images), str(resolve_device(args.device))
    pictures, decode = _pictures(roots, images[:rows])
    workers = _workers(job, device)
    preparing = computing = 0.0  # seconds, for all that is left
    size, most_left = 0, 0
    for spec in specs:
        teacher = spec.load(device)
        left = rows - _done(args, spec.key, teacher, images, rows)
        row_bytes = CODECS[args.dtype].row_bytes(teacher.card.tokens, teacher.card.dim)
        prepare, forward = _pace(teacher, pictures, args.batch_size, device)
        rate = 1 / (3600 * workers.number * workers.hours(decode + prepare, forward))
        print(
            f"{spec.key}: {teacher.card.tokens} x {teacher.card.dim} {args.dtype}, {rows * row_bytes / 1e9:.3f} GB, "
            f"{rows - left} rows done; alone {rate:.2f} rows/s a worker, "
            f"ETA {_duration(workers.hours(left * (decode + prepare), left * forward))}"
        )
        preparing, computing = preparing + left * prepare, computing + left * forward
        size, most_left = size + left * row_bytes, max(most_left, left)
        del teacher
    print(f"decoding takes {1000 * decode:.1f} ms an image, once for all teachers")
    hours = workers.hours(preparing + most_left * decode, computing)
    like = ", if its nodes are like this machine" if job.address else ""
    with_whom = counted(workers.number, f"{device} worker")
    _compare_with_free_space(args.store, size, f"ETA {_duration(hours)} with {with_whom}{like}")
    return 0


def evenly_spaced(images: pa.LargeStringArray | pa.ChunkedArray) -> list[str]:
    """At most `TRIED` of them, from the first to the last."""
    return images.take(pa.array(np.unique(np.linspace(0, len(images) - 1, TRIED).astype(np.int64)))).to_pylist()


def readable(roots: ImageRoots, images: pa.LargeStringArray | pa.ChunkedArray) -> list[str]:
    """Some images that can be read here."""
    found = []
    for image in evenly_spaced(images):
        with suppress(BadImage):
            roots.read(image)
            found.append(image)
    return found


def _pictures(roots: ImageRoots, images: pa.LargeStringArray) -> tuple[list, float]:
    """A few pictures, and the seconds that reading and decoding one takes."""
    few = evenly_spaced(images)
    pictures, failures, began = [], [], time.perf_counter()
    for image in few:
        try:
            pictures.append(decode_rgb(roots.read(image), image))
        except BadImage as e:
            failures.append(e)
    decode = (time.perf_counter() - began) / len(few)
    if not pictures:
        raise JobFailed(f"none of {len(few)} images can be read; the first: {failures[0]}")
    unread = f"{len(failures)} of {len(few)} images tried cannot be read"
    print(f"{len(images)} rows, {unread}" + (f", the first: {failures[0]}" if failures else ""))
    return pictures, decode


def _done(args: argparse.Namespace, key: str, teacher: Teacher, images: pa.LargeStringArray, rows: int) -> int:
    """How many of the first `rows` rows the store has already; StoreError or PlanError where a run is refused.

    None of those that `--replace` would drop, or `--retry-failed` try again.
    """
    where = location(args.store)
    if not exists(where / "zarr.json"):
        return 0
    store = FeatureStore(where)
    try:
        store.rows.growth(images)
    except PlanError:
        if args.replace:
            return 0
        raise
    if key not in store.teachers:
        return 0
    group, card, layout = store[key], teacher.card, store[key].layout
    there = (group.fingerprint, layout.dtype, layout.compress, layout.shard_rows)
    shard_rows = args.shard_rows or layout.shard_rows
    if there != (card.fingerprint(), args.dtype, args.compress, shard_rows):
        if args.replace:
            return 0
        raise StoreError(
            f"{group.folder} holds features of another card, dtype, compression or shard size, and a run would be "
            "refused; use another --store, --as KEY, or --replace"
        )
    coverage = group.coverage(store.rows.rows[:rows])
    return coverage.valid if args.retry_failed else coverage.covered


def _pace(teacher: Teacher, pictures: list, batch_size: int, device: str) -> tuple[float, float]:
    """Seconds a row of preparing and of the forward, as a worker does them: one compute thread, a warm full batch."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        began = time.perf_counter()
        prepared = [teacher.prepare(picture) for picture in pictures]
        prepare = (time.perf_counter() - began) / len(pictures)
        batch = torch.from_numpy(np.stack([prepared[i % len(prepared)] for i in range(batch_size)]))
        teacher.forward(batch.to(device)).cpu()
        batches, began = 0, time.perf_counter()
        while not batches or time.perf_counter() - began < MEASURED_SECONDS:
            teacher.forward(batch.to(device)).cpu()
            batches += 1
        return prepare, (time.perf_counter() - began) / (batches * batch_size)
    finally:
        torch.set_num_threads(threads)


def _workers(job: Job, device: str) -> Workers:
    if job.address:
        from .cluster import room_at

        places = room_at(job, device)
    else:
        gpus = torch.cuda.device_count() if device != "cpu" else 0
        resources = {"CPU": len(os.sched_getaffinity(0)), "GPU": gpus}
        here = {"Alive": True, "NodeID": "", "NodeManagerHostname": "", "Resources": resources}
        places = find_places([here], job, device)
    if not places:
        raise JobFailed(f"there is no room for a {device} worker; give less --worker-gpus or --worker-cpus")
    room = sum(place.slots for place in places)
    return Workers(min(job.workers or room, room), device, max(1, int(min(place.cpus for place in places))))


def _duration(hours: float) -> str:
    return tqdm.format_interval(3600 * hours)


def _compare_with_free_space(store: str, size: int, effort: str) -> None:
    where = location(store)
    if not is_local(where):
        print(f"all: {size / 1e9:.3f} GB to {where}, whose free space is unknown, {effort}")
        return
    folder = where.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    print(f"all: {size / 1e9:.3f} GB to write of {free / 1e9:.1f} GB free at {folder}, {effort}")
    if size > free:
        raise StoreError(
            f"{folder} has {free / 1e9:.1f} GB free, the features need {size / 1e9:.1f} GB; use another disk"
        )
