"""The language model learns the world's language from text alone: scenes told in words, captions, and questions.

A dialogue is a told scene, its caption and questions about it, asked and answered as about a picture, so that counting,
comparing and answering are known before anything is seen. Every scene is told once. All of a dialogue is learnt, and
its answers once more, for they are what takes looking and comparing. Answers in words come first: there are as many to
choose from as there are names, and a letter is only found by who knows what it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from olavlm.teachers.checkpoint import quiet

from . import architectures
from .dialogues import ASKED, CAPTION, LETTER, NAMED, WORDS, Told, tell, turn
from .fitting import fit
from .questions import TASKS, Facts, Question
from .text import CAPTION_PROMPT, caption, told
from .tokenizer import ASSISTANT, BEGIN, END, USER, world_tokenizer
from .world import described_scenes
from .write import HELD_OUT, TOLD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .models import Effort


LESSONS = ((0.4, (WORDS, NAMED)), (0.6, (LETTER, LETTER, WORDS, NAMED)))
"""One after another: the share of the steps, each with a schedule of its own, and the forms of answers."""


def train_llm(folder: Path, asked: int, effort: Effort, seed: int, device: str) -> dict[str, float]:
    """Train, save in float16, load, and score on single questions about scenes of the held-out pictures."""
    tokenizer = world_tokenizer()
    model = architectures.language_model(tokenizer).to(device).train()
    dialogues: list[tuple[np.ndarray, np.ndarray]] = []

    def loss(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        ids, parts = (t.to(device) for t in padded([dialogues[i] for i in rows], tokenizer.pad_token_id))
        states = model.model(ids).last_hidden_state[:, :-1]
        said = ids[:, 1:] != tokenizer.pad_token_id
        losses, parts = model.lm_head(states[said]), parts[:, 1:][said]
        losses = F.cross_entropy(losses, ids[:, 1:][said], reduction="none")
        return losses.mean() + losses[parts != ASKED].mean()

    start = TOLD
    for share, forms in LESSONS:
        steps = max(1, round(share * effort.steps))
        dialogues = encoded(tokenizer, tell(seed, start, steps * effort.batch, forms))
        start += len(dialogues)
        fit("llm", (model,), loss, samples=len(dialogues), seed=seed, **{**effort.fit, "steps": steps})
    with quiet():
        model.eval().cpu().half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype="float32").to(device).eval()
    return score(model, tokenizer, described_scenes(seed, range(HELD_OUT, HELD_OUT + asked)), device)


def encoded(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Told]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each its ids, as the student's chat template gives them, and what each is part of; an answer has its end."""
    texts = [text for one in dialogues for text in _messages(one)]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    begin, user, assistant, end = tokenizer.convert_tokens_to_ids([BEGIN, USER, ASSISTANT, END])
    found = []
    for one in dialogues:
        ids, parts = [begin], [ASKED]
        for *_, kind in one.turns:
            question, said = [user, *next(pieces), end, assistant], [*next(pieces), end]
            ids += question + said
            parts += [ASKED] * len(question) + [kind] * len(said)
        found.append((np.array(ids), np.array(parts)))
    return found


def _messages(one: Told) -> list[str]:
    first, *rest = one.turns
    return [f"{one.scene}\n{first[0]}", first[1], *(text for turn in rest for text in turn[:2])]


def padded(dialogues: Sequence[tuple[np.ndarray, np.ndarray]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, longest] each; what is behind the end of a dialogue is seen by nothing ahead of it."""
    longest = max(len(ids) for ids, _ in dialogues)
    ids, parts = np.full((len(dialogues), longest), pad), np.full((len(dialogues), longest), ASKED)
    for row, (one, part) in enumerate(dialogues):
        ids[row, : len(one)], parts[row, : len(one)] = one, part
    return torch.from_numpy(ids), torch.from_numpy(parts)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[tuple[Facts, tuple[Question, ...]]],
    device: str,
) -> dict[str, float]:
    """Share of single questions about told scenes whose answer's tokens are the likeliest, by letters and in words, and
    of captions."""
    lines = []
    for row, (facts, _) in enumerate(scenes):
        order = np.random.default_rng([row, len(TASKS)]).permutation(len(facts.names))
        lines.append(told(facts, order))

    def right(turns: Sequence[tuple[str, str, int]]) -> float:
        return _right(model, tokenizer, [Told(*one) for one in zip(lines, zip(turns), strict=True)], device)

    scores = {
        task + of: right([turn(questions[position], form) for _, questions in scenes])
        for form, of in ((LETTER, ""), (WORDS, " in words"))
        for position, task in enumerate(TASKS)
    }
    return scores | {"Caption": right([(CAPTION_PROMPT, caption(facts), CAPTION) for facts, _ in scenes])}


def _right(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Told], device: str) -> float:
    right, dialogues = [], encoded(tokenizer, asked)
    for first in range(0, len(dialogues), 64):
        ids, parts = (t.to(device) for t in padded(dialogues[first : first + 64], tokenizer.pad_token_id))
        said = model(ids).logits.argmax(-1)[:, :-1]
        same = (said == ids[:, 1:]) | (parts[:, 1:] == ASKED)
        right += same.all(dim=1).tolist()
    return float(np.mean(right))
