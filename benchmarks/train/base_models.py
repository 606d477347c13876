"""LLM and base encoder: configs, tokenizer and image processor on disk, and weights at random where they are computed.

The product reads the folders as it reads a checkpoint's. Only the reading of weights is taken out of its hands: an
8B model would be written to be read once. Speed does not depend on the weights' values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig

from olavlm.student import OlaVLM
from olavlm.student.vision.encoders import VisionEncoder, load_encoder_config, load_image_transform
from olavlm.teachers.tiny_llm import BOS, EOT, PAD, train_tokenizer

from .sizes import Encoder, Llm

PATCH = 14


def write_llm(folder: Path, shape: Llm) -> Path:
    """`folder` with a Llama's config and a tokenizer made on the spot, in the layout of Llama-3's."""
    tokenizer = train_tokenizer()
    bos, eot, pad = tokenizer.convert_tokens_to_ids([BOS, EOT, PAD])
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=bos,
        eos_token_id=eot,
        pad_token_id=pad,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_encoder(folder: Path, shape: Encoder) -> Path:
    """`folder` with a CLIP tower's config and its image processor."""
    config = CLIPVisionConfig(
        image_size=shape.image,
        patch_size=PATCH,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
    )
    config.save_pretrained(folder)
    side = shape.image
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Within it, the product's base models are made on `device` instead of being read.

    A folder's model is made once and is the same object for whoever asks again: PT trains neither of the two, so that
    all arms of a comparison can share them.
    """
    made: dict[Path, Any] = {}

    def read_llm(model_class: Any, path: str | Path, *, dtype: torch.dtype, attn_implementation: str | None) -> Any:
        assert model_class is AutoModelForCausalLM
        return _once(Path(path), lambda: _llm(path, dtype, attn_implementation))

    def read_encoder(
        name: str | Path, select_layer: int, dtype: torch.dtype, attn_implementation: str | None
    ) -> VisionEncoder:
        return _once(Path(name), lambda: _encoder(name, select_layer, dtype, attn_implementation))

    def _once(key: Path, make: Any) -> Any:
        if key not in made:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made[key] = make()
        return made[key]

    where_it_reads = sys.modules[OlaVLM.__module__]
    with (
        patch.object(where_it_reads, "load_complete", read_llm),
        patch.object(VisionEncoder, "from_pretrained", staticmethod(read_encoder)),
    ):
        yield


def _llm(path: str | Path, dtype: torch.dtype, attention: str | None) -> Any:
    config = AutoConfig.from_pretrained(path)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def _encoder(name: str | Path, select_layer: int, dtype: torch.dtype, attention: str | None) -> VisionEncoder:
    tower = AutoModel.from_config(load_encoder_config(name), dtype=dtype, attn_implementation=attention)
    return VisionEncoder(tower, select_layer, load_image_transform(name).size)
