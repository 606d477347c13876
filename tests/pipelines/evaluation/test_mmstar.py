"""MMStar: the prompt, what is read in an answer, and the groups of figures."""

import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.tasks import TASKS

TASK = TASKS["mmstar"]
ROW = {"question": "Which?\nOptions: A: a, B: b, C: c, D: d", "answer": "B", "category": "math"}


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
