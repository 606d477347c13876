"""CV-Bench: the prompt, what is read in an answer, and the groups of figures."""

import numpy as np
import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.tasks import TASKS

TASK = TASKS["cv_bench"]
ROW = {"prompt": "How many?\n(A) 1\n(B) 2", "choices": ["1", "2"], "answer": "(B)", "task": "Count", "source": "COCO"}


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
