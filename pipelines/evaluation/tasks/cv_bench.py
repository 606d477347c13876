r"""CV-Bench: 2,638 multiple-choice questions of counting, relations, depth and distance, after arXiv 2406.16860.

The question is the dataset's `prompt` and one sentence. Of an answer, its white space at the ends taken off:

- with a "(", the first capital in a pair of parentheses, `(C)`, is read; without, the first character, put in
  parentheses: "C", "C." and "Chair" are read as (C), which is how the published scores were counted;
- it is right if what was read is the stored answer, such as (C);
- what is no option letter of the question counts as unparsed, and is wrong: an empty answer, a "(" without such a
  capital after it ("(c)", "(3)", "(C"), a lower case letter, a digit, or the "T" of "The answer is C". Options are the
  first capitals, as many as the question has choices.

The authors' script gives a "(" without a capital the answer to the question before, and stops at an empty answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from olavlm.pipelines.cli import JobFailed

from .task import Item, Judgement, Published, Row, Task
from .weights import mean_of, mean_where, those_there

SUFFIX = "\nOnly answer the option as the output. For example, if your answer is the option A, answer (A)."
KINDS = ("Count", "Relation", "Depth", "Distance")
SOURCES = ("ADE20K", "COCO", "Omni3D")
"""The first two are the 2D part, the last is the 3D part."""


def _prompt(row: Row) -> str:
    return row["prompt"] + SUFFIX


def _item(row: Row) -> Item:
    for column, known in (("task", KINDS), ("source", SOURCES)):
        if row[column] not in known:
            raise JobFailed(
                f"CV-Bench: {column} {row[column]!r}; known are {', '.join(known)}; give the dataset as published"
            )
    return {
        "kind": row["task"],
        "source": row["source"],
        "options": len(row["choices"]),
        "answer": row["answer"],
    }


def _judge(item: Item, answer: str) -> Judgement:
    answer = answer.strip()
    if "(" in answer:
        found = re.search(r"\(([A-Z])\)", answer)
        letter = found[1] if found else ""
    else:
        letter = answer[:1]
    if letter == "" or letter not in ascii_uppercase[: item["options"]]:
        return Judgement(0.0, None)
    read = f"({letter})"
    return Judgement(float(read == item["answer"]), read)


def _metrics(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Accuracies of kinds of questions, and of 2D and 3D by source: the paper's figures of 2D fit the mean of its two
    sources, not that of its two kinds."""
    figures = {kind: mean_where(items, "kind", kind) for kind in KINDS}
    ade, coco, omni = (mean_where(items, "source", source) for source in SOURCES)
    figures["2D"], figures["3D"] = mean_of(ade, coco), omni
    figures["Overall"] = mean_of(figures["2D"], figures["3D"])
    return those_there(figures)


CV_BENCH = Task(
    name="cv_bench",
    title="CV-Bench",
    published=Published(
        repository="nyu-visionx/CV-Bench",
        split="test",
        files=("test*.parquet",),
        columns=("image", "prompt", "choices", "answer", "task", "source"),
        items=2638,
    ),
    max_new_tokens=128,
    prompt=_prompt,
    item=_item,
    judge=_judge,
    metrics=_metrics,
    stratum=lambda item: f"{item['kind']}, {item['source']}",
)
