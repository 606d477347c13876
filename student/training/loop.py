"""The loop of optimizer steps that all trainings share: learning rate, metrics, checkpoints, and a stop on request."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from olavlm.student.config import TrainConfig
from olavlm.student.data.load_times import load_metrics
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.errors import TrainingError
from olavlm.student.processes import stop_requests

from .metrics import Tracker

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called on the main process after each step with its number, the number of steps and the metrics."""


class HasTrainConfig(Protocol):
    """A recipe, or what else a run is described by."""

    @property
    def train(self) -> TrainConfig: ...


class Schedule:
    """Length of the run, and the learning rate of each step: linear warm-up, then a cosine to 0."""

    def __init__(self, recipe: HasTrainConfig, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        by_epochs = math.ceil(recipe.train.epochs * steps_per_epoch)
        self.total_steps = recipe.train.max_steps or by_epochs
        self.horizon = by_epochs  # not of max_steps: a run resumed has the rates of one that never stopped
        self.warmup_steps = math.ceil(recipe.train.warmup * self.horizon)
        self.peak = recipe.train.lr

    def check_not_passed(self, step: int, run: Path, setting: str) -> None:
        """TrainingError if a run folder holds a later step than the last, which is put off by the setting."""
        if step > self.total_steps:
            raise TrainingError(
                f"{run} holds step {step}, and this run ends at step {self.total_steps}: set {setting} to {step} or "
                "more, or use another output folder"
            )

    def lr(self, step: int) -> float:
        """Learning rate of a step, from 0. Neither the first nor the last is 0. Beyond the epochs it starts anew."""
        step %= self.horizon
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.horizon - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class StepLoop:
    """The steps of a run that are still to be taken, in this process of several."""

    schedule: Schedule
    first_step: int
    """How many steps were taken before."""
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    trackers: list[Tracker]
    """Where metrics go; closed at the end. None on all processes but the main one."""
    save: Callable[[int], None]
    """Writes a checkpoint of so many steps."""
    save_every: int

    @property
    def steps(self) -> range:
        """Numbers of the steps, from 0."""
        return range(self.first_step, self.schedule.total_steps)

    def run(
        self,
        loading: AbstractContextManager[Iterator[list[MicroBatch]]],
        take_step: Callable[[int, list[MicroBatch]], dict[str, float]],
        after_step: Callable[[int, dict[str, float]], None],
    ) -> str:
        """Take the steps.

        Args:
            loading: gives, within, each step's micro-batches on this process.
            take_step: one optimizer step, by its number and micro-batches; gives its metrics.
            after_step: called on every process with the number of steps taken and the last one's metrics.

        Returns:
            The signal that asked for a stop during the last step of all; '' without one.

        Raises:
            TrainingError: a stop by SIGINT or SIGTERM before the last step, after a checkpoint.
        """
        with ExitStack() as leaving, stop_requests() as stop, loading as loaded:
            for tracker in self.trackers:
                leaving.callback(tracker.close)
            for step in self.steps:
                began = time.perf_counter()
                micro_batches = next(loaded)
                data_wait = time.perf_counter() - began
                for group in self.optimizer.param_groups:
                    group["lr"] = self.schedule.lr(step)
                values = take_step(step, micro_batches)
                values |= {
                    "lr": self.schedule.lr(step),
                    "epoch": (step + 1) / self.schedule.steps_per_epoch,
                    "data_wait_ms": 1000 * data_wait,
                    "step_ms": 1000 * (time.perf_counter() - began),
                    **load_metrics(micro.load_times for micro in micro_batches),
                }
                for tracker in self.trackers:
                    tracker.log(step + 1, values)
                after_step(step + 1, values)
                last = step + 1 == self.schedule.total_steps
                stopping = self._anywhere(bool(stop))
                if last or stopping or (step + 1) % self.save_every == 0:
                    self.save(step + 1)
                if stopping:
                    stopped_by = stop[0] if stop else "another process"
                    if last:
                        return stopped_by
                    raise TrainingError(
                        f"stopped by {stopped_by} after step {step + 1}, which is saved; run the same command again to "
                        "finish"
                    )
        return ""

    def _anywhere(self, here: bool) -> bool:
        """Whether it holds on any process: all have to stop after the same step."""
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)) > 0)
