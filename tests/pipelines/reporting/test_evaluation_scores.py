"""Scores on the paper's benchmarks on a run's page."""

import json

from olavlm.pipelines.evaluation.predictions import Prediction
from olavlm.pipelines.evaluation.scores import scores
from olavlm.pipelines.evaluation.tasks import TASKS

MMSTAR = TASKS["mmstar"]


def test_stand_beside_the_papers_rows(make_run, report):
    folder = make_run(stage="ift")
    item = {"category": "math", "answer": "A"}
    predictions = [Prediction.judged(MMSTAR, i, "?", item, answer) for i, answer in enumerate("AAAB")]
    (folder / "benchmarks").mkdir()
    content = {"tasks": {"mmstar": scores(MMSTAR, predictions)}}
    (folder / "benchmarks" / "scores.json").write_text(json.dumps(content))
    page = report(folder)
    text = page.text.partition("Benchmarks")[2]
    assert "Table 1" in text
    assert "38.8" in text, "of the paper's LLaVA-1.5"
    assert "75.0" in text, "three of four"
    assert "4 of the 1,500 items of MMStar" in text


def test_another_file_is_said_to_be_one(make_run, report):
    folder = make_run()
    assert "Benchmarks" not in report(folder).text
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "scores.json").write_text("[]")
    assert "benchmarks/scores.json is no file of olavlm-eval" in report(folder).text
