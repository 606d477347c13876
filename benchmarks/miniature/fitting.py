"""The loop that every small vision model is trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

import numpy as np
import torch

Loss = Callable[[np.ndarray, np.random.Generator], torch.Tensor]
"""Of the samples with these indices, with random numbers for augmentation."""


def fit(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Loss,
    *,
    samples: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
) -> float:
    """AdamW with a cosine schedule over `steps` batches; prints a line now and then.

    Returns:
        The mean loss of the last twentieth of the steps.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    rng, order, losses, began = np.random.default_rng([seed, steps]), np.empty(0, np.int64), [], perf_counter()
    for step in range(steps):
        done = step / steps
        rate = min(1.0, (step + 1) / max(1, warmup * steps)) * (0.5 + 0.5 * np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(samples)])
        rows, order = order[:batch], order[batch:]
        loss = loss_of(rows, rng)
        if not torch.isfinite(loss):
            raise RuntimeError(f"{name}: loss {loss.item()} at step {step}; lower its learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0:
            recent = np.mean(losses[-max(1, steps // 20) :])
            pace = (perf_counter() - began) / (step + 1)
            print(f"  {name}: step {step + 1}/{steps}, loss {recent:.4f}, {1e3 * pace:.0f} ms a step", flush=True)
    return float(np.mean(losses[-max(1, steps // 20) :]))
