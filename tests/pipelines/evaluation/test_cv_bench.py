"""CV-Bench: the prompt, the parser and the figures, on 200 predictions that were judged by hand.

`predictions/cv_bench.jsonl` holds, in `parsed` and `score`, what each answer is by the rules as they are written, form
by form, without the parser. Its items, and how many are right and unparsed:

    kind      source   items  right  unparsed
    Count     ADE20K      30     18         4
    Count     COCO        50     20         8
    Relation  ADE20K      20     15         2
    Relation  COCO        30     21         4
    Depth     Omni3D      40     26         4
    Distance  Omni3D      30     12         6
"""

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.predictions import Predictions
from olavlm.pipelines.evaluation.scores import scores
from olavlm.pipelines.evaluation.tasks import TASKS

TASK = TASKS["cv_bench"]
FIXED = Predictions(Path(__file__).with_name("predictions"))
ROW = {"prompt": "How many?\n(A) 1\n(B) 2", "choices": ["1", "2"], "answer": "(B)", "task": "Count", "source": "COCO"}


@pytest.fixture(scope="module")
def fixed():
    return list(FIXED.done("cv_bench").values())


def test_the_fixed_file_is_what_the_derivation_says(fixed):
    assert len(fixed) == 200
    cells = Counter((p.item["kind"], p.item["source"]) for p in fixed)
    right = Counter((p.item["kind"], p.item["source"]) for p in fixed if p.score == 1)
    unparsed = Counter((p.item["kind"], p.item["source"]) for p in fixed if p.parsed is None)
    assert {cell: (cells[cell], right[cell], unparsed[cell]) for cell in cells} == {
        ("Count", "ADE20K"): (30, 18, 4),
        ("Count", "COCO"): (50, 20, 8),
        ("Relation", "ADE20K"): (20, 15, 2),
        ("Relation", "COCO"): (30, 21, 4),
        ("Depth", "Omni3D"): (40, 26, 4),
        ("Distance", "Omni3D"): (30, 12, 6),
    }


def test_each_answer_is_judged_as_by_hand(fixed):
    judged = [TASK.judge(p.item, p.answer) for p in fixed]
    wrong = [(p.answer, j) for p, j in zip(fixed, judged, strict=True) if (j.parsed, j.score) != (p.parsed, p.score)]
    assert wrong == []


def test_figures_are_those_counted_by_hand(fixed):
    found = scores(TASK, fixed)
    two_d = (Fraction(18 + 15, 30 + 20) + Fraction(20 + 21, 50 + 30)) / 2  # the mean of ADE20K and COCO
    three_d = Fraction(26 + 12, 40 + 30)
    expected = {
        "Count": (Fraction(18 + 20, 30 + 50), 80),
        "Relation": (Fraction(15 + 21, 20 + 30), 50),
        "Depth": (Fraction(26, 40), 40),
        "Distance": (Fraction(12, 30), 30),
        "2D": (two_d, 130),
        "3D": (three_d, 70),
        "Overall": ((two_d + three_d) / 2, 200),
    }
    assert list(found["figures"]) == list(expected)
    for name, (value, items) in expected.items():
        assert found["figures"][name]["value"] == pytest.approx(float(value), abs=1e-12), name
        assert found["figures"][name]["items"] == items
    assert two_d not in (Fraction(18 + 15 + 20 + 21, 130), (expected["Count"][0] + expected["Relation"][0]) / 2)
    assert (found["items"], found["expected"], found["unparsed"]) == (200, 2638, 4 + 8 + 2 + 4 + 4 + 6)


def test_the_file_would_show_the_answer_before_being_carried_over(fixed):
    carried = right = 0
    before = None
    for p in fixed:
        if "(" not in p.answer or re.search(r"\([A-Z]\)", p.answer):
            before = p.parsed
        else:
            carried += 1
            right += before == p.item["answer"]
    assert (carried, right) == (10, 10)  # each comes after an answer that is right for it too


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("(B)", "(B)"),
        ("B", "(B)"),  # no bracket
        ("b", None),  # lower case
        ("(b)", None),
        ("BA", "(B)"),  # two letters: the first
        ("(BA)", None),
        ("", None),  # empty
        (" \n", None),
        ("2", None),  # only digits
        ("(2)", None),
        ("Both of them", "(B)"),  # the text of an option: its first character
        ("both of them", None),
        ("Chair", None),  # there are two options
        ("(a) no, (B)", "(B)"),
        ("(A) or (B)", "(A)"),
        ("(B", None),
        ("The answer is B", None),
    ],
)
def test_what_is_read(answer, parsed):
    judgement = TASK.judge(TASK.item(ROW), answer)
    assert (judgement.parsed, judgement.score) == (parsed, float(parsed == "(B)"))


def test_the_question_and_what_is_kept_of_a_row():
    assert TASK.prompt(ROW) == (
        "How many?\n(A) 1\n(B) 2\n"
        "Only answer the option as the output. For example, if your answer is the option A, answer (A)."
    )
    assert TASK.max_new_tokens == 128
    assert TASK.item(ROW) == {"kind": "Count", "source": "COCO", "options": 2, "answer": "(B)"}
    assert {"image", *ROW} == set(TASK.published.columns)
    with pytest.raises(JobFailed, match=r"source 'LVIS'; known are ADE20K, COCO, Omni3D"):
        TASK.item({**ROW, "source": "LVIS"})


def test_a_figure_that_lacks_a_group_is_left_out():
    def figures(*groups):
        items = [{"kind": kind, "source": source, "options": 2, "answer": "(A)"} for kind, source in groups]
        weights = TASK.metrics(items)
        assert all(np.isclose(w.sum(), 1) for w in weights.values())
        return list(weights)

    assert figures(("Count", "COCO")) == ["Count"]
    assert figures(("Count", "COCO"), ("Count", "ADE20K")) == ["Count", "2D"]
    assert figures(("Count", "COCO"), ("Depth", "Omni3D")) == ["Count", "Depth", "3D"]
    assert figures() == []
