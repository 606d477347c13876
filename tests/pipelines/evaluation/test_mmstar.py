"""MMStar: the prompt, the parser and the figures, on 200 predictions that were judged by hand.

`predictions/mmstar.jsonl` is made as CV-Bench's file is. Its items, and how many are right and unparsed:

    category                  items  right  unparsed
    coarse perception            40     24         5
    fine-grained perception      35     14         6
    instance reasoning           35     21         4
    logical reasoning            30      9         7
    science & technology         30     12         4
    math                         30      6         8
"""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.predictions import Predictions
from olavlm.pipelines.evaluation.scores import scores
from olavlm.pipelines.evaluation.tasks import TASKS

TASK = TASKS["mmstar"]
COUNTED = {
    "coarse perception": (40, 24, 5),
    "fine-grained perception": (35, 14, 6),
    "instance reasoning": (35, 21, 4),
    "logical reasoning": (30, 9, 7),
    "science & technology": (30, 12, 4),
    "math": (30, 6, 8),
}
ROW = {"question": "Which?\nOptions: A: a, B: b, C: c, D: d", "answer": "B", "category": "math"}


@pytest.fixture(scope="module")
def fixed():
    return list(Predictions(Path(__file__).with_name("predictions")).done("mmstar").values())


def test_the_fixed_file_is_what_the_derivation_says(fixed):
    assert len(fixed) == 200
    items, right, unparsed = (
        Counter(p.item["category"] for p in fixed if which(p))
        for which in (lambda p: True, lambda p: p.score == 1, lambda p: p.parsed is None)
    )
    assert {category: (items[category], right[category], unparsed[category]) for category in items} == COUNTED


def test_each_answer_is_judged_as_by_hand(fixed):
    judged = [TASK.judge(p.item, p.answer) for p in fixed]
    wrong = [(p.answer, j) for p, j in zip(fixed, judged, strict=True) if (j.parsed, j.score) != (p.parsed, p.score)]
    assert wrong == []


def test_figures_are_those_counted_by_hand(fixed):
    found = scores(TASK, fixed)
    expected = {category: Fraction(right, items) for category, (items, right, _) in COUNTED.items()}
    expected["Final"] = Fraction(24 + 14 + 21 + 9 + 12 + 6, 200)
    assert {name: x["value"] for name, x in found["figures"].items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-12
    )
    assert list(found["figures"])[-1] == "Final"
    assert expected["Final"] != sum(list(expected.values())[:6]) / 6  # here the mean of the categories is another
    assert (found["items"], found["expected"], found["unparsed"]) == (200, 1500, 5 + 6 + 4 + 7 + 4 + 8)


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("Option B", "B"),
        ("The answer is\nB.", "B"),
        ("the answer is (B)", None),
        ("Answer: B", "A"),  # begins with an a
        ("BC", "B"),
        ("Bus", "B"),
        ("12", None),
        ("", None),
        ("E", None),
    ],
)
def test_what_is_read(answer, parsed):
    judgement = TASK.judge(TASK.item(ROW), answer)
    assert (judgement.parsed, judgement.score) == (parsed, float(parsed == "B"))


def test_the_question_and_what_is_kept_of_a_row():
    assert TASK.prompt(ROW) == ROW["question"] + (
        "\nAnswer with the option's letter from the given choices directly, such as answer letter 'A' only. \n"
    )
    assert TASK.item(ROW) == {"category": "math", "answer": "B"}
    with pytest.raises(JobFailed, match="category 'music'; known are coarse perception,"):
        TASK.item({**ROW, "category": "music"})


def test_categories_without_items_are_left_out():
    assert list(TASK.metrics([TASK.item(ROW)])) == ["math", "Final"]
