"""Any image-text model of transformers as lmms-eval asks models.

    python -m lmms_eval --model olavlm_transformers --model_args pretrained=HuggingFaceTB/SmolVLM-256M-Instruct ...

lmms-eval's own `huggingface` gives processors arguments that transformers 5 refuses, is always bfloat16, and puts two
beginning-of-sequence tokens where template and tokenizer each write one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from olavlm.student.errors import ModelError
from olavlm.student.loading import load_complete, load_errors

from .lmms_chat import ChatModel, Messages, dtype_of


class TransformersModel(ChatModel):
    """What `AutoModelForImageTextToText` loads and whose processor has a chat template.

    Args:
        pretrained: folder or hub id.
        dtype: float32, bfloat16, float16; auto: the checkpoint's own.
        batch_size, device: as in `ChatModel`.
        attn_implementation: in transformers' terms.
        trust_remote_code: whether to run code of the checkpoint's.
        max_batch_size: taken since lmms-eval gives it, and of no use here.

    Raises:
        StudentError: a checkpoint that cannot be used, and why.
    """

    title = "olavlm_transformers"

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        options = {"trust_remote_code": trust_remote_code}
        with load_errors(pretrained):
            self.processor = AutoProcessor.from_pretrained(pretrained, **options)
        if getattr(self.processor, "chat_template", None) is None:
            raise ModelError(f"{pretrained} has no chat template with which pictures are asked about")
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load_complete(
            AutoModelForImageTextToText,
            pretrained,
            dtype=dtype_of(dtype) or "auto",
            attn_implementation=attn_implementation,
            **options,
        )
        self.model.to(self.device).eval()

    def replies(self, chats: Sequence[Messages], options: Mapping[str, Any]) -> list[str]:
        """In the model's own chat template."""
        inputs = self.processor.apply_chat_template(
            [as_parts(messages) for messages in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)
        given = inputs["input_ids"].shape[1]
        own = {"pad_token_id": self.tokenizer.pad_token_id, "tokenizer": self.tokenizer}  # the latter for stop_strings
        new = self.model.generate(**inputs, **own, **options)[:, given:]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


def as_parts(messages: Messages) -> list[dict[str, Any]]:
    """The chat as transformers has it: a picture under `image`."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": part["url"]} if part["type"] == "image" else dict(part)
                for part in message["content"]
            ],
        }
        for message in messages
    ]
