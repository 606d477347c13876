"""Tiny stock LLaVA checkpoints, as `LlavaForConditionalGeneration` and `LlavaProcessor` save them, random weights."""

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

SIDE = 56
VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}

LLAMA_3_PARTS = (  # in the manner of LLaVA-Llama-3 on the hub: content is a list, the image is written by the template
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAVA_1_5 = (  # of llava-hf/llava-1.5-7b-hf: nothing ends an answer
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llama_clip(folder: Path, llm: Path, **changes) -> Path:
    """Llama with CLIP at 56 pixels, layer -2 of the patches; centre crop; a vocabulary with rows to spare."""
    tokenizer = tokenizer_of(llm, LLAMA_3_PARTS)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, num_key_value_heads=2, vocab_size=len(tokenizer) + 30, rope_theta=5e5),
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **changes,
    )
    images = LlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return _save(folder, config, LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAMA_3_PARTS,
    ))  # fmt: skip


def qwen2_siglip(folder: Path, llm: Path, **changes) -> Path:
    """Qwen2, embeddings tied, with SigLIP at 60 pixels that patches of 14 do not divide; last layer; whole pictures."""
    tokenizer = tokenizer_of(llm, LLAMA_3_PARTS)
    config = LlavaConfig(
        text_config=Qwen2Config(
            **TEXT, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.2
        ),
        vision_config=SiglipVisionConfig(**VISION, image_size=60, patch_size=14, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "multimodal_projector_bias": False}
        | changes,
    )
    images = SiglipImageProcessor(size={"height": 60, "width": 60})
    return _save(folder, config, LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="full", chat_template=LLAMA_3_PARTS
    ))  # fmt: skip


def tokenizer_of(llm: Path, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tiny LLM's, with `<image>`."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def _save(folder: Path, config: LlavaConfig, processor: LlavaProcessor) -> Path:
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # wide enough that a wrong layer or crop shows in the logits
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
