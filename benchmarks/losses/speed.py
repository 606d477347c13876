"""Forward and backward of both losses, from predictions and targets on the device to the predictions' gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from ..figures import Comparison, number
from ..rounds import Arm, alternate
from .arms import PLAIN, Inputs, Losses, arms, total
from .sizes import Case, Size

MUST = 1.0
"""Speed of the losses over plain: faster."""


def measure(size: Size, device: str, folder: Path) -> list[Comparison]:
    return [_measured(case, device, size.rounds) for case in size.cases]


def _measured(case: Case, device: str, rounds: int) -> Comparison:
    inputs, works = Inputs.of(case, device), arms(device)
    forward: dict[str, list[float]] = {name: [] for name in works}
    seconds = alternate({name: _arm(work, inputs, device, forward[name]) for name, work in works.items()}, rounds)
    parts = [
        f"{name} {number(ahead * 1e3)} ms forward, {number((median(seconds[name]) - ahead) * 1e3)} ms backward"
        for name in works
        if (ahead := median(forward[name][1:]))
    ]
    return Comparison(
        title=f"{case}",
        rows=case.rows * case.layers,
        bytes=case.bytes,
        floor=PLAIN,
        seconds=seconds,
        must={name: MUST for name in works if name.startswith("fused")},
        notes=[f"{case.layers} layers of {case.rows} rows, {case.negatives} targets; {'; '.join(parts)}."],
    )


def _arm(
    work: Callable[[Inputs, list[torch.Tensor]], Losses], inputs: Inputs, device: str, forward: list[float]
) -> Arm:
    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def arm(_: int) -> float:
        predictions = inputs.predictions()
        began = wait()
        loss = total(work(inputs, predictions))
        forward.append(wait() - began)
        gradients = torch.autograd.grad(loss, [*predictions, inputs.scale])
        taken = wait() - began
        assert all(torch.isfinite(gradient.sum()) for gradient in gradients)
        return taken

    return arm
