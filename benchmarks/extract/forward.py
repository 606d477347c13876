"""The whole pipeline, from image files to committed shards, over the teacher's bare forward.

The floor has its batches prepared and in memory (pinned, where there is CUDA) and throws the features away. Both arms
use the same teacher object, batch size and number of compute threads.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from olavlm.cache import ImageRoots
from olavlm.teachers import Teacher

from ..cache.commit import write_arm
from ..figures import Comparison
from ..rounds import Arm, alternate
from .architectures import ARCHITECTURES, load
from .extraction import Job, shares
from .photographs import photographs
from .sizes import Pass, Size

MUST = 0.95
BARE, OURS = "bare forward", "olavlm"


def measure(size: Size, folder: Path) -> list[Comparison]:
    return [_compare(work, size, folder / work.architecture) for work in size.forwards]


def _compare(work: Pass, size: Size, folder: Path) -> Comparison:
    folder.mkdir()
    teacher = load(work.architecture, device=size.device, compute_dtype=size.compute_dtype)
    images = photographs(folder / "images", work.rows)
    _batches(teacher, folder / "images", images[:1], 1, size.device)  # what is loaded late is not counted
    began = perf_counter()
    batches = _batches(teacher, folder / "images", images, work.batch, size.device)
    preparing = (perf_counter() - began) / work.rows
    with FlopCounterMode(display=False) as counter:
        teacher.forward(batches[0][:1])
    job = Job({"teacher": teacher}, folder / "images", images, work.batch, work.shard_rows, size.device, size.threads)
    arms = {BARE: bare(teacher, batches, size.device), OURS: write_arm(folder / "store", job.prepare)}
    seconds = alternate(arms, size.rounds)
    row = min(seconds[BARE]) / work.rows
    dominates = preparing / size.threads < row
    notes = [
        f"Preparing an image takes {preparing * 1e3:.3g} ms of one core, of which the pipeline has {size.threads} for "
        f"it; {shares(job.stages)}."
    ]
    if not dominates:
        notes.append("Preparing takes longer here than the forward, which no pipeline can hide: no limit is set.")
    return Comparison(
        title=f"{ARCHITECTURES[work.architecture].title}, {size.compute_dtype}, batches of {work.batch}",
        rows=work.rows,
        bytes=0,
        floor=BARE,
        seconds=seconds,
        must={OURS: MUST} if dominates else {},
        gflop=round(counter.get_total_flops() / 1e9, 3),
        notes=notes,
    )


def _batches(teacher: Teacher, folder: Path, images: list[str], batch: int, device: str) -> list[torch.Tensor]:
    roots, batches = ImageRoots([str(folder)]), []
    for start in range(0, len(images), batch):
        stack = np.stack([teacher.prepare(roots.open(image)) for image in images[start : start + batch]])
        batches.append(torch.from_numpy(stack).pin_memory() if device == "cuda" else torch.from_numpy(stack))
    return batches


def bare(teacher: Teacher, batches: list[torch.Tensor], device: str) -> Arm:
    def arm(_: int) -> float:
        began = perf_counter()
        for batch in batches:
            teacher.forward(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - began

    return arm
