"""The language model learns the world's language from text alone: scenes told in words, captions, and questions.

A dialogue is a told scene, its caption and questions about it, asked and answered as about a picture, so that counting,
comparing and answering are known before anything is seen. Every scene is told once. All of a dialogue is learnt, and
the answers of each kind once more, so that the few tokens that take a comparison weigh as much as the many that only
repeat. What is easier is learnt first and helps with the rest: to foresee the names in a question one has to look into
the scene, to say where an object is, to look it up there, to answer in words, to compare, and to find the letter of an
option that is told, what an answer by letters ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from olavlm.teachers.checkpoint import quiet

from . import architectures
from .fitting import fit
from .questions import TASKS, Facts, Question
from .text import CAPTION_PROMPT, SUFFIX, answer, answer_in_words, caption, find, in_words, place, prompt, told, where
from .tokenizer import ASSISTANT, BEGIN, END, USER, world_tokenizer
from .world import described_scenes
from .write import HELD_OUT, TOLD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .models import Effort

ASKED, LETTER, WORDS, PLACE, CAPTION, FOUND = range(6)
"""What a token is part of: a question, or an answer of a kind."""


@dataclass(frozen=True)
class Told:
    """A scene in words: what the user says first, and turns of question, answer and the answer's kind."""

    scene: str
    turns: tuple[tuple[str, str, int], ...]


def train_llm(folder: Path, asked: int, effort: Effort, seed: int, device: str) -> dict[str, float]:
    """Train, save in float16, load, and score on single questions about scenes of the held-out pictures."""
    tokenizer = world_tokenizer()
    model = architectures.language_model(tokenizer).to(device).train()
    dialogues = encoded(tokenizer, tell(seed, TOLD, effort.steps * effort.batch))

    def loss(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        ids, parts = (t.to(device) for t in padded([dialogues[i] for i in rows], tokenizer.pad_token_id))
        states = model.model(ids).last_hidden_state[:, :-1]
        said = ids[:, 1:] != tokenizer.pad_token_id
        losses, parts = model.lm_head(states[said]), parts[:, 1:][said]
        losses = F.cross_entropy(losses, ids[:, 1:][said], reduction="none")
        return losses.mean() + sum(losses[parts == kind].mean() for kind in (LETTER, WORDS, PLACE, CAPTION, FOUND))

    fit("llm", (model,), loss, samples=len(dialogues), seed=seed, **effort.fit)
    with quiet():
        model.eval().cpu().half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype="float32").to(device).eval()
    return score(model, tokenizer, described_scenes(seed, range(HELD_OUT, HELD_OUT + asked)), device)


def tell(seed: int, start: int, count: int, processes: int | None = None) -> list[Told]:
    """Dialogues about the scenes `start` to `start + count`, which nobody renders."""
    parts = [(seed, range(i, min(i + 960, start + count))) for i in range(start, start + count, 960)]
    if len(parts) == 1:
        return _tell(*parts[0])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [one for part in pool.map(_tell, *zip(*parts, strict=True)) for one in part]


def _tell(seed: int, indices: Sequence[int]) -> list[Told]:
    scenes = described_scenes(seed, indices)
    return [_dialogue(seed, i, facts, asked) for i, (facts, asked) in zip(indices, scenes, strict=True)]


def _dialogue(seed: int, index: int, facts: Facts, asked: tuple[Question, ...]) -> Told:
    """In random order the four questions, in words and with options, where three of the objects are, and which letter
    an option has; ahead of them or behind them the caption."""
    rng = np.random.default_rng([seed, index, len(TASKS)])
    turns = [(prompt(question) + SUFFIX, answer(question), LETTER) for question in asked]
    turns += [(in_words(question), answer_in_words(question), WORDS) for question in asked]
    turns += [(where(facts.names[i]), place(facts, i), PLACE) for i in rng.permutation(len(facts.names))[:3]]
    turns += [(find(asked[i]), answer(asked[i]), FOUND) for i in rng.permutation(len(asked))[:2]]
    turns = [turns[i] for i in rng.permutation(len(turns))]
    turns.insert(int(rng.integers(2)) * len(turns), (CAPTION_PROMPT, caption(facts), CAPTION))
    return Told(told(facts, rng.permutation(len(facts.names))), tuple(turns))


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
    """Share of single questions about told scenes that the likeliest token answers, and of captions word by word."""
    scores = {}
    for position, task in enumerate((*TASKS, "Caption")):
        asked = []
        for row, (facts, questions) in enumerate(scenes):
            order = np.random.default_rng([row, len(TASKS)]).permutation(len(facts.names))
            turn = (CAPTION_PROMPT, caption(facts), CAPTION)
            if task in TASKS:
                turn = (prompt(questions[position]) + SUFFIX, answer(questions[position]), LETTER)
            asked.append(Told(told(facts, order), (turn,)))
        right = []
        dialogues = encoded(tokenizer, asked)
        for first in range(0, len(dialogues), 64):
            ids, parts = (t.to(device) for t in padded(dialogues[first : first + 64], tokenizer.pad_token_id))
            said = model(ids).logits.argmax(-1)[:, :-1]
            same = (said == ids[:, 1:]) | (parts[:, 1:] == ASKED)
            right += same.all(dim=1).tolist()
        scores[task] = float(np.mean(right))
    return scores
