"""The model that is probed: loaded from wherever it lies, frozen, and what its probes are trained and evaluated on.

A probe reads states that depend on everything in the sequence: the picture's frame, the template, the tokens that are
inserted. So the frame and the tokens are the model's own, `token_layout` is kept beside the probes, and other states
are refused when they are evaluated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlavaConfig

from olavlm.cache import Dataset, ImageRoots
from olavlm.student.adapter import is_adapter, read_adapter
from olavlm.student.data.collator import Collator, least_length
from olavlm.student.data.targets import TargetSource
from olavlm.student.decoder import decoder_blocks, state_width
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.formats.llava_hf import from_llava_hf
from olavlm.student.loading import load_errors
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.conversation import IMAGE_TOKEN, load_tokenizer

TURNS = (
    {"from": "human", "value": f"{IMAGE_TOKEN}\nDescribe the image in two lines."},
    {"from": "gpt", "value": "n"},
)
"""What stands around an image; the answer is a dummy, as in the public code (arXiv 2412.09585)."""


def load_probed(
    source: str | Path, *, dtype: torch.dtype = torch.float32, template: str | None = None
) -> tuple[OlaVLM, list[str]]:
    """A frozen model in evaluation mode, its tokenizer with it, and what had to be chosen on the way.

    Args:
        source: a run folder of any stage, or a stock `LlavaForConditionalGeneration`, a folder or a hub id.
        dtype: of LLM and encoder.
        template: prompt template of a stock LLaVA; by default what its chat template writes.

    Raises:
        ModelError: no such model, or one of another kind.
        RecipeError: a template that is unknown, or given for a model that knows its own.
    """
    notes: list[str] = []
    adapter = Path(source).exists() and is_adapter(source)
    model_type = OlaVLMConfig.model_type
    if not adapter:
        with load_errors(source):
            model_type = AutoConfig.from_pretrained(str(source)).model_type
    if template is not None and model_type == OlaVLMConfig.model_type:
        raise RecipeError(f"template {template}: {source} knows its own; leave it out")
    if adapter:
        model, model.tokenizer = read_adapter(Path(source)).build(with_predictors=False, dtype=dtype)
    elif model_type == OlaVLMConfig.model_type:
        model = OlaVLM.from_pretrained(source, dtype=dtype)
        model.tokenizer = model.tokenizer or load_tokenizer(source)  # which says why there is none
    elif model_type == LlavaConfig.model_type:
        converted = from_llava_hf(source, template)
        model, notes = converted.model, converted.notes
        for part in (model.llm, model.vision):
            part.to(dtype)
    else:
        raise ModelError(
            f"{source} holds a {model_type!r} model; give a run folder of olavlm-train, or a checkpoint of "
            "LlavaForConditionalGeneration"
        )
    return model.eval().requires_grad_(False), notes


def token_layout(model: OlaVLM) -> dict[str, Any]:
    """What the states of a sequence depend on beside the weights, as JSON types."""
    config = model.config
    return {
        "turns": list(TURNS),
        "template": config.template,
        "geometry": config.geometry,
        "image_size": config.image_transform.size,
        "image_tokens": model.num_image_tokens,
        "task_tokens": [[task.name, config.num_task_tokens] for task in model.tasks if config.num_task_tokens],
        "fusion": config.fusion,
        "width": state_width(model.llm),
        "layers": len(decoder_blocks(model.llm)),
    }


def check_layout(model: OlaVLM, expected: dict[str, Any], where: str | Path) -> None:
    """ModelError, naming the first difference, for a model that has other sequences than the probes were trained on."""
    found = token_layout(model)
    for key, value in expected.items():
        if found[key] != value:
            raise ModelError(f"{where}: its probes were trained with {key} {value}, and this model has {found[key]}")


def chosen_layers(model: OlaVLM, layers: list[int] | None) -> tuple[int, ...]:
    """The layers to probe, all by default; RecipeError for one that the model does not have."""
    count = len(decoder_blocks(model.llm))
    if wrong := [layer for layer in layers or () if not 1 <= layer <= count]:
        raise RecipeError(f"layer {wrong[0]} of an LLM of {count} blocks; layers are counted from 1")
    return tuple(sorted(set(layers))) if layers else tuple(range(1, count + 1))


def probe_collator(model: OlaVLM, dataset: Dataset, roots: ImageRoots, source: TargetSource) -> Collator:
    """Makes micro-batches for the model, framed and tokenised as it was trained."""
    longest = model.longest_sequence
    least = least_length(model.tokenizer, model.config.template, model.inserted)
    if longest < least:
        raise RecipeError(f"the model's longest sequence is {longest} tokens, and a question about an image {least}")
    return Collator(
        dataset=dataset,
        roots=roots,
        tokenizer=model.tokenizer,
        transform=model.config.image_transform,
        template=model.config.template,
        inserted=model.inserted,
        max_length=longest,
        source=source,
    )
