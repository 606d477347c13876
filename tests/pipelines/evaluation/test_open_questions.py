"""RealWorldQA and OK-VQA, by hand."""

import json
import sys

import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.predictions import Prediction
from olavlm.pipelines.evaluation.scores import scores
from olavlm.pipelines.evaluation.tasks import TASKS, ok_vqa

REAL, OK = TASKS["realworldqa"], TASKS["ok_vqa"]
DIRECTION = "Where does the car go?\n\nA. Straight ahead\nB. Left\nC. Right\nPlease answer with the letter."
TEN = ["an umbrella", "Umbrella.", "umbrella", "parasol", "parasol", "rain coat", "2 hats", "two hats", "dont", "hat"]


@pytest.mark.parametrize(
    ("answer", "stored", "parsed", "score"),
    [
        ("B", "B", "B", 1),
        ("b.", "B", "b", 1),
        ("(B)", "B", "B", 1),
        ("Left", "B", "B", 1),
        ("B. Left", "B", "B", 1),
        ("It turns Left, not Right", "B", "B", 1),
        ("It turns Right, not Left", "B", "C", 0),
        ("Straight-ahead", "A", "Straightahead", 0),  # the dash is taken out, and with it the option's text
        ("left", "B", "left", 0),  # an option's text is looked for as it is written
        ("A", "B", "A", 0),
        ("", "B", None, 0),
        ("?!", "B", None, 0),
    ],
)
def test_an_answer_to_a_question_with_options(answer, stored, parsed, score):
    judgement = REAL.judge(REAL.item({"question": DIRECTION, "answer": stored}), answer)
    assert (judgement.parsed, judgement.score) == (parsed, score)


@pytest.mark.parametrize(
    ("answer", "stored", "parsed", "score"),
    [
        ("Two", "2", "2", 1),
        ("2.", "2", "2", 1),
        ("two cars", "2", "two cars", 0),  # only a number word that is all of the answer
        ("eleven", "11", "eleven", 0),
        ("NO!", "No", "NO", 1),
        ("Yes", "No", "Yes", 0),
    ],
)
def test_an_answer_to_a_question_without_options(answer, stored, parsed, score):
    judgement = REAL.judge(REAL.item({"question": "How many cars?", "answer": stored}), answer)
    assert (judgement.parsed, judgement.score) == (parsed, score)


def test_the_question_of_realworldqa_is_unchanged():
    row = {"question": DIRECTION, "answer": "B"}
    assert REAL.prompt(row) == DIRECTION
    assert REAL.max_new_tokens == 16
    item = REAL.item(row)
    assert item == {"options": [["A", "Straight ahead"], ["B", "Left"], ["C", "Right"]], "answer": "B"}
    assert json.loads(json.dumps(item)) == item


@pytest.mark.parametrize(
    ("answer", "parsed", "score"),
    [
        # matches of ten: left out are a match (matches - 1 remain) or another, each min(1, remaining / 3)
        ("The umbrella", "umbrella", (3 * 2 / 3 + 7 * 1) / 10),
        ("parasol", "parasol", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("two hats", "2 hats", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("Don't", "don't", (1 * 0 + 9 * 1 / 3) / 10),
        ("snow", "snow", 0),
        ("the", None, 0),
        ("", None, 0),
    ],
)
def test_an_answer_to_ok_vqa(answer, parsed, score):
    judgement = OK.judge(OK.item({"question": "What?", "answers": TEN}), answer)
    assert (judgement.parsed, judgement.score) == (parsed, pytest.approx(score, abs=1e-12))


def test_ok_vqa_is_judged_as_lmms_eval_judges_it():
    from lmms_eval.tasks.ok_vqa.utils import ok_vqa_process_results

    for answer in ("The umbrella", "parasol", "two hats", "Don't", "a rain-coat", "hats", "snow.", "Rain coat!"):
        theirs = ok_vqa_process_results({"question_id": 1, "answers": list(TEN)}, [answer])["exact_match"]
        assert OK.judge(OK.item({"question": "What?", "answers": TEN}), answer).score == pytest.approx(theirs), answer


@pytest.mark.parametrize("question", [DIRECTION, "How many cars?", "Which?\nA. One\nB. Two cars\nC. None of them"])
def test_realworldqa_is_read_as_by_the_filters_that_lmms_eval_keeps(question):
    from lmms_eval.tasks.realworldqa.utils import MultiChoiceRegexFilter, NumberWordsToDigitsFilter

    answers = [
        "A",
        "b.",
        "(C)",
        "Left",
        "left",
        "Two",
        "two",
        "Two cars",
        "none of them",
        "B. Two cars",
        "3",
        "Ten",
        "x!",
    ]
    digits = NumberWordsToDigitsFilter().apply([[answer] for answer in answers], None)
    theirs = MultiChoiceRegexFilter().apply(digits, [{"question": question}] * len(answers))
    item = REAL.item({"question": question, "answer": "A"})
    assert [REAL.judge(item, answer).parsed for answer in answers] == theirs


def test_four_of_ten_and_the_mean_of_ok_vqa():
    items = [OK.item({"question": "What?", "answers": ["cat"] * n + ["dog"] * (10 - n)}) for n in (4, 0, 1)]
    those = [Prediction.judged(OK, i, "What?", item, "a cat") for i, item in enumerate(items)]
    assert [p.score for p in those] == [1.0, 0.0, pytest.approx(0.3)]
    assert scores(OK, those)["figures"]["Accuracy"]["value"] == pytest.approx(1.3 / 3)


def test_the_question_of_ok_vqa():
    assert OK.prompt({"question": "What is it for?"}) == (
        "What is it for?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    with pytest.raises(JobFailed, match="give the split val2014, which has ten"):
        OK.item({"question": "What?", "answers": None})


def test_without_lmms_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for name in [name for name in sys.modules if name.startswith("lmms_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    ok_vqa._normaliser.cache_clear()
    with pytest.raises(JobFailed, match=r'pip install "olavlm\[eval\]"'):
        OK.judge({"answers": TEN}, "umbrella")
