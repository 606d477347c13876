"""OK-VQA, val2014: 5,046 open questions that need knowledge of the world, with ten annotators' answers each.

Both sides are normalised as EvalAI does (lower case, articles, number words, contractions, punctuation), by lmms-eval's
own normaliser. An answer is worth min(1, matches / 3), averaged over the ways to leave out one of the annotators. One
of which nothing is left, such as "the", is unparsed and worth nothing.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

from olavlm.pipelines.cli import JobFailed

from .task import Item, Judgement, Published, Row, Task
from .weights import accuracy, one_stratum

SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


@functools.cache
def _normaliser() -> Callable[[str], str]:
    try:
        from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    except ImportError as e:
        raise JobFailed(f'OK-VQA is judged by lmms-eval\'s normaliser ({e}): pip install "olavlm[eval]"') from None
    return functools.cache(EvalAIAnswerProcessor())  # annotators agree, and a comparison asks twice


def _prompt(row: Row) -> str:
    return row["question"] + SUFFIX


def _item(row: Row) -> Item:
    answers = row["answers"]
    if answers is None or len(answers) < 2:
        raise JobFailed(f"OK-VQA: {row['question']!r} has answers {answers}; give the split val2014, which has ten")
    return {"answers": list(answers)}


def _judge(item: Item, answer: str) -> Judgement:
    normalise = _normaliser()
    read = normalise(answer)
    if not read:
        return Judgement(0.0, None)
    same = [normalise(one) == read for one in item["answers"]]
    return Judgement(statistics.fmean(min(1.0, (sum(same) - left_out) / 3) for left_out in same), read)


OK_VQA = Task(
    name="ok_vqa",
    title="OK-VQA",
    published=Published(
        repository="lmms-lab/OK-VQA",
        split="val2014",
        files=("data/val2014-*.parquet",),
        columns=("image", "question", "answers"),
        items=5046,
    ),
    max_new_tokens=1024,
    prompt=_prompt,
    item=_item,
    judge=_judge,
    metrics=accuracy,
    stratum=one_stratum,
)
