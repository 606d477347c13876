"""A dialogue with a trained model about one image, or about none.

dialogue = Dialogue(*load_checkpoint("runs/ift"), image=picture)
dialogue.ask("What is on the sofa?")
dialogue.ask("What colour is it?")
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from olavlm.student.model import OlaVLM

from .conversation import IMAGE_TOKEN


def sampling(temperature: float, top_p: float = 1.0) -> dict[str, Any]:
    """Arguments of `generate`, whatever the LLM's own generation settings say of sampling; 0 is greedy."""
    if not temperature:
        return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def as_text(question: str) -> str:
    """A question in which `<image>` is text."""
    return question.replace(IMAGE_TOKEN, "< image>")


class Dialogue:
    """Questions and answers so far; each answer is conditioned on all of them.

    Args:
        image: what it is about.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn from logits divided by it.
        top_p: tokens are drawn from the likeliest whose probabilities reach this sum.
        seed: of the draws; question k of a dialogue is answered the same whatever was drawn before elsewhere.
    """

    def __init__(
        self,
        model: OlaVLM,
        tokenizer: PreTrainedTokenizerBase,
        image: Image.Image | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.image, self.seed = model, tokenizer, image, seed
        self.turns: list[dict[str, str]] = []
        self._options = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p)}

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> str:
        """The answer to the next question; `streamer` gets its tokens as they come.

        `<image>` in a question is text: the picture stands ahead of the first one.
        """
        text = as_text(question)
        if self.image is not None and not self.turns:
            text = f"{IMAGE_TOKEN}\n{text}"
        turns = [*self.turns, {"from": "human", "value": text}]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed + len(self.turns))
            answer = self.model.reply(self.tokenizer, turns, self.image, streamer=streamer, **self._options)
        self.turns = [*turns, {"from": "gpt", "value": answer}]
        return answer
