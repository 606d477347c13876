"""Where the time of a step goes: the trainer's own functions, each under a clock.

A device is waited for at every change of part, which a step that is not clocked does not do: these are not the times of
the rounds, and their sum is a little more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

from olavlm.student.task import DistillTask

from .arms import OpenArm

WAIT, TO_DEVICE, TARGETS = "wait for data", "batch to the device", "targets"
ENCODER, LLM, PREDICTORS, LOSSES = "encoder", "LLM forward", "predictors", "embedding losses"
REST_FORWARD, BACKWARD, OPTIMIZER, REST = "rest of the forward", "backward", "optimizer", "rest of the step"
PARTS = (WAIT, TO_DEVICE, TARGETS, ENCODER, LLM, PREDICTORS, LOSSES, REST_FORWARD, BACKWARD, OPTIMIZER, REST)


class Clock:
    """Seconds of each part; a part within another is not counted in that one.

    Args:
        wait: called at every change, until the device has done what it was given.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait, self._running, self._since = wait, [], 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._change()
        self._running.append(name)
        try:
            yield
        finally:
            self._change()
            self._running.pop()

    def _change(self) -> None:
        """Give the time until now to the part that is running."""
        self._wait()
        now = perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


def timed_parts(arm: OpenArm, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each part, for each of so many steps, and of their sum."""
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "step")}
    for _ in range(steps):
        clock = Clock(arm.wait)
        with _clocked(arm, clock):
            with clock.part(WAIT):
                batch = arm.batch()
            with clock.part(REST):
                arm.take(batch)
        for name, seconds in clock.seconds.items():
            found[name].append(round(1e3 * seconds, 3))
        found["step"].append(round(1e3 * sum(clock.seconds.values()), 3))
    return found


@contextmanager
def _clocked(arm: OpenArm, clock: Clock) -> Iterator[None]:
    """Within it the arm's step runs under the clock. AttributeError if the trainer has lost one of the functions."""
    model, losses = arm.model, sys.modules[DistillTask.__module__]
    places = [
        (arm.step, "_to_device", TO_DEVICE),
        (model.vision, "forward", ENCODER),
        (model.llm.get_decoder(), "forward", LLM),
        (model, "_predict", PREDICTORS),
        (losses, "embedding_loss_sums", LOSSES),
        (DistillTask, "compute", REST_FORWARD),
        (arm.parallel, "backward", BACKWARD),
        (arm.parallel, "update", OPTIMIZER),
    ]
    if arm.source is not None:
        places.append((arm.source, "finish", TARGETS))
    with ExitStack() as patches:
        for where, name, part in places:
            patches.enter_context(patch.object(where, name, clock.timed(part, getattr(where, name))))
        yield
