"""After how many runs a feature cache pays: the arithmetic alone, on rates that somebody measured or assumed.

    n runs with a cache      extraction + n x waiting
    n runs with teachers     n x teachers

All three are device-seconds beside what a run takes in any case: `extraction` once, for every distinct image;
`teachers` in the loop, for every sample of every epoch; `waiting`, what the devices stand still where a disk gives less
than the step takes. One epoch reads each target once, so that a single run saves none of the teachers' arithmetic: it
gains where the teachers are slower in the loop than in an extraction, and by the runs that follow.
"""

from __future__ import annotations

import math


def bytes_per_second(row_bytes: float, step_seconds: float, samples: float) -> float:
    """That a step of so many samples, over all devices together, needs of the disk."""
    return row_bytes * samples / step_seconds


def waiting(row_bytes: float, step_seconds: float, samples: float, devices: int, disk: float) -> float:
    """Device-seconds a sample that `devices` stand still, all at once, because a disk gives `disk` bytes a second.

    `step_seconds` is a step's time when it never waits; what is read ahead meanwhile costs nothing.
    """
    return devices * max(0.0, row_bytes / disk - step_seconds / samples)


def runs_to_pay(extraction: float, teachers: float, waiting: float = 0.0) -> int | None:
    """The least number of runs that are cheaper with the cache than with teachers; None if no number is.

    Arguments are of one run, in one unit: device-seconds, hours, or dollars.
    """
    gain = teachers - waiting
    return None if gain <= 0 else math.floor(extraction / gain) + 1


def storage_seconds(row_bytes: float, months: float, tb_month: float, device_hour: float) -> float:
    """What it costs to keep a row, as the device-seconds that the same money buys; prices are of one currency."""
    return row_bytes / 1e12 * months * tb_month / device_hour * 3600
