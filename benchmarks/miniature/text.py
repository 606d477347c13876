"""The world in words: captions, questions as CV-Bench asks them, and scenes told to someone who does not see them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .questions import Facts, Question
from .scenes import FARTHEST, NEAREST, SIDE

CAPTION_PROMPT = "Describe the image."
SUFFIX = "\nOnly answer the option as the output. For example, if your answer is the option A, answer (A)."
"""What CV-Bench's protocol puts behind a question (arXiv 2406.16860, as olavlm-eval has it)."""
SELECT = " Select from the following choices."
STEPS = 16
"""In which a told scene gives columns, rows and distances."""


def caption(facts: Facts) -> str:
    """The objects from left to right: `a red cube, a blue cone and a black sphere`."""
    named = [f"a {facts.names[i]}" for i in facts.left_to_right]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def prompt(question: Question) -> str:
    """The question with its options, as the `prompt` column of CV-Bench has it."""
    return f"{question.text}{SELECT}{_lettered(question.options)}"


def find(name: str, options: Sequence[str]) -> str:
    """Which letter does it have?"""
    return f"the {name}?{SELECT}{_lettered(options)}"


def _lettered(options: Sequence[str]) -> str:
    return "".join(f"\n{letter(i)} {option}" for i, option in enumerate(options))


def answer(question: Question) -> str:
    return letter(question.letter)


def in_words(question: Question) -> str:
    """The question without options, but for what tells which relation it is about."""
    return f"{question.text} {' or '.join(question.options)}?" if question.task == "Relation" else question.text


def answer_in_words(question: Question) -> str:
    """To `in_words`: the right option."""
    return question.options[question.letter]


def answer_with_letter(question: Question) -> str:
    """The answer in words, and its letter: to `prompt` without what asks for the letter alone."""
    return f"{answer_in_words(question)} {answer(question)}"


def letter(index: int) -> str:
    return f"({'ABCDEF'[index]})"


def told(facts: Facts, order: Sequence[int]) -> str:
    """A scene in words, its objects in this order."""
    return "\n".join(place(facts, i) for i in order)


def where(name: str) -> str:
    return f"Where is the {name}?"


def place(facts: Facts, i: int) -> str:
    """Column and row of the picture from the left and the top, and distance from the camera, each in `STEPS` equal
    steps, distances of the logarithm; then the name, which has just seen where it is, as a patch of a picture has."""
    farness = np.log(facts.centre[i, 2] / NEAREST) / np.log(FARTHEST / NEAREST)
    shares = (facts.column[i] / SIDE, facts.row[i] / SIDE, farness)
    column, row, distance = (min(max(int(share * STEPS), 0), STEPS - 1) for share in shares)
    return f"column {column}, row {row}, distance {distance}: a {facts.names[i]}"
