"""What the committed results of `benchmarks/` say, as the numbers that `scale.py` counts with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from ..figures import Comparison, Measurement, from_json
from ..readme import results
from . import decode, forward, free
from .architectures import ARCHITECTURES
from .arithmetic import TEACHERS

HERE = Path(__file__).parent
CACHE = HERE.parent / "cache"

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """Rates of one run with the full-size networks, in rows a second by teacher."""

    name: str
    """Of the results file."""
    hardware: str
    bare: dict[str, float]
    pipeline: dict[str, float]
    gflop: dict[str, float]
    """An image, by teacher."""

    @property
    def together(self) -> float:
        """Images a second when the three teachers take turns on the device."""
        return 1 / sum(1 / rate for rate in self.pipeline.values())


@dataclass(frozen=True)
class Opening:
    """Opening a complete store: measured with the shards of three teachers, and by the row and the shard."""

    rows: int
    shards: int
    seconds: float
    mb: float
    record_seconds: float
    """That a record costs which the index lacks."""
    largest: int
    """Rows of the largest store measured, with one teacher."""
    row_seconds: float
    row_mb: float
    shard_seconds: float

    def seconds_at(self, rows: int, shards: int) -> float:
        return self.row_seconds * rows + self.shard_seconds * shards


@dataclass(frozen=True)
class Facts:
    cpu: Device
    gpus: list[Device]
    prepare_ms: dict[str, float]
    """Of one core, a picture, by step: read and hash, decode, prepare for each teacher."""
    three_decodes: float
    """Time to prepare for three teachers with a decode for each, over the time with one decode."""
    free: dict[str, float]
    """MB/s through the pipeline of teachers that cost nothing, by teacher."""
    disk: dict[str, float]
    """MB/s of the plain files beside them."""
    driver: tuple[int, float, float]
    """Rows listed by the driver, its seconds and MB."""
    opening: Opening
    overhead: dict[str, float]
    """Bytes on disk, records and plan included, over those of the features, by teacher."""
    cache_name: str
    """Of the results file of `benchmarks.cache`."""


def load() -> Facts:
    """Raises RuntimeError if what the page needs is not among the committed results."""
    runs = {name: run for name, run in results(HERE).items() if run["size"] == "full"}
    on_gpu = {name: run for name, run in runs.items() if run["machine"].get("gpu")}
    name, run = _first(((n, r) for n, r in runs.items() if n not in on_gpu), "a full run of benchmarks.extract")
    figures = _figures(run)
    caches = results(CACHE).items()
    cache_name, cache = _first(((n, r) for n, r in caches if "growth" in r["figures"]), "a run of benchmarks.cache")
    cached = _figures(cache)
    steps = figures["decode"][0]
    (driver,) = figures["driver"]
    largest = list(driver.values)[-1]
    frees = {key: _first((f for f in figures["free"] if f"{shape}" in f.title), key) for key, shape in TEACHERS.items()}
    return Facts(
        cpu=_device(name, run),
        gpus=[_device(n, r) for n, r in on_gpu.items()],
        prepare_ms={arm: 1e3 / steps.rate(arm) for arm in steps.seconds if arm not in (decode.ONE, decode.THREE)},
        three_decodes=steps.rate(decode.ONE) / steps.rate(decode.THREE),
        free={key: _megabytes(found, free.OURS) for key, found in frees.items()},
        disk={key: _megabytes(found, found.floor) for key, found in frees.items()},
        driver=(driver.rows[largest], _median(driver, largest, "all s"), _median(driver, largest, "all MB")),
        opening=_opening(*cached["open"], cached["growth"][1]),
        overhead={
            key: _first((f for f in cached["formats"] if f.title == f"write, {shape}"), key).bytes_on_disk["olavlm"]
            for key, shape in TEACHERS.items()
            if key != "seg"
        },
        cache_name=cache_name,
    )


def _figures(run: dict) -> dict[str, list]:
    return {name: from_json(found) for name, found in run["figures"].items()}


def _first(found: Iterable[T], what: str) -> T:
    for one in found:
        return one
    raise RuntimeError(f"no committed result has {what}; run the benchmark at full size with --name")


def _device(name: str, run: dict) -> Device:
    titles = {key: ARCHITECTURES[f"{key}-large"].title for key in TEACHERS}
    passes = _figures(run)["forward"]
    found = {key: _first((f for f in passes if f.title.startswith(title)), title) for key, title in titles.items()}
    machine = run["machine"]
    dtype = found["depth"].title.split(", ")[-2]
    hardware = f"{machine['gpu']}, {dtype}" if machine.get("gpu") else f"one core of {machine['cpu']}, {dtype}"
    return Device(
        name,
        hardware,
        {key: f.rate(forward.BARE) for key, f in found.items()},
        {key: f.rate(forward.OURS) for key, f in found.items()},
        {key: f.gflop for key, f in found.items()},
    )


def _opening(full: Measurement, grown: Measurement) -> Opening:
    """Straight lines: of a row by the largest store, of a shard by the one that was measured with both shard sizes."""
    rows, shards = _numbers(r"([\d,]+) rows, ([\d,]+) shards", full.title)
    ready, cold = (_median(full, s, "all s") for s in ("a small store opened before", "the same, no index"))
    points = {}
    for subject in grown.values:
        count, shard_rows = _numbers(r"([\d,]+) rows, ([\d,]+) a shard", subject)
        points[count, -(-count // shard_rows)] = (_median(grown, subject, "all s"), _median(grown, subject, "all MB"))
    (fewest, few), (_, many) = sorted(points)[:2]
    shard_seconds = (points[fewest, many][0] - points[fewest, few][0]) / (many - few)
    largest = max(points)
    return Opening(
        rows=rows,
        shards=shards,
        seconds=ready,
        mb=_median(full, "a small store opened before", "all MB"),
        record_seconds=(cold - ready) / shards,
        largest=largest[0],
        row_seconds=(points[largest][0] - shard_seconds * largest[1]) / largest[0],
        row_mb=points[largest][1] / largest[0],
        shard_seconds=shard_seconds,
    )


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text}"
    return tuple(int(number.replace(",", "")) for number in found.groups())


def _median(measurement: Measurement, subject: str, column: str) -> float:
    return median(measurement.values[subject][column])


def _megabytes(found: Comparison, arm: str) -> float:
    """A second."""
    return found.bytes / 1e6 * found.rate(arm) / found.rows
