"""Work for fresh processes, see `memory.py`; each prints its figures as one line of JSON."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from olavlm.student.task import DistillTask
from olavlm.student.training.live_bytes import LiveBytes

from ..cache.fresh import Peak
from .arms import OpenArm, open_arm
from .base_models import random_weights
from .memory import ADDED, BOTH
from .scene import Scene
from .sizes import CACHED


def memory(folder: str, size: str, arm: str, device: str, checkpointing: bool) -> dict:
    """MB of the arm's second step at its peak, all that is there before it included, and of the step's own tensors.

    On a CPU the first is the kernel's figure of resident memory, above the imports. Data is loaded in this process. For
    cached targets also what the losses add to the step's tensors, by another step in which they cost nothing.
    """
    peak, scene = Peak(), Scene(Path(folder), size)
    with ExitStack() as stack:
        stack.enter_context(random_weights(device))
        opened = stack.enter_context(open_arm(scene, arm, checkpointing, workers=0))
        try:
            opened.take(opened.batch())
            most, own = _peak_of_a_step(opened, peak)
        except torch.OutOfMemoryError as e:
            return {"out_of_memory": str(e).splitlines()[0]}
        what = "allocated" if device == "cuda" else "resident"
        found = {"step": {f"{what} MB": round(most / 1e6, 2), "of these a step's tensors MB": round(own / 1e6, 3)}}
        if arm == CACHED:
            with patch.object(sys.modules[DistillTask.__module__], "embedding_loss_sums", costs_nothing):
                _, without = _peak_of_a_step(opened, peak)
            added, both = own - without, sum(_bytes(task, scene.size.batch) for task in opened.model.tasks)
            columns = {BOTH: both / 1e6, ADDED: round(added / 1e6, 3), "added over them": round(added / both, 5)}
            found["losses"] = columns
        return found


def _peak_of_a_step(opened: OpenArm, peak: Peak) -> tuple[float, float]:
    """Bytes at the peak, and of what the step made."""
    batch = opened.batch()
    if opened.device.type == "cuda":
        opened.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        opened.take(batch)
        most = torch.cuda.max_memory_allocated()
        return most, most - before
    peak.forget()
    with LiveBytes() as live:
        opened.take(batch)
    return peak.mb() * 1e6, live.peak


def _bytes(task, rows: int) -> int:
    """Of a task's predictions, float32, and of its targets, float16 as they are stored."""
    return rows * task.tokens * task.dim * (4 * len(task.layers) + 2)


class _Nothing(torch.autograd.Function):
    """A loss whose gradient is the prediction itself."""

    @staticmethod
    def forward(ctx, prediction: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(prediction)
        return prediction.flatten()[0].clone()

    @staticmethod
    def backward(ctx, _gradient: torch.Tensor) -> torch.Tensor:
        return ctx.saved_tensors[0]


def costs_nothing(predictions, _targets, _labels, _rows, _valid, scale, **_kernels) -> tuple[torch.Tensor, ...]:
    """In the place of `embedding_loss_sums`: the least that any losses of these predictions take, nothing."""
    sums = torch.stack([_Nothing.apply(prediction) for prediction in predictions]).float()
    return sums, sums.detach() + scale


TASKS = {"memory": memory}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
