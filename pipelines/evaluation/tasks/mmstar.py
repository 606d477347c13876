"""MMStar: 1,500 multiple-choice questions that need their image, 250 in each of six categories (arXiv 2403.20330).

Of an answer in lower case, its white space at the ends taken off, a letter a to d counts at the beginning, or after a
beginning "(", "option " or "the answer is ". Nothing else is looked for: "the answer is (b)" and "answer: b" are
unparsed, and any text with a letter of the four at its beginning, such as "Apple", is read as that letter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from olavlm.pipelines.cli import JobFailed

from .task import Item, Judgement, Published, Row, Task
from .weights import mean_of_all, mean_where, those_there

SUFFIX = "\nAnswer with the option's letter from the given choices directly, such as answer letter 'A' only. \n"
CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
_BEFORE = ("", "(", "option ", "the answer is ")


def _prompt(row: Row) -> str:
    return row["question"] + SUFFIX


def _item(row: Row) -> Item:
    if row["category"] not in CATEGORIES:
        raise JobFailed(
            f"MMStar: category {row['category']!r}; known are {', '.join(CATEGORIES)}; give the dataset as published"
        )
    return {"category": row["category"], "answer": row["answer"]}


def _judge(item: Item, answer: str) -> Judgement:
    text = answer.lower().strip().replace("\n", " ")
    for before in _BEFORE:
        letter = text[len(before) : len(before) + 1]
        if text.startswith(before) and letter in ("a", "b", "c", "d"):
            return Judgement(float(letter == item["answer"].lower().strip()), letter.upper())
    return Judgement(0.0, None)


def _metrics(items: Sequence[Item]) -> dict[str, np.ndarray]:
    figures = {category: mean_where(items, "category", category) for category in CATEGORIES}
    return those_there({**figures, "Final": mean_of_all(items)})


MMSTAR = Task(
    name="mmstar",
    title="MMStar",
    published=Published(
        repository="Lin-Chen/MMStar",
        split="val",
        files=("mmstar*.parquet",),
        columns=("image", "question", "answer", "category"),
        items=1500,
    ),
    max_new_tokens=128,
    prompt=_prompt,
    item=_item,
    judge=_judge,
    metrics=_metrics,
    stratum=lambda item: item["category"],
)
