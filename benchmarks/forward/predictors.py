"""The depth task's predictors of two layers, forward and backward: one after the other, or their weights stacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch.func import functional_call, stack_module_state, vmap

from olavlm.student.predictor import EmbeddingPredictor

from ..figures import Comparison
from ..rounds import Arm, alternate
from .sizes import Size

FLOOR, LAYERS = "one after the other", 2


def measure(size: Size, device: str, folder: Path) -> list[Comparison]:
    torch.manual_seed(0)
    with torch.device(device):
        predictors = [EmbeddingPredictor(size.width, size.dim, size.queries, width=size.width) for _ in range(LAYERS)]
        keys = torch.randn(LAYERS, 1, size.keys, size.width)
        queries = torch.randn(1, size.queries, size.width)
        mask = torch.rand(1, size.keys) > 0.1
    kept, _ = stack_module_state(predictors)
    kept = {name: values.detach().requires_grad_() for name, values in kept.items()}

    def loop(states: torch.Tensor, shared: torch.Tensor) -> list[torch.Tensor]:
        return [predictor(state, shared, mask) for predictor, state in zip(predictors, states, strict=True)]

    def by_weights(weights: dict[str, torch.Tensor], states: torch.Tensor, shared: torch.Tensor) -> list[torch.Tensor]:
        def one(own: dict[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
            return functional_call(predictors[0], own, (state, shared, mask))

        return list(vmap(one)(weights, states))

    def stacked(states: torch.Tensor, shared: torch.Tensor) -> list[torch.Tensor]:
        names = dict(predictors[0].named_parameters())
        weights = {name: torch.stack([dict(p.named_parameters())[name] for p in predictors]) for name in names}
        return by_weights(weights, states, shared)

    def kept_stacked(states: torch.Tensor, shared: torch.Tensor) -> list[torch.Tensor]:
        return by_weights(kept, states, shared)

    arms = {FLOOR: loop, "stacked in each step": stacked, "kept stacked": kept_stacked}
    trained = [[*predictors[0].parameters(), *predictors[1].parameters(), *kept.values()]] * len(arms)
    return [
        Comparison(
            title=f"depth, {LAYERS} layers, H = d = {size.width}, {size.queries} queries, {size.keys} keys, one sample",
            rows=1,
            bytes=0,
            floor=FLOOR,
            seconds=alternate(
                {name: _arm(work, keys, queries, of) for (name, work), of in zip(arms.items(), trained, strict=True)},
                size.predictor_rounds,
            ),
            notes=["*kept stacked*: as if the weights were one parameter; each step stacks nothing."],
        )
    ]


def _arm(
    work: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
    keys: torch.Tensor,
    queries: torch.Tensor,
    trained: list[torch.Tensor],
) -> Arm:
    def arm(_: int) -> float:
        states, shared = keys.clone().requires_grad_(), queries.clone().requires_grad_()
        for parameter in trained:
            parameter.grad = None
        _wait(keys)
        began = perf_counter()
        torch.stack([prediction.square().mean() for prediction in work(states, shared)]).sum().backward()
        _wait(keys)
        return perf_counter() - began

    return arm


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
