"""Work for fresh processes, see `memory.py`; each prints its figures as one line of JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

from olavlm.student.training.live_bytes import LiveBytes

from ..cache.fresh import Peak
from .arms import SHARED, Inputs, arms, total
from .sizes import Case


def memory(case: dict, arm: str, device: str) -> dict:
    """MB that one forward and backward add at their peak.

    Resident memory is the kernel's figure, and holds what libraries set aside; tensors are those alive at once, counted
    as PyTorch makes them. On CUDA both are the allocator's.
    """
    case, work = Case(**case), arms(device)[arm]
    _step(work, Inputs.of(replace(case, tokens=1, dim=16), device))  # what a first call loads stays out of the figure
    if device == "cuda":
        inputs = Inputs.of(case, device)
        predictions = inputs.predictions()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(work, inputs, predictions)
        added = resident = torch.cuda.max_memory_allocated() - before
    else:
        inputs = Inputs.of(case, device)
        predictions, peak = inputs.predictions(), Peak()
        _step(work, inputs, predictions)
        resident = peak.mb() * 1e6
        predictions = inputs.predictions()
        with LiveBytes() as live:
            _step(work, inputs, predictions)
        added = live.peak
    return {
        "resident MB": round(resident / 1e6, 2),
        "tensors MB": round(added / 1e6, 3),
        "tensors over predictions and targets": round(added / case.bytes, 5),
    }


def deviations(cases: list[dict], device: str) -> dict:
    """The largest deviations of each arm's values and gradients from plain's in float64, relative to its largest.

    Of the scale's gradient, which is a sum of terms that cancel, the deviation is absolute.
    """
    columns = ("smooth-L1", "contrastive", "gradient of predictions", "gradient of the scale, absolute")
    lines = {}
    for case in (Case(**c) for c in cases):
        inputs, works = Inputs.of(case, device), arms(device)
        exact = _found(works[SHARED], inputs.in_float64())
        for name, work in works.items():
            if name != SHARED:
                pairs = zip(_found(work, inputs), exact, strict=True)
                *off, of_scale = [((ours - true).abs().max() / true.abs().max()).item() for ours, true in pairs]
                off.append(of_scale * exact[-1].abs().item())
                lines[f"{case}: {name}"] = dict(zip(columns, off, strict=True))
    return lines


def _found(work, inputs: Inputs) -> list[torch.Tensor]:
    """Both losses, the gradient of the predictions and that of the scale."""
    predictions = inputs.predictions()
    losses = work(inputs, predictions)
    gradients = torch.autograd.grad(total(losses), [*predictions, inputs.scale])
    return [x.detach() for x in (*losses, torch.stack(gradients[:-1]), gradients[-1])]


def _step(work, inputs: Inputs, predictions: list[torch.Tensor] | None = None) -> None:
    predictions = inputs.predictions() if predictions is None else predictions
    torch.autograd.grad(total(work(inputs, predictions)), [*predictions, inputs.scale])


TASKS = {"memory": memory, "deviations": deviations}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
