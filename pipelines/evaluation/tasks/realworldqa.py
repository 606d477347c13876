r"""RealWorldQA: 765 questions of pictures from the world, most of them with options in their text.

The question says itself how it is to be answered. An answer is read in these steps, those of lmms-eval's filters for
it, from which lmms-eval 0.7.3 has moved away:

1. A number word, zero to ten, that is all of the answer becomes digits.
2. What is neither a letter, a digit, "_" nor white space is taken out.
3. If the text of one of the question's options, lines such as `B. Left`, is found as it is written there, the first
   that is found stands for its letter.

It is right if it then equals the stored answer, case and punctuation aside. Only an answer of which nothing is left is
unparsed.
"""

from __future__ import annotations

import re

from .task import Item, Judgement, Published, Row, Task
from .weights import accuracy, one_stratum

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_OPTION = re.compile(r"\b([A-Z])\.\s+([^\n]*)")


def _prompt(row: Row) -> str:
    return row["question"]


def _item(row: Row) -> Item:
    options = [[letter, text.strip()] for letter, text in _OPTION.findall(row["question"])]
    return {"options": [option for option in options if option[1]], "answer": row["answer"]}


def _plain(text: str) -> str:
    return re.sub(r"[^\w\s]", "", text).strip()


def _judge(item: Item, answer: str) -> Judgement:
    answer = answer.strip()
    if answer.lower() in _NUMBERS:
        answer = str(_NUMBERS.index(answer.lower()))
    read = _plain(answer)
    letters = {text: letter for letter, text in reversed(item["options"])}  # of equal texts the first counts
    texts = [text for _, text in item["options"]]
    if texts and (found := re.search("|".join(map(re.escape, texts)), read)):
        read = letters[found[0]]
    return Judgement(float(read != "" and read.lower() == _plain(item["answer"]).lower()), read or None)


REALWORLDQA = Task(
    name="realworldqa",
    title="RealWorldQA",
    published=Published(
        repository="lmms-lab/RealWorldQA",
        split="test",
        files=("data/test-*.parquet",),
        columns=("image", "question", "answer"),
        items=765,
    ),
    max_new_tokens=16,
    prompt=_prompt,
    item=_item,
    judge=_judge,
    metrics=accuracy,
    stratum=one_stratum,
)
