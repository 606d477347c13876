"""The arms: one optimizer step of PT, as the trainer sets it up, with targets from different places."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from olavlm.student.config import Recipe
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.data.targets import OnlineTargets
from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import set_up
from olavlm.teachers import Teacher

from ..extract.photographs import SIZE
from .scene import Scene
from .sizes import CACHED, ONE, ONLINE, PLAIN, TOKENS

STEPS = 10**4  # more than any arm takes

_OVERRIDES: dict[str, dict[str, object]] = {
    PLAIN: {f"tasks.{task}": "null" for task in ("gen", "depth", "seg")},
    TOKENS: {"losses.stages": "[]"},
    CACHED: {},
    ONLINE: {"targets.source": "online"},
    ONE: {"targets.source": "online"},
}


def recipe_of(scene: Scene, arm: str, checkpointing: bool, overrides: Mapping[str, object] | None = None) -> Recipe:
    """The scene's recipe as the arm has it. `TOKENS` has the same sequence as the arms with losses."""
    run = f"{arm}, {'with' if checkpointing else 'without'} checkpointing"
    own = {"train.gradient_checkpointing": str(checkpointing).lower(), **_OVERRIDES[arm]}
    return scene.recipe(run, own | dict(overrides or {}))


class OneAtATime:
    """A teacher as the public code runs it: each image prepared and computed alone, on the thread that trains.

    It is spared what the public code does beside: reading and decoding, which the loaders do, its slower preparation
    (it uses ours), and the decoders. Its pictures, 1 MB each, cross to the device and back before they are prepared.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.card = teacher, teacher.card

    def prepare(self, image: Image.Image) -> np.ndarray:
        """In a loader: the decoded picture, uint8 (H, W, 3)."""
        return np.asarray(image)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """In the step: features of pictures (b, H, W, 3)."""
        pictures = [Image.fromarray(pixels) for pixels in batch.cpu().numpy()]
        return torch.cat([self.teacher.forward(torch.from_numpy(self.teacher.prepare(p)[None])) for p in pictures])


def one_at_a_time(online: OnlineTargets) -> OnlineTargets:
    """The same source, and the same networks, for photographs that all have one size."""
    source, (width, height) = copy.copy(online), SIZE
    source.teachers = {name: OneAtATime(teacher) for name, teacher in online.teachers.items()}
    source._blanks = {name: np.zeros((height, width, 3), np.uint8) for name in online.teachers}
    return source


class OpenArm:
    """An arm ready to take steps."""

    def __init__(self, step: OptimizerStep, loading: Iterator[list[MicroBatch]]) -> None:
        self.step, self.loading, self.taken = step, loading, 0
        self.source, self.parallel, self.model = step.source, step.parallel, step.parallel.model
        self.device = step.accelerator.device

    def batch(self) -> list[MicroBatch]:
        """The next step's micro-batches."""
        return next(self.loading)

    def take(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """One optimizer step; its metrics."""
        self.taken += 1
        return self.step(self.taken - 1, micro_batches)

    def seconds(self) -> float:
        """Of one step, the wait for its data included."""
        began = perf_counter()
        self.take(self.batch())
        self.wait()
        return perf_counter() - began

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sequence(self) -> int:
        """Positions of the LLM for a sample of the next step, image and task tokens included."""
        (micro,) = self.batch()
        task_tokens = len(self.model.tasks) * self.model.config.num_task_tokens
        return micro.input_ids.shape[1] - 1 + self.model.vision.num_tokens + task_tokens


@contextmanager
def open_arm(
    scene: Scene, arm: str, checkpointing: bool, workers: int | None = None, online: OnlineTargets | None = None
) -> Iterator[OpenArm]:
    """With loader processes of its own, that end with it.

    Args:
        workers: instead of the size's.
        online: whose teachers `ONE` runs; its own by default.
    """
    said: dict[str, object] = {"train.max_steps": STEPS}
    if workers is not None:
        said["data.workers"] = workers
    recipe, source = recipe_of(scene, arm, checkpointing, said), None
    if arm == ONE:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = one_at_a_time(online or OnlineTargets(recipe, device))
    with redirect_stdout(sys.stderr):
        training = set_up(recipe, "pt", versions={}, source=source)
    with training.loading as loaded:
        yield OpenArm(training.optimizer_step, loaded)
