"""The loop that every small vision model is trained by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from time import perf_counter

import numpy as np
import torch
from torch import nn

Loss = Callable[[np.ndarray, np.random.Generator], torch.Tensor]
"""Of the samples with these indices, with random numbers for augmentation."""


class Optimizer:
    """Muon for matrices inside the blocks of a network, AdamW for all else: small networks learn in far fewer steps."""

    def __init__(self, modules: Iterable[nn.Module], lr: float, matrix_lr: float) -> None:
        matrices, others = [], []
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    inside = parameter.ndim == 2 and re.search(r"\.\d+\.", name)  # a block has a number
                    (matrices if inside else others).append(parameter)
        self.parameters = [*matrices, *others]
        self._parts = [torch.optim.AdamW(others, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        self._rates = [[group["lr"] for group in part.param_groups] for part in self._parts]

    def step(self, share: float) -> None:
        """One step at a share of the learning rates."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rates in zip(self._parts, self._rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)


def fit(
    name: str,
    modules: Iterable[nn.Module],
    loss_of: Loss,
    *,
    samples: int,
    steps: int,
    batch: int,
    lr: float,
    matrix_lr: float,
    seed: int,
    warmup: float = 0.05,
) -> float:
    """A cosine schedule over `steps` batches; prints a line now and then.

    Returns:
        The mean loss of the last twentieth of the steps.
    """
    optimizer = Optimizer(modules, lr, matrix_lr)
    rng, order, losses, began = np.random.default_rng([seed, steps]), np.empty(0, np.int64), [], perf_counter()
    for step in range(steps):
        done = step / steps
        share = min(1.0, (step + 1) / max(1, warmup * steps)) * (0.5 + 0.5 * np.cos(np.pi * done))
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(samples)])
        rows, order = order[:batch], order[batch:]
        loss = loss_of(rows, rng)
        if not torch.isfinite(loss):
            raise RuntimeError(f"{name}: loss {loss.item()} at step {step}; lower its learning rate")
        loss.backward()
        optimizer.step(float(share))
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0:
            recent = np.mean(losses[-max(1, steps // 20) :])
            pace = (perf_counter() - began) / (step + 1)
            print(f"  {name}: step {step + 1}/{steps}, loss {recent:.4f}, {1e3 * pace:.0f} ms a step", flush=True)
    return float(np.mean(losses[-max(1, steps // 20) :]))
