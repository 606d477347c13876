"""What loader processes spend their time on: seconds of each part of a micro-batch's loading."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["images", "encoder_features", "targets", "text"]
LoadTimes = dict[Part, float]
"""Seconds: images opened and made pixels, features read in their place, targets read (or pictures prepared for teachers
in the loop), conversations tokenised."""


@contextmanager
def clocked(times: LoadTimes, part: Part) -> Iterator[None]:
    """Adds the time of its block to a part's."""
    start = time.perf_counter()
    try:
        yield
    finally:
        times[part] = times.get(part, 0.0) + time.perf_counter() - start


def load_metrics(times: Iterable[LoadTimes]) -> dict[str, float]:
    """`load_images_ms` and so on: sums over micro-batches, of the parts that there were."""
    sums: dict[str, float] = {}
    for each in times:
        for part, seconds in each.items():
            sums[f"load_{part}_ms"] = sums.get(f"load_{part}_ms", 0.0) + 1000 * seconds
    return sums
