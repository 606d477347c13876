"""The LLM's forward and backward on a micro-batch, padded and packed, with SDPA."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from olavlm.student.packing import packed_inputs, prepare_packing

from ..figures import Comparison
from ..rounds import Arm, alternate
from .sizes import Size

FLOOR = "padded, with a mask"


def measure(size: Size, device: str, folder: Path) -> list[Comparison]:
    return [_measured(title, lengths, size, device) for title, lengths in size.lengths.items()]


def _measured(title: str, lengths: tuple[int, ...], size: Size, device: str) -> Comparison:
    torch.manual_seed(0)
    config = LlamaConfig(**size.llm, vocab_size=64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    llms = [AutoModelForCausalLM.from_config(config, dtype=dtype).to(device) for _ in range(2)]
    prepare_packing(True, llms[1])
    plain, by_sample = llms
    samples = [torch.randn(length, config.hidden_size, device=device, dtype=dtype) for length in lengths]
    padded, packed = pad_sequence(samples, batch_first=True), torch.cat(samples)[None]
    longest = torch.arange(max(lengths), device=device)
    mask = (longest < torch.tensor(lengths, device=device)[:, None]).long()
    positions = torch.cat([longest[:length] for length in lengths])
    arms: dict[str, Arm] = {
        FLOOR: _arm(plain, padded, attention_mask=mask),
        "padded, without a mask": _arm(plain, padded),
        "packed, with the library's mask": _arm(plain, packed, position_ids=positions[None]),
        "packed, attention by sample": _arm(by_sample, packed, **packed_inputs(by_sample, lengths, positions)),
    }
    share = 100 * (1 - sum(lengths) / (len(lengths) * max(lengths)))
    return Comparison(
        title=title,
        rows=len(lengths),
        bytes=0,
        floor=FLOOR,
        seconds=alternate(arms, size.rounds),
        notes=[f"Samples of {', '.join(map(str, lengths))} tokens, {share:.0f}% padding; Llama config {size.llm}."],
    )


def _arm(llm: PreTrainedModel, embeds: torch.Tensor, **inputs: Any) -> Arm:
    def arm(_: int) -> float:
        leaf = embeds.clone().requires_grad_()
        _wait(leaf)
        began = perf_counter()
        llm.get_decoder()(
            inputs_embeds=leaf, use_cache=False, **inputs
        ).last_hidden_state.float().square().sum().backward()
        _wait(leaf)
        taken = perf_counter() - began
        llm.zero_grad()
        return taken

    return arm


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
