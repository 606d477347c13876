"""A causal language model of the library seen from outside: its blocks, the states between them, its vocabulary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from olavlm.student.errors import ModelError


def decoder_blocks(llm: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a causal LM; ModelError for an architecture that keeps them elsewhere."""
    decoder = llm.get_decoder()
    names = ("layers", "h", "blocks")
    for name in names:
        if isinstance(blocks := getattr(decoder, name, None), nn.ModuleList):
            return blocks
    raise ModelError(f"{type(llm).__name__} has no list of decoder blocks among {', '.join(names)}")


def state_width(llm: PreTrainedModel) -> int:
    """Width of the embeddings and of the states between blocks.

    Raises:
        ModelError: the two differ (as in OPT-350M), so that task tokens and predictors cannot have one width.
    """
    embeddings, states = llm.get_input_embeddings().embedding_dim, llm.config.get_text_config().hidden_size
    if embeddings != states:
        raise ModelError(
            f"{type(llm).__name__} has embeddings {embeddings} wide and states {states} wide; use an LLM of one width"
        )
    return embeddings


def takes_positions(llm: PreTrainedModel) -> bool:
    """Whether the LLM can be told the position of each token; some derive them, or need none."""
    return all("position_ids" in signature(part.forward).parameters for part in (llm, llm.get_decoder()))


def learned_positions(llm: PreTrainedModel) -> int | None:
    """How many positions the LLM has embeddings for, as GPT-2 and OPT have; None where positions are computed."""
    longest, words = getattr(llm.config.get_text_config(), "max_position_embeddings", None), llm.get_input_embeddings()
    tables = [m for m in llm.get_decoder().modules() if isinstance(m, nn.Embedding) and m is not words]
    return longest if any(m.num_embeddings - getattr(m, "offset", 0) == longest for m in tables) else None


@contextmanager
def capture_states(llm: PreTrainedModel, layers: set[int]) -> Iterator[dict[int | str, torch.Tensor]]:
    """Collects [B, L, H] states in one forward of the LLM within the context.

    Key l is the output of decoder block l, counted from 1; for the last block it is after the final norm, as in the
    library's `hidden_states`. Key "last" is always there: the decoder's output.
    """
    blocks = decoder_blocks(llm)
    states: dict[int | str, torch.Tensor] = {}

    def keep_block(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def keep_last(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states["last"] = output[0]
        if len(blocks) in layers:
            states[len(blocks)] = output[0]

    handles = [llm.get_decoder().register_forward_hook(keep_last)]
    handles += [blocks[layer - 1].register_forward_hook(keep_block(layer)) for layer in layers if layer < len(blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def head_is_plain(llm: PreTrainedModel) -> bool:
    """Whether the LLM's logits are its output embeddings applied to its final states, and nothing more.

    One forward, in which the output embeddings give known numbers of up to 100, so that a model which scales, caps or
    shifts its logits is found whatever its weights. False for a model without weights (on the meta device).

    Raises:
        ModelError: its states are not finite.
    """
    head = llm.get_output_embeddings()
    if head is None or llm.device.type == "meta":
        return False
    seen: dict[str, torch.Tensor] = {}

    def replace(_module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        seen["input"] = inputs[0]
        known = torch.linspace(-100, 100, output.numel(), device=output.device)
        seen["output"] = known.to(output.dtype).view_as(output)
        return seen["output"]

    was_training = llm.training
    llm.eval()
    handle = head.register_forward_hook(replace)
    try:
        ids = torch.arange(4, device=llm.device)[None] % llm.config.get_text_config().vocab_size
        with capture_states(llm, set()) as states:
            logits = llm(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        llm.train(was_training)
    if not states["last"].isfinite().all():
        raise ModelError(
            f"the language model's states are not finite in {llm.dtype}: its weights are damaged, or their training "
            "diverged; take another checkpoint"
        )
    return (
        "input" in seen
        and torch.equal(seen["input"], states["last"])
        and torch.equal(logits, seen["output"].to(logits.dtype))
    )


@torch.no_grad()
def grow_vocabulary(llm: PreTrainedModel, size: int) -> None:
    """Gives the LLM at least `size` vocabulary rows; new rows are the mean of the existing ones."""
    old = llm.get_input_embeddings().num_embeddings
    if size <= old:
        return
    llm.resize_token_embeddings(size, mean_resizing=False)
    for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        weight = module.weight
        weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def checkpoint_activations(llm: PreTrainedModel) -> None:
    """Make the blocks compute their activations anew in the backward, instead of keeping them.

    Not reentrant, which would cut states that predictors read off the graph.
    """
    # transformers 6 knows the first name alone, 5.17 the second.
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
