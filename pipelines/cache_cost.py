"""What a run's targets cost: bytes, the rate at which this disk gives them, and after how many runs a cache pays.

Part of the dry run. What is not known is said to be unknown, with what would measure it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import yaml

from olavlm.cache import Dataset, TeacherFeatures
from olavlm.cache.files import is_local
from olavlm.cache.images import redacted, without_credentials
from olavlm.cache.wording import storage
from olavlm.student.config import Recipe
from olavlm.student.data.targets import CachedTargets, extract_command
from olavlm.student.training.metrics import read_metrics

from .break_even import bytes_per_second, runs_to_pay, waiting
from .extraction.record import Recorded, recorded_extractions

STEPS = (1.0, 3.0, 10.0)  # seconds, where a step's own time is not known
READ_ROWS, READ_AT_ONCE, READ_SECONDS = 32, 4, 1.0  # of each teacher at most, in a request, before it stops
STEPS_NOT_KEPT = 2  # at the start of an earlier run: loaders fill, and memory is taken
_OF_A_STEP = (
    ("model", "llm"), ("model", "encoder"), ("targets", "source"), ("train", "batch_size"), ("train", "accumulation")
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What one run asks of its targets."""

    samples: int
    """With an image, over all epochs or steps."""
    images: int
    """Distinct ones."""
    global_batch: int
    image_share: float
    """Of the samples."""
    devices: int

    @property
    def per_step(self) -> float:
        """Targets of a step, over all devices."""
        return self.global_batch * self.image_share


@dataclass(frozen=True)
class Reading:
    """Random rows of every teacher, read by one reader with their checksums verified."""

    rows: int
    """Of each teacher."""
    rate: float
    """Bytes a second."""
    again: float | None
    """The same rows a second time; None from object storage."""
    held: float | None
    """Share of the rows that memory held at the first time; None where that cannot be seen."""

    def __str__(self) -> str:
        if self.again is None:
            how = "over the network, one request a row"
        elif self.held is None:
            how = "whether memory held them could not be seen"
        else:
            how = f"memory held {self.held:.0%} of them" if self.held else "memory held none of them"
        again = f", {_rate(self.again)} again" if self.again is not None else ""
        return f"{_rate(self.rate)} by one reader ({self.rows} random rows of each teacher, {how}){again}"


def cost_lines(recipe: Recipe, dataset: Dataset, load: Load) -> Iterator[str]:
    """What targets cost a stage that reads them; CacheError for rows that cannot be read."""
    if recipe.targets.source == "online":
        yield (
            f"teachers in the loop: {load.samples} images through each in a run, none kept; what a cache would take is "
            f"measured by: {extract_command(recipe, recipe.task_order, recipe.targets.store or 'STORE')} --dry-run"
        )
        return
    source = CachedTargets(recipe)
    groups = list(source.groups.values())
    row_bytes = sum(group.layout.row_bytes for group in groups)
    yield (
        f"targets: {storage(row_bytes)} a sample, {storage(row_bytes * load.images)} in the store, "
        f"{storage(row_bytes * load.samples)} to read in a run"
    )
    reading = read_rate(groups, source.store.rows.rows_of(dataset.images()))
    yield f"reading: {redacted(recipe.targets.store)} gives {reading}"
    step = known_step(recipe)
    yield needed_line(row_bytes, load, reading.rate, step)
    yield from pays_lines(recipe, recorded_extractions(source.store.path, [g.key for g in groups]), row_bytes, load,
                          reading.rate, step)  # fmt: skip


def needed_line(row_bytes: float, load: Load, disk: float, step: float | None) -> str:
    """Bytes a second that the steps need, beside what the disk gives."""
    if step is None:
        rates = ", ".join(f"{_rate(bytes_per_second(row_bytes, s, load.per_step))} at {s:g} s" for s in STEPS)
        return f"needed: {rates} a step; how long one takes is known once a run has written metrics.jsonl"
    needed = bytes_per_second(row_bytes, step, load.per_step)
    stands = waiting(row_bytes, step, load.per_step, 1, disk) * load.per_step
    verdict = "the disk gives more" if not stands else f"at one reader's rate a step would wait {stands:.2f} s for it"
    return f"needed: {_rate(needed)} at {step:.2f} s a step (of an earlier run); {verdict}"


def pays_lines(
    recipe: Recipe, recorded: Recorded | None, row_bytes: float, load: Load, disk: float, step: float | None
) -> Iterator[str]:
    """What the extraction cost, and from which run on that is less than teachers in the loop."""
    if recorded is None:
        yield (
            f"extraction: what it cost is not recorded in {redacted(recipe.targets.store)}/runs, so the runs until "
            "it pays are not known; measure it with: "
            f"{extract_command(recipe, recipe.task_order, 'ANOTHER_STORE')} --dry-run"
        )
        return
    image, forward = recorded.worker_seconds / recorded.images, recorded.device_seconds / recorded.images
    with_others = f", with {', '.join(recorded.others)}" if recorded.others else ""
    yield (
        f"extraction, recorded: {recorded.hours:.4f} h, {recorded.worker_seconds / 3600:.4f} hours of "
        f"{' and '.join(recorded.devices)} workers for {recorded.images:.0f} images{with_others}: "
        f"{_seconds(image)} an image, {_seconds(forward)} of it in the teachers"
    )
    stands = 0.0 if step is None else waiting(row_bytes, step, load.per_step, load.devices, disk)
    runs = runs_to_pay(image * load.images, forward * load.samples, stands * load.samples)
    if runs is None:
        yield "the cache never pays: waiting for this disk takes longer than the teachers; use a faster one, or int8"
        return
    reads = load.samples / load.images
    yield (
        f"pays from run {runs} on, if teachers in the loop are as fast as in the extraction (in batches, on the same "
        f"device; one image at a time they are slower); a run reads each target {reads:.2g} times"
        + (": by itself it saves no forward" if reads <= 1 else "")
    )


def known_step(recipe: Recipe) -> float | None:
    """Median seconds of a step without its waits for data, by a run with the same batch in the recipe's output folder.

    None where there is no such run, or it has hardly begun.
    """
    run = Path(recipe.train.output_dir)
    try:
        before = yaml.safe_load((run / "recipe.yaml").read_text())
        steps = read_metrics(run / "metrics.jsonl")
        busy = [step["step_ms"] - step["data_wait_ms"] for step in steps[STEPS_NOT_KEPT:]]
        here = without_credentials(recipe.to_dict())
        same = all(before[section][key] == here[section][key] for section, key in _OF_A_STEP)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # none, one cut off, or another version's
        return None
    return median(busy) / 1000 if busy and same else None


def read_rate(groups: list[TeacherFeatures], rows: np.ndarray) -> Reading:
    """Read some of `rows` of all `groups`; raises CacheError for one that cannot be read."""
    chosen = np.random.default_rng().permutation(np.unique(rows))[:READ_ROWS].tolist()
    parts = [chosen[i : i + READ_AT_ONCE] for i in range(0, len(chosen), READ_AT_ONCE)]
    for group in groups:
        group.read_stored(chosen[:1])  # opens the store's records
    local = is_local(groups[0].folder)
    held = _held(groups, chosen) if local else None
    read, seconds = _read(groups, parts, READ_SECONDS)
    size = sum(map(len, read)) * sum(group.layout.row_bytes for group in groups)
    again = size / _read(groups, read, np.inf)[1] if local else None
    return Reading(sum(map(len, read)), size / seconds, again, held)


def _read(groups: list[TeacherFeatures], parts: list[list[int]], limit: float) -> tuple[list[list[int]], float]:
    """The parts that were read before `limit` seconds were over, one at least, and the seconds."""
    began, done = time.perf_counter(), []
    for part in parts:
        for group in groups:
            group.read_stored(part)
        done.append(part)
        if time.perf_counter() - began > limit:
            break
    return done, time.perf_counter() - began


def _held(groups: list[TeacherFeatures], rows: list[int]) -> float | None:
    """Share of the rows, by a byte about their middle, that is in memory; looking brings none in."""
    found = []
    for group in groups:
        features = group.layout.arrays["features"]
        for row in rows:
            shard, place = divmod(row, features.shard_rows)
            try:
                descriptor = os.open(features.file(group.folder, shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # no row of this shard is valid
                continue
            try:
                found.append(os.preadv(descriptor, [bytearray(1)], int((place + 0.5) * features.row_bytes),
                                       os.RWF_NOWAIT) == 1)  # fmt: skip
            except BlockingIOError:
                found.append(False)
            except OSError:  # a file system that cannot tell
                return None
            finally:
                os.close(descriptor)
    return sum(found) / len(found) if found else None


def _rate(rate: float) -> str:
    return f"{rate / 1e6:,.0f} MB/s" if rate >= 1e7 else f"{rate / 1e6:.2g} MB/s"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
