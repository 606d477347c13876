"""Scores of predictions, and two models on the same items."""

import dataclasses
import json

import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.comparison import compare
from olavlm.pipelines.evaluation.predictions import Prediction
from olavlm.pipelines.evaluation.scores import scores
from olavlm.pipelines.evaluation.statistics import Resampling
from olavlm.pipelines.evaluation.tasks import TASKS, Judgement

TASK = TASKS["cv_bench"]
COUNT_COCO, COUNT_ADE = ("Count", "COCO"), ("Count", "ADE20K")


def predictions(*groups, task=TASK):
    """Of (group, answers), where `B` is right."""
    those = []
    for (kind, source), answers in groups:
        item = {"kind": kind, "source": source, "options": 2, "answer": "(B)"}
        those += [Prediction.judged(task, len(those) + i, "?", item, answer) for i, answer in enumerate(answers)]
    return those


def test_scores_are_json_in_any_order_of_lines():
    those = predictions((COUNT_COCO, "BBBA"), (COUNT_ADE, "B?"))
    found = scores(TASK, those, Resampling(2000, 0.9, seed=3))
    assert json.loads(json.dumps(found)) == found == scores(TASK, those[::-1], Resampling(2000, 0.9, seed=3))
    assert list(found) == ["task", "items", "expected", "unparsed", "figures", "interval"]
    assert (found["task"], found["items"], found["expected"], found["unparsed"]) == ("cv_bench", 6, 2638, 1)
    assert list(found["figures"]) == ["Count", "2D"]
    count, two_d = found["figures"].values()
    assert count["value"] == pytest.approx(4 / 6)
    assert two_d["value"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert 0 <= two_d["low"] < two_d["value"] < two_d["high"] <= 1
    assert count["items"] == two_d["items"] == 6
    assert found["interval"] == {
        "method": "stratified bootstrap, percentile",
        "resamples": 2000,
        "level": 0.9,
        "seed": 3,
    }


def test_no_predictions_have_no_figures():
    found = scores(TASK, [])
    assert (found["items"], found["unparsed"], found["figures"]) == (0, 0, {})


def test_what_was_stored_as_a_judgement_is_not_believed():
    (right,) = predictions((COUNT_COCO, "B"))
    false = dataclasses.replace(right, score=0.0, parsed=None)
    found = scores(TASK, [false])
    assert found["figures"]["Count"]["value"] == 1
    assert found["unparsed"] == 0


def test_items_of_another_version_are_named():
    (those,) = predictions((COUNT_COCO, "B"))
    for key in ("options", "kind"):
        item = {k: v for k, v in those.item.items() if k != key}
        with pytest.raises(JobFailed, match=rf"CV-Bench: an item of the predictions lacks '{key}'"):
            scores(TASK, [dataclasses.replace(those, item=item)])


def test_two_models_by_hand():
    #                                     better  worse
    first = predictions((COUNT_COCO, "BBBBBA"), (COUNT_ADE, "BA"))
    second = predictions((COUNT_COCO, "BAAAAB"), (COUNT_ADE, "BB"))
    found = compare(TASK, first, second)
    assert json.loads(json.dumps(found)) == found
    count, two_d = found["figures"]["Count"], found["figures"]["2D"]
    assert (count["first"], count["second"]) == (pytest.approx(6 / 8), pytest.approx(4 / 8))
    assert count["difference"] == pytest.approx(2 / 8)
    assert count["low"] < 2 / 8 < count["high"]
    assert (count["first_better"], count["second_better"], count["items"]) == (4, 2, 8)
    assert (count["test"], count["p"]) == ("McNemar, exact", pytest.approx(2 * (1 + 6 + 15) / 64))
    assert two_d["difference"] == pytest.approx((5 / 6 + 1 / 2) / 2 - (2 / 6 + 2 / 2) / 2)
    back = compare(TASK, second, first)["figures"]["Count"]
    assert (back["difference"], back["first_better"], back["p"]) == (pytest.approx(-2 / 8), 2, count["p"])


def test_pairs_tell_more_than_two_scores():
    """200 items, of which the models differ in 8: as single scores nothing shows."""
    first = predictions((COUNT_COCO, "B" * 108 + "A" * 92))
    second = predictions((COUNT_COCO, "B" * 100 + "A" * 100))
    found = compare(TASK, first, second)["figures"]["Count"]
    apart = [scores(TASK, those)["figures"]["Count"] for those in (first, second)]
    assert apart[0]["low"] < apart[1]["high"]
    assert found["p"] == pytest.approx(2 / 2**8)
    assert found["low"] > 0


def test_scores_between_0_and_1_are_tested_by_sign_flips():
    task = dataclasses.replace(TASK, judge=lambda item, answer: Judgement(float(answer) / 10, answer))
    first, second = (predictions((COUNT_COCO, answers), task=task) for answers in ("336", "000"))
    found = compare(task, first, second)["figures"]["Count"]
    assert found["test"] == "paired sign-flip permutation"
    assert found["p"] == pytest.approx(2 / 8, abs=0.02)
    assert (found["difference"], found["first_better"], found["second_better"]) == (pytest.approx(0.4), 3, 0)


def test_models_on_other_items_are_not_compared():
    first = predictions((COUNT_COCO, "BBB"))
    with pytest.raises(JobFailed, match=r"3 predictions and 2 to compare .* item 2, for one, is only in the first"):
        compare(TASK, first, first[:2])
    with pytest.raises(JobFailed, match=r"item 0 is .*COCO.* here and .*ADE20K.* there"):
        compare(TASK, first, predictions((COUNT_ADE, "BBB")))
