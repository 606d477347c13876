"""What the language model is told: scenes in words, captions of them, and questions about them asked as of a picture.

A dialogue asks one question of each task, once, in words or by letters or both: one that had been answered before
could be answered from there, and many options of the same names are hard to tell apart. Answers are drawn evenly, and
so is what the shortcuts would say, as the world deals them (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from .plan import KINDS
from .questions import TASKS, Facts, Question, ask_another
from .text import (
    CAPTION_PROMPT,
    SUFFIX,
    answer,
    answer_in_words,
    answer_with_letter,
    caption,
    find,
    in_words,
    letter,
    place,
    prompt,
    told,
    where,
)
from .world import described_scenes

ASKED, LETTER, WORDS, PLACE, CAPTION, NAMED, FOUND = range(7)
"""What a token is part of: a question, or an answer of a kind."""
_OPTIONS = 4
"""Of the names that a letter is looked up for."""
_DRAWS = 8
"""Of a question, until it is one that can be asked."""


@dataclass(frozen=True)
class Told:
    """A scene in words: what the user says first, and turns of question, answer and the answer's kind."""

    scene: str
    turns: tuple[tuple[str, str, int], ...]


def tell(seed: int, start: int, count: int, forms: Sequence[int], processes: int | None = None) -> list[Told]:
    """Dialogues about the scenes `start` to `start + count`, which nobody renders.

    Args:
        forms: of answers, `LETTER`, `WORDS` or `NAMED` (both), each as likely as the others.
    """
    parts = [(seed, range(i, min(i + 960, start + count)), forms) for i in range(start, start + count, 960)]
    if len(parts) == 1:
        return _tell(*parts[0])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [one for part in pool.map(_tell, *zip(*parts, strict=True)) for one in part]


def _tell(seed: int, indices: Sequence[int], forms: Sequence[int]) -> list[Told]:
    scenes = described_scenes(seed, indices)
    return [_dialogue(seed, i, facts, forms) for i, (facts, _) in zip(indices, scenes, strict=True)]


def _dialogue(seed: int, index: int, facts: Facts, forms: Sequence[int]) -> Told:
    """In random order a question of each task, where an object is, and which letter a name has that may be no object's;
    ahead of them or behind them the caption."""
    rng = np.random.default_rng([seed, index, len(TASKS)])
    turns = []
    for task in TASKS:
        drawn = (ask_another(task, facts, rng) for _ in range(_DRAWS))
        question = next((question for question in drawn if question is not None), None)
        if question is not None:
            turns.append(turn(question, forms[rng.integers(len(forms))]))
    there = int(rng.integers(len(facts.names)))
    turns.append((where(facts.names[there]), place(facts, there), PLACE))
    options, right = [KINDS[i] for i in rng.permutation(len(KINDS))[:_OPTIONS]], int(rng.integers(_OPTIONS))
    turns.append((find(options[right], options), letter(right), FOUND))
    turns = [turns[i] for i in rng.permutation(len(turns))]
    turns.insert(int(rng.integers(2)) * len(turns), (CAPTION_PROMPT, caption(facts), CAPTION))
    return Told(told(facts, rng.permutation(len(facts.names))), tuple(turns))


def turn(question: Question, form: int) -> tuple[str, str, int]:
    """A question and its answer in a form."""
    if form == WORDS:
        return in_words(question), answer_in_words(question), form
    if form == NAMED:
        return prompt(question), answer_with_letter(question), form
    return prompt(question) + SUFFIX, answer(question), form
