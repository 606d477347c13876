"""200 predictions of CV-Bench and 200 of MMStar that were judged by hand: every judgement, and every figure.

In `predictions/`, `parsed` and `score` are what each answer is by the rules as they are written, form by form, without
the parsers. The tables below count them; figures are fractions of these counts.
"""

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from olavlm.pipelines.evaluation.predictions import Predictions
from olavlm.pipelines.evaluation.scores import scores
from olavlm.pipelines.evaluation.tasks import TASKS

FIXED = {name: list(Predictions(Path(__file__).with_name("predictions")).done(name).values()) for name in TASKS}
COUNTED = {  # items, right, unparsed
    "cv_bench": {
        ("Count", "ADE20K"): (30, 18, 4),
        ("Count", "COCO"): (50, 20, 8),
        ("Relation", "ADE20K"): (20, 15, 2),
        ("Relation", "COCO"): (30, 21, 4),
        ("Depth", "Omni3D"): (40, 26, 4),
        ("Distance", "Omni3D"): (30, 12, 6),
    },
    "mmstar": {
        ("coarse perception",): (40, 24, 5),
        ("fine-grained perception",): (35, 14, 6),
        ("instance reasoning",): (35, 21, 4),
        ("logical reasoning",): (30, 9, 7),
        ("science & technology",): (30, 12, 4),
        ("math",): (30, 6, 8),
    },
}
TWO_D = (Fraction(18 + 15, 30 + 20) + Fraction(20 + 21, 50 + 30)) / 2  # the mean of ADE20K and COCO
THREE_D = Fraction(26 + 12, 40 + 30)
FIGURES = {  # value, items
    "cv_bench": {
        "Count": (Fraction(18 + 20, 30 + 50), 80),
        "Relation": (Fraction(15 + 21, 20 + 30), 50),
        "Depth": (Fraction(26, 40), 40),
        "Distance": (Fraction(12, 30), 30),
        "2D": (TWO_D, 130),
        "3D": (THREE_D, 70),
        "Overall": ((TWO_D + THREE_D) / 2, 200),
    },
    "mmstar": {
        "coarse perception": (Fraction(24, 40), 40),
        "fine-grained perception": (Fraction(14, 35), 35),
        "instance reasoning": (Fraction(21, 35), 35),
        "logical reasoning": (Fraction(9, 30), 30),
        "science & technology": (Fraction(12, 30), 30),
        "math": (Fraction(6, 30), 30),
        "Final": (Fraction(24 + 14 + 21 + 9 + 12 + 6, 200), 200),
    },
}
both = pytest.mark.parametrize("name", COUNTED)


@both
def test_the_files_hold_what_the_tables_say(name):
    keys = {"cv_bench": ("kind", "source"), "mmstar": ("category",)}[name]
    items, right, unparsed = (
        Counter(tuple(p.item[key] for key in keys) for p in FIXED[name] if counts(p))
        for counts in (lambda p: True, lambda p: p.score == 1, lambda p: p.parsed is None)
    )
    assert sum(items.values()) == 200
    assert {group: (items[group], right[group], unparsed[group]) for group in items} == COUNTED[name]


@both
def test_each_answer_is_judged_as_by_hand(name):
    judged = [(p, TASKS[name].judge(p.item, p.answer)) for p in FIXED[name]]
    assert [(p.answer, p.item, j) for p, j in judged if (j.parsed, j.score) != (p.parsed, p.score)] == []


@both
def test_figures_are_those_counted_by_hand(name):
    found = scores(TASKS[name], FIXED[name])
    assert list(found["figures"]) == list(FIGURES[name])
    for figure, (value, items) in FIGURES[name].items():
        assert found["figures"][figure]["value"] == pytest.approx(float(value), abs=1e-12), figure
        assert found["figures"][figure]["items"] == items
    assert (found["items"], found["unparsed"]) == (200, sum(unparsed for *_, unparsed in COUNTED[name].values()))
    assert found["expected"] == {"cv_bench": 2638, "mmstar": 1500}[name]


def test_the_files_tell_other_ways_of_counting_apart():
    count, relation = (FIGURES["cv_bench"][kind][0] for kind in ("Count", "Relation"))
    assert TWO_D not in (Fraction(18 + 15 + 20 + 21, 130), (count + relation) / 2)  # of all items, of kinds
    *categories, final = (value for value, _ in FIGURES["mmstar"].values())
    assert final != sum(categories) / 6


def test_the_file_would_show_an_answer_that_is_carried_over():
    """As the authors' script does where a "(" has no capital: here each is preceded by what would be right."""
    carried = right = 0
    before = None
    for p in FIXED["cv_bench"]:
        if "(" not in p.answer or re.search(r"\([A-Z]\)", p.answer):
            before = p.parsed
        else:
            carried += 1
            right += before == p.item["answer"]
    assert (carried, right) == (10, 10)
