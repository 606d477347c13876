"""Our checkpoints as lmms-eval asks models.

    python -m lmms_eval --model olavlm --model_args pretrained=runs/ift,dtype=float16 --tasks mmstar --batch_size 8

In several processes by `accelerate launch --config_file $(olavlm-train accelerate ddp) -m lmms_eval ...`, on CPUs with
ACCELERATE_USE_CPU=true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from olavlm.student import load_checkpoint
from olavlm.student.errors import SampleError
from olavlm.student.text.conversation import IMAGE_TOKEN
from olavlm.student.text.dialogue import as_text

from .backends import TEACHER
from .lmms_chat import ChatModel, Messages, dtype_of

SPEAKERS = {"user": "human", "assistant": "gpt"}


class OlaVLMModel(ChatModel):
    """A run folder of olavlm-train, of any stage.

    Args:
        pretrained: the run folder.
        dtype: of LLM and encoder: float32, bfloat16, float16; auto: what they were trained in.
        batch_size, device: as in `ChatModel`.
        max_batch_size: taken since lmms-eval gives it, and of no use here.
        places: teacher_NAME=MODEL, for a fusion baseline whose teachers have moved.

    Raises:
        StudentError: a checkpoint that cannot be used, and why.
    """

    title = "olavlm"

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **places: str,
    ) -> None:
        super().__init__(batch_size, device)
        if unknown := [name for name in places if not name.startswith(TEACHER)]:
            raise ValueError(
                f"{unknown[0]} is no argument of the model olavlm: pretrained, dtype, batch_size, device, {TEACHER}NAME"
            )
        self.model, self.tokenizer = load_checkpoint(pretrained, dtype_of(dtype))
        self.model.to(self.device).eval()
        if places or self.model.fused_teachers:
            self.model.load_teachers({name.removeprefix(TEACHER): place for name, place in places.items()})

    def replies(self, chats: Sequence[Messages], options: Mapping[str, Any]) -> list[str]:
        """In the template that the model was trained with."""
        dialogues = [dialogue_of(messages) for messages in chats]
        return self.model.replies(self.tokenizer, dialogues, **options)


def dialogue_of(messages: Messages) -> tuple[list[dict[str, str]], Image.Image | None]:
    """LLaVA turns and the picture of a chat; the picture stands ahead of the first question, as in training.

    Raises:
        SampleError: what a model of ours was never trained on: several pictures, a system message.
    """
    turns, pictures = [], []
    for message in messages:
        if message["role"] not in SPEAKERS:
            raise SampleError(f"a message of the role {message['role']!r}; the prompt template has its own")
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        pictures += [part["url"] for part in message["content"] if part["type"] == "image"]
        turns.append({"from": SPEAKERS[message["role"]], "value": as_text("\n".join(texts))})
    if len(pictures) > 1:
        raise SampleError(f"{len(pictures)} pictures in a question; these models see one")
    if pictures:
        turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
    return turns, pictures[0].convert("RGB") if pictures else None
