"""Next-token loss from hidden states, with the vocabulary logits of a bounded number of positions at a time.

With a vocabulary of 128,256 the logits of a position are 0.5 MB in float32, and their softmax and gradient as much
again: of 6,400 labelled positions, 3.3 GB each. Only those of one chunk are there at once; the backward computes them
anew, which costs the head's forward again, less than 1% of what an 8B model computes for these tokens. A batch of one
chunk, as in pt, computes nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .eager import compute_dtype

CHUNK_LOGITS = 2**26
"""Logits there are at once: 256 MB in float32, 523 positions of Llama-3's vocabulary."""


def text_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of next-token cross-entropies over labelled positions, already shifted and gathered.

    Args:
        logits: (positions, vocabulary), any float dtype.
        labels: long (positions,).

    Returns:
        float32 scalar; exactly 0, with a graph, without a position.
    """
    return F.cross_entropy(logits.to(compute_dtype(logits)), labels, reduction="sum")


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits are computed together."""
    return max(1, CHUNK_LOGITS // vocabulary)


def text_loss_from_states(head: nn.Module, states: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Sum of the cross-entropies of `head(states)`: `text_loss_sum` of the logits, exact up to rounding.

    The head is called once, and chunks within that call: a wrapper that gathers its weights for a call (FSDP, ZeRO)
    does so once, and as often on each rank, whatever the number of chunks there.

    Args:
        head: the LLM's output embeddings, with whatever bias, ties and adapters they have.
        states: (positions, H).
        labels: long (positions,).
        vocabulary: number of tokens that the head gives logits for.

    Returns:
        float32 scalar; exactly 0, with a graph, without a position.
    """
    rows = chunk_rows(vocabulary)
    if len(states) <= rows:
        return text_loss_sum(head(states), labels)

    def loss_of(logits_of: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        def chunk_loss(some: torch.Tensor, their_labels: torch.Tensor) -> torch.Tensor:
            return text_loss_sum(logits_of(some), their_labels)

        pairs = zip(states.split(rows), labels.split(rows), strict=True)
        losses = [checkpoint(chunk_loss, *pair, use_reentrant=False) for pair in pairs]
        return torch.stack(losses).sum()

    with _in_place_of_forward(head, loss_of):
        return head(states)


@contextmanager
def _in_place_of_forward(module: nn.Module, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """A call of the module, hooks included, computes `function(its forward, ...)`."""
    forward, own = module.forward, "forward" in vars(module)
    module.forward = lambda *inputs: function(forward, *inputs)
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward
