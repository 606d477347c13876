"""The step of every arm by turns, and where its time goes.

What is timed apart from the rounds is in `parts.py`. The round that is not kept counts the FLOPs.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..figures import Figures, Measurement, Steps, number
from ..rounds import Arm, alternate
from .arms import OpenArm, open_arm
from .base_models import random_weights
from .parts import timed_parts
from .scene import Scene
from .sizes import ARMS, CACHED, ONE, ONLINE, PLAIN, TOKENS

MOST, LEAST = 1.10, 1.5
"""Limits on a GPU: cached targets over no distillation, and one image at a time over cached targets."""
OVER = {TOKENS: PLAIN, CACHED: TOKENS, ONLINE: CACHED, ONE: CACHED}


def measure(scene: Scene, device: str) -> list[Figures]:
    figures: list[Figures] = []
    for checkpointing in scene.size.checkpointing:
        try:
            with random_weights(device):
                figures += _measured(scene, device, checkpointing)
        except torch.OutOfMemoryError as e:
            if not figures:
                raise
            figures[-1].notes.append(f"{_setting(checkpointing)}, the arms did not fit together: {_line(e)}")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return figures


def _measured(scene: Scene, device: str, checkpointing: bool) -> list[Figures]:
    size, gflop = scene.size, {}
    with ExitStack() as opened:
        arms: dict[str, OpenArm] = {}
        for name in ARMS:
            online = arms[ONLINE].source if name == ONE else None  # one set of teachers serves both
            arms[name] = opened.enter_context(open_arm(scene, name, checkpointing, online=online))
        sequence = arms[CACHED].sequence()
        works = {name: _round(arm, size.steps, gflop, name) for name, arm in arms.items()}
        fewer = dict.fromkeys((ONLINE, ONE), size.online_rounds)
        seconds = alternate(works, size.rounds, fewer)
        parts = {name: timed_parts(arm, size.part_steps) for name, arm in arms.items()}
    times = gflop[CACHED] / gflop[TOKENS]
    teachers = ", ".join(f"{task} {name}" for task, name in size.teachers.items())
    what = f"{size.llm.title} and {size.encoder.title}, {_setting(checkpointing)}"
    notes = [
        f"Sequences of {sequence} positions; teachers {teachers}, {size.compute_dtype}; "
        f"computing threads: {torch.get_num_threads()}. Predictors and losses are {1 - 1 / times:.1%} of the FLOPs of "
        f"*{CACHED}*: by these its step would take {number(times)} times as long as that of *{TOKENS}*."
    ]
    if device == "cpu":
        notes.append(f"The limits ({MOST} for *{CACHED}*, {LEAST} for *{ONE}*) are a GPU's; here there are none.")
    steps = Steps(
        title=what,
        images=size.batch,
        seconds=seconds,
        over=OVER,
        at_most={CACHED: MOST} if device == "cuda" else {},
        at_least={ONE: LEAST} if device == "cuda" else {},
        gflop={name: round(value, 3) for name, value in gflop.items()},
        notes=notes,
    )
    return [steps, Measurement(f"{what}: where the time of a step goes, ms", parts, of="steps")]


def _round(arm: OpenArm, steps: int, gflop: dict[str, float], name: str) -> Arm:
    def one_round(k: int) -> float:
        if k == 0:
            batch = arm.batch()
            with FlopCounterMode(display=False) as counter:
                arm.take(batch)
            gflop[name] = counter.get_total_flops() / 1e9
            return 0.0
        return sum(arm.seconds() for _ in range(steps)) / steps

    return one_round


def _setting(checkpointing: bool) -> str:
    return f"{'with' if checkpointing else 'without'} gradient checkpointing"


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
