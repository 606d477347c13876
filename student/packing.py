"""The LLM on a micro-batch without padding: its samples in one row, each attending to itself alone.

Padded, an LLM computes as many rows as the longest sample has, for every sample. Packed, it computes the tokens there
are. What comes out is put back in padded form for the wanted states alone, so that nothing else knows of it.

Attention within each sample is what its implementation is told, by lengths that the host knows:
- flash attention takes them as `cu_seq_lens`, for one kernel over all samples;
- SDPA has no such argument, and its mask would be quadratic in the length of the row (for 16 samples of 700 tokens 125
  million numbers, of which one in 32 is True), so that `_sdpa_by_sample` calls it once a sample, without any mask;
- eager attention gets the library's block-causal mask, by position ids that start anew: of use in tests alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from olavlm.student.decoder import capture_states, takes_positions
from olavlm.student.errors import ModelError

SDPA_BY_SAMPLE = "olavlm_sdpa_by_sample"
"""Name of the attention implementation, as the library knows it."""
_LENGTHS = "sample_lengths"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_PROBE = (7, 1, 4)  # lengths of samples


def _sdpa_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The library's SDPA; given `sample_lengths`, of each sample of the one row [1, heads, tokens, head width] alone.

    A sliding window is applied where a layer has one and a sample is longer.
    """
    lengths = kwargs.pop(_LENGTHS, None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    rows = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = None if window is None or length <= window else _window_mask(length, window, q.device)
        rows.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(rows, dim=1), None


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, length, length]: causal, `window` positions wide, its own included."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)[None, None]


AttentionInterface.register(SDPA_BY_SAMPLE, _sdpa_by_sample)
AttentionMaskInterface.register(SDPA_BY_SAMPLE, sdpa_mask)  # of what is not packed, as in generation


def prepare_packing(packing: bool | None, llm: PreTrainedModel) -> bool:
    """Whether the LLM is to run packed, and makes it ready for that.

    None packs with SDPA and flash attention where the LLM can. With SDPA on a CPU packed samples take 0.86 of the time
    of padded ones at 3% padding, 0.39 at 50%, and with the library's block-causal mask 1.8 and 0.7
    (`benchmarks/forward`). On CUDA neither attention has been measured yet.

    Raises:
        ModelError: packing is asked for, and the LLM cannot; with the reason.
    """
    usual = llm.config._attn_implementation in ("sdpa", SDPA_BY_SAMPLE) or _is_flash(llm)
    if packing is False or (packing is None and not usual):
        return False
    reason = why_not(llm)
    if reason is not None and packing:
        raise ModelError(f"model.packing is true, and {type(llm).__name__} {reason}; set it to false")
    if reason is None and llm.config._attn_implementation == "sdpa":
        llm.set_attn_implementation(SDPA_BY_SAMPLE)
    return reason is None


def packed_inputs(llm: PreTrainedModel, lengths: tuple[int, ...], positions: torch.Tensor) -> dict[str, Any]:
    """What tells the LLM's decoder that the one row it is given holds samples of these lengths.

    Args:
        positions: long (tokens,), of each token in its sample.
    """
    inputs: dict[str, Any] = {"position_ids": positions[None], "attention_mask": None}
    if llm.config._attn_implementation == SDPA_BY_SAMPLE:
        # A mask in four dimensions is handed through as it is: the library makes none of its own.
        return {**inputs, _LENGTHS: lengths, "attention_mask": positions.new_empty(1, 1, 0, 0, dtype=torch.bool)}
    if _is_flash(llm):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends = ends.to(positions.device, non_blocking=True)
        longest = max(lengths)
        return {**inputs, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest,
                "max_length_k": longest}  # fmt: skip
    return inputs


def why_not(llm: PreTrainedModel) -> str | None:
    """Why an LLM cannot run packed; None if it can.

    Its states of a few samples are compared with those of the same samples padded: recurrent decoders, those that
    ignore positions, and attention that is none of the library's are found so, whatever the weights. Flash attention,
    which an LLM that is still on the host cannot run, is represented by SDPA.
    """
    if not takes_positions(llm):
        return "takes no position ids"
    config = llm.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    if unknown:
        return f"has layers of {', '.join(sorted(unknown))}"
    if getattr(config, "sliding_window", None) and not llm._supports_flash_attn:  # which reads no mask either
        return "tells of its sliding window by a mask alone"
    if llm.device.type == "meta":
        return None
    implementation = llm.config._attn_implementation
    try:
        if implementation != "eager":
            llm.set_attn_implementation(SDPA_BY_SAMPLE)
        packed, padded = _states_packed(llm), _states_padded(llm)
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        return f"does not run on several samples in one row ({type(e).__name__}: {str(e).splitlines()[0]})"
    finally:
        llm.set_attn_implementation(implementation)
    tolerance = 1e-4 if packed.dtype == torch.float32 else 0.05
    if (packed - padded).norm() > tolerance * padded.norm():
        return "mixes the samples of one row, or loses their positions"
    return None


def _states_packed(llm: PreTrainedModel) -> torch.Tensor:
    """[tokens, H], final states of the probe's samples."""
    positions = torch.cat([torch.arange(length, device=llm.device) for length in _PROBE])
    return _final_states(llm, _probe_ids(llm)[None], **packed_inputs(llm, _PROBE, positions))[0]


def _states_padded(llm: PreTrainedModel) -> torch.Tensor:
    """[tokens, H], the same."""
    ids = pad_sequence(_probe_ids(llm).split(_PROBE), batch_first=True)
    mask = torch.arange(ids.shape[1], device=llm.device) < torch.tensor(_PROBE, device=llm.device)[:, None]
    return _final_states(llm, ids, attention_mask=mask.long())[mask]


def _probe_ids(llm: PreTrainedModel) -> torch.Tensor:
    return torch.arange(sum(_PROBE), device=llm.device).remainder(llm.config.get_text_config().vocab_size)


@torch.no_grad()
def _final_states(llm: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    was_training = llm.training
    llm.eval()
    try:
        with capture_states(llm, set()) as states:
            llm.get_decoder()(inputs_embeds=llm.get_input_embeddings()(ids), use_cache=False, **inputs)
    finally:
        llm.train(was_training)
    return states["last"]


def _is_flash(llm: PreTrainedModel) -> bool:
    return "flash" in llm.config._attn_implementation
