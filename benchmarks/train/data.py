"""Whether training waits for data: runs of the trainer itself, by its own metrics.jsonl.

In the last run the images are slow on purpose, so that one sees the meter move.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import ExitStack, redirect_stdout
from statistics import median
from unittest.mock import patch

from olavlm.cache import ImageRoots
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train

from ..figures import Measurement, number
from .arms import recipe_of
from .base_models import random_weights
from .scene import Scene
from .sizes import CACHED, TOKENS

SLOW = "cached targets, slow images"
MOST = 2.0
"""Per cent of a step."""
WAIT, STEP, SHARE = "data_wait_ms", "step_ms", "wait, % of the step"
KEPT = (WAIT, "h2d_ms", STEP)
"""Metrics shown; not every version of the trainer writes all of them."""
NOT_KEPT = 2
"""Steps at the start of a run: loaders fill, memory is taken."""
LONGER = 1.5
"""Times that the loaders of the slow run need for a batch, over a step."""


def measure(scene: Scene, device: str) -> list[Measurement]:
    size, checkpointing = scene.size, scene.size.checkpointing[0]
    values: dict[str, dict[str, list[float]]] = {}
    with random_weights(device):
        for name in (TOKENS, CACHED):
            values[name] = _run(scene, name, checkpointing)
        pause = LONGER * median(values[CACHED][STEP]) / 1e3 * size.workers / size.batch
        values[SLOW] = _run(scene, CACHED, checkpointing, pause)
    ratio = median(values[CACHED][STEP]) / median(values[TOKENS][STEP])
    waits = {name: median(columns[WAIT]) / median(columns[STEP]) for name, columns in values.items()}
    return [
        Measurement(
            f"{size.llm.title}, {size.batch} images a step, {size.workers} loader processes",
            values,
            limits={SHARE: MOST},
            of="steps of a run of the trainer",
            notes=[
                f"The limit is for *{TOKENS}* and *{CACHED}*: median wait over median step "
                f"{100 * waits[TOKENS]:.2f}% and {100 * waits[CACHED]:.2f}%. In *{SLOW}* each image takes "
                f"{number(1e3 * pause)} ms more to be read: {100 * waits[SLOW]:.0f}%, and the meter moves.",
                f"A step of *{CACHED}* took {number(ratio)} times as long as one of *{TOKENS}*; the runs came one "
                "after the other.",
            ],
        )
    ]


def _run(scene: Scene, arm: str, checkpointing: bool, pause: float = 0.0) -> dict[str, list[float]]:
    """Metrics of each step kept; every image takes `pause` seconds more to be read."""
    folder = scene.folder / "runs" / f"{arm}, {pause:g} s an image more"
    recipe = recipe_of(
        scene, arm, checkpointing, {"train.max_steps": scene.size.train_steps, "train.output_dir": folder}
    )
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if pause:
            stack.enter_context(patch.object(ImageRoots, "read", _slowed(ImageRoots.read, pause)))
        run = train(recipe, "pt", versions={})
    steps = read_metrics(run / "metrics.jsonl")[NOT_KEPT:]
    shutil.rmtree(run)  # at the paper's shapes 3 GB of weights and moments
    found = {name: [round(step[name], 3) for step in steps] for name in KEPT if name in steps[0]}
    return found | {SHARE: [round(100 * step[WAIT] / step[STEP], 4) for step in steps]}


def _slowed(read, pause: float):
    def slow(roots: ImageRoots, image: str) -> bytes:
        time.sleep(pause)
        return read(roots, image)

    return slow
