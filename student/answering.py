"""Answers of a model in dialogues about pictures: prompts in its template, one pass of `generate`, text again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.conversation import IMAGE_TOKEN, encode_prompt, terminator_id
from olavlm.student.text.templates import CHAT, get_template


def greedy_settings(given: GenerationConfig) -> GenerationConfig:
    """A language model's settings of which tokens begin, end and pad, and which are never said.

    How answers are drawn was tuned for that model, not for what is trained from it, and is for whoever asks: greedily,
    as benchmarks are asked, unless they say otherwise.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
    return GenerationConfig(**{name: getattr(given, name) for name in names})


class Answering:
    """What `OlaVLM` says, in words."""

    config: OlaVLMConfig
    llm: nn.Module

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image: Image.Image | None,
        prompt: str,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> str:
        """The answer to a question about an image (or about none), in the template the model was trained with.

        Further arguments go to `generate`; decoding is greedy unless they say otherwise.
        """
        text = prompt if image is None else f"{IMAGE_TOKEN}\n{prompt}"
        return self.reply(tokenizer, [{"from": "human", "value": text}], image, max_new_tokens, **kwargs)

    def reply(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Mapping[str, str]],
        image: Image.Image | None = None,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> str:
        """The next answer of a dialogue of LLaVA turns that ends with a human one; `answer` for the rest.

        A fusion baseline runs its teachers on the image (`encode_teachers`).

        Raises:
            SampleError: turns that make no prompt, `<image>` in them without an image, or features that are not finite.
            ModelError: teachers that cannot be loaded.
        """
        return self.replies(tokenizer, [(turns, image)], max_new_tokens, **kwargs)[0]

    def replies(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dialogues: Sequence[tuple[Sequence[Mapping[str, str]], Image.Image | None]],
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> list[str]:
        """The next answer of each of several dialogues, as `reply` has them, in one pass over all of them."""
        prompts = [torch.tensor(encode_prompt(tokenizer, turns, self.config.template)) for turns, _ in dialogues]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
        pixels, features = self._seen([image for _, image in dialogues])
        end = self.written_end(tokenizer)
        was_training = self.training
        self.eval()
        try:
            new_ids = self.generate(
                ids.to(self.device),
                mask.to(self.device),
                pixel_values=pixels,
                teacher_features=features,
                **{
                    "max_new_tokens": max_new_tokens,
                    "do_sample": False,
                    "eos_token_id": self.stop_ids(tokenizer),
                    "pad_token_id": tokenizer.pad_token_id,
                    "suppress_tokens": self.never_said(),
                    "stop_strings": [end] if end else None,
                    "tokenizer": tokenizer,  # for `stop_strings`
                }
                | kwargs,
            )
        finally:
            self.train(was_training)
        answers = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in new_ids)
        return [answer.removesuffix(end).rstrip() for answer in answers]

    def _seen(self, images: Sequence[Image.Image | None]) -> tuple[torch.Tensor | None, dict[str, torch.Tensor] | None]:
        """Pixels (B, 3, S, S) and features of fused teachers (B, n, D) of pictures; zeros in a row without one."""
        present = [row for row, image in enumerate(images) if image is not None]
        if not present:
            return None, None

        def spread(values: torch.Tensor) -> torch.Tensor:
            rows = values.new_zeros(len(images), *values.shape[1:], device=self.device)
            rows[present] = values.to(self.device)
            return rows

        shown = [images[row] for row in present]
        features = self.encode_teachers(*shown)
        pixels = [torch.from_numpy(self.config.image_transform(image)) for image in shown]
        return spread(torch.stack(pixels)), {name: spread(values) for name, values in features.items()}

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What ends an answer: the LLM's own end tokens and the template's terminator."""
        own = self.llm.generation_config.eos_token_id
        ids = set(own if isinstance(own, list) else [own])
        ids |= {tokenizer.eos_token_id, terminator_id(tokenizer, self.config.template)}
        return sorted(ids - {None})

    def written_end(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The template's terminator if the tokenizer writes it in several tokens, which end answers together, or ''."""
        template = self.config.template
        if template == CHAT or terminator_id(tokenizer, template) is not None:
            return ""
        return get_template(template).assistant_end

    def never_said(self) -> list[int]:
        """What is no part of an answer: what the LLM's own settings say, and `<image>`, which stands for a picture."""
        return sorted({*(self.llm.generation_config.suppress_tokens or ()), self.config.image_token_id})
