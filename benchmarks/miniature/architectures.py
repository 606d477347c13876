"""The small models, in the architectures that the product loads, with weights as they are drawn.

All see 8 x 8 patches of a picture, so that grids of teachers and base encoder lie over each other, 64 tokens each:
Depth-Anything-V2 takes 336 pixels and gets patches of 42, OneFormer's Swin takes 768 and ends with a stride of 96.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .lessons import CLASSES, GRID
from .scenes import SIDE
from .text import STEPS
from .tokenizer import FIRST, PLACES

if TYPE_CHECKING:
    from torch import nn
    from transformers import (
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        DepthAnythingForDepthEstimation,
        LlamaForCausalLM,
        OneFormerModel,
        PreTrainedTokenizerBase,
    )
    from transformers.models.llama.modeling_llama import LlamaAttention

DEPTH_SIDE, SEG_SIDE = 336, 768
"""Pixels that the teachers of these names give their networks, whatever the picture's size."""


def depth_anything() -> DepthAnythingForDepthEstimation:
    """A small Depth-Anything-V2: 6 blocks of width 64, of which the decoder reads four."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        image_size=DEPTH_SIDE,
        patch_size=DEPTH_SIDE // GRID,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        mlp_ratio=2,
        out_indices=[2, 3, 5, 6],
        reshape_hidden_states=False,
        layerscale_value=0.1,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=DEPTH_SIDE // GRID,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    return DepthAnythingForDepthEstimation(config)


def oneformer() -> OneFormerModel:
    """A small OneFormer with a Swin backbone of widths 16 to 128."""
    from transformers import OneFormerConfig, OneFormerModel, SwinConfig

    backbone = SwinConfig(
        image_size=SEG_SIDE,
        patch_size=SEG_SIDE // GRID // 8,
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=8,
        mlp_ratio=2,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = OneFormerConfig(
        backbone_config=backbone,
        conv_dim=32,  # the pixel decoder normalises 32 groups of channels
        hidden_dim=32,
        mask_dim=32,
        encoder_feedforward_dim=64,
        dim_feedforward=64,
        encoder_layers=1,
        decoder_layers=3,
        query_dec_layers=1,
        num_attention_heads=4,
        num_queries=len(CLASSES),
        task_seq_len=8,
        text_encoder_width=8,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=16,
        text_encoder_n_ctx=2,
        dropout=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    return OneFormerModel(config)


def clip_projected() -> CLIPVisionModelWithProjection:
    """The image encoder of the gen teacher: 4 blocks of width 64, an embedding of 48."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=SIDE // 6,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=48,
    )
    return CLIPVisionModelWithProjection(config)


def base_encoder() -> CLIPVisionModel:
    """The student's base encoder: 5 blocks of width 96."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=SIDE // GRID,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
    )
    model = CLIPVisionModel(config)
    (positions,) = (p for name, p in model.named_parameters() if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        # Real encoders tell where a patch is, and one that only learns what is in a picture has no need to learn it:
        # with the library's positions a linear reader found 3 % of 64 places in its features, with these 45 %.
        positions[1:] = 4 * waves(config.hidden_size)
    return model


def waves(width: int) -> torch.Tensor:
    """Sines and cosines of each patch's row and column, [GRID * GRID, width], by rows."""
    angles = torch.arange(GRID)[:, None] * torch.pi / GRID * torch.arange(1, width // 4 + 1) / 2
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [GRID, width / 2]
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def language_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of 6 blocks of width 128, whose first block starts by looking back."""
    from torch import nn
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        attention_bias=True,
        initializer_range=0.06,
        tie_word_embeddings=False,
        **ids,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)  # what a token is should outweigh what is near it
    in_order(model.model.embed_tokens, tokenizer)
    alike(model.model.embed_tokens, tokenizer)
    for block in model.model.layers:
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.data.div_((2 * len(model.model.layers)) ** 0.5)
    look_back(model.model.layers[0].self_attn)
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(6)  # what stands ahead of a token tells as much as it does
    model.generation_config = GenerationConfig(**ids)
    return model


def in_order(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds to the embeddings of places' steps, and of numbers, what tells which is the larger: waves of three lengths.

    Comparing is what the questions are about, and learning from pairs that 3 is less than 5 takes a small model long.
    """
    waves = torch.arange(STEPS)[:, None] * torch.pi / STEPS * torch.tensor([1, 2, 4]) / 2
    waves = torch.cat([waves.cos(), waves.sin()], dim=1)  # [STEPS, 6]
    directions = torch.randn(waves.shape[1], embeddings.embedding_dim) * 0.3
    with torch.no_grad():
        for words in (*PLACES, " {}"):
            ids = [tokenizer.encode(words.format(step), add_special_tokens=False) for step in range(STEPS)]
            tokens = torch.tensor([i for (i,) in ids])  # one token each
            embeddings.weight[tokens] += waves @ directions


def alike(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerBase) -> None:
    """A word that answers begin with is another token there than behind a space; both start as the same."""
    with torch.no_grad():
        for word in FIRST:
            (first,), (later,) = (tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}"))
            embeddings.weight[first] = embeddings.weight[later]


def look_back(attention: LlamaAttention, sharpness: float = 54.0) -> None:
    """Sets the biases of queries and keys so that head h attends to the token h + 1 places back, whatever it is.

    Rotary embeddings turn a constant query and key by their positions: with the query turned back by d places, pairs of
    dimensions agree in full d places back alone. To look one token back is what a small transformer takes the longest
    to find, and what looking a name up is built on. It is a start, and learns like the rest.
    """
    import torch

    size = attention.head_dim
    theta = attention.config.rope_parameters["rope_theta"]
    turns = theta ** (-torch.arange(size // 2) / (size // 2))
    turns = turns[: size // 4]  # the slow ones tell near places from one another too little
    with torch.no_grad():
        for head in range(attention.config.num_attention_heads):
            for projection, back in ((attention.q_proj, head + 1), (attention.k_proj, 0)):
                bias = projection.bias[head * size : (head + 1) * size]
                bias[: len(turns)] = sharpness**0.5 * torch.cos(back * turns)
                bias[size // 2 : size // 2 + len(turns)] = -(sharpness**0.5) * torch.sin(back * turns)
