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
    """The objects from left to right: `a red cube, a blue cone and a white sphere`."""
    named = [f"a {facts.names[i]}" for i in facts.left_to_right]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def prompt(question: Question) -> str:
    """The question with its options, as the `prompt` column of CV-Bench has it."""
    options = "".join(f"\n{letter(i)} {option}" for i, option in enumerate(question.options))
    return f"{question.text}{SELECT}{options}"


def answer(question: Question) -> str:
    return letter(question.letter)


def letter(index: int) -> str:
    return f"({'ABCDEF'[index]})"


def told(facts: Facts, order: Sequence[int]) -> str:
    """A scene in words, its objects in this order: column and row in the picture and distance from the camera.

    Columns and rows are sixteenths of the picture from the left and the top, distances equal steps of the logarithm.
    """
    cells = np.clip(np.stack([facts.column, facts.row]) * STEPS / SIDE, 0, STEPS - 1).astype(int)
    steps = np.log(facts.centre[:, 2] / NEAREST) / np.log(FARTHEST / NEAREST) * STEPS
    steps = np.clip(steps, 0, STEPS - 1).astype(int)
    return "\n".join(
        f"a {facts.names[i]} at column {cells[0, i]}, row {cells[1, i]}, distance {steps[i]}" for i in order
    )
