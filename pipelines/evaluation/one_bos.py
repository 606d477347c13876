"""Prompts that begin with one beginning-of-sequence token.

lmms-eval's chat models have a chat template write the prompt as text and tokenise that. Where both the template and the
tokenizer put the token, as with Llama 3, the model is asked with two. transformers' own `apply_chat_template` puts one
when it tokenises, and so do we.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

PROCESSORS = ("processor", "_image_processor")
"""What lmms-eval's models call theirs."""


def begin_once(model: Any) -> bool:
    """Keep the chat template of a model of lmms-eval from writing what its tokenizer adds; whether there was need."""
    processor = next((p for name in PROCESSORS if isinstance(p := getattr(model, name, None), ProcessorMixin)), None)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or tokenizer.bos_token is None:
        return False
    if tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return False
    render = processor.apply_chat_template

    def render_without(*args: Any, **kwargs: Any) -> Any:
        prompt = render(*args, **kwargs)
        return prompt.removeprefix(tokenizer.bos_token) if isinstance(prompt, str) else prompt

    processor.apply_chat_template = render_without
    return True
