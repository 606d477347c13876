"""Predictions on disk: whatever instant a process dies at, what was written is there, and nothing else is."""

import json
import os
from pathlib import Path

import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.predictions import Prediction, Predictions

ITEM = {"kind": "Count", "source": "COCO", "options": 2, "answer": "(B)"}


def prediction(index, answer="(B)", **other):
    return Prediction(
        **{"task": "cv_bench", "index": index, "prompt": f"Question {index}?", "item": ITEM}
        | {"answer": answer, "parsed": "(B)", "score": 1.0}
        | other
    )


def test_a_line_holds_all_of_a_prediction(tmp_path):
    folder = tmp_path / "new" / "predictions"
    Predictions(folder).append([prediction(3, "naïve\n(B)")])
    line = (folder / "cv_bench.jsonl").read_text(encoding="utf-8")
    assert line.endswith("\n")
    assert json.loads(line) == {
        "task": "cv_bench",
        "index": 3,
        "prompt": "Question 3?",
        "item": ITEM,
        "answer": "naïve\n(B)",
        "parsed": "(B)",
        "score": 1.0,
    }
    assert Predictions(folder).done("cv_bench") == {3: prediction(3, "naïve\n(B)")}
    assert Predictions(folder).done("mmstar") == Predictions(folder).merge("mmstar") == {}
    assert Predictions(tmp_path / "none").done("cv_bench") == {}
    assert [f.name for f in folder.iterdir()] == ["cv_bench.jsonl"]


def test_half_of_a_surrogate_pair_of_a_served_model_comes_back(tmp_path):
    those = Predictions(tmp_path)
    those.append([prediction(0, "a \ud83d b")])
    assert those.done("cv_bench")[0].answer == "a \ud83d b"


def test_cut_anywhere_in_its_last_line_a_file_goes_on_from_the_line_before(tmp_path):
    those, file = Predictions(tmp_path), tmp_path / "cv_bench.jsonl"
    those.append([prediction(0), prediction(1, "ü (B)")])
    whole = file.read_bytes()
    begin = whole.index(b"\n") + 1
    for end in range(begin, len(whole)):
        file.write_bytes(whole[:end])
        assert list(those.done("cv_bench")) == [0]
        those.append([prediction(1, "ü (B)")])
        assert file.read_bytes() == whole


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_size), fsync(fd)))
    those = Predictions(tmp_path)
    those.append([prediction(0)])
    those.append([prediction(1), prediction(2)])
    size = (tmp_path / "cv_bench.jsonl").stat().st_size
    assert seen[-1] == size
    assert size // 3 in seen


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"task": "cv_bench"', "is no prediction"),
        ("", "is no prediction"),
        ("[1]", "is no prediction"),
        ('{"index": 4}', "is no prediction"),
        (json.dumps({**vars(prediction(4)), "task": "mmstar"}), "is no prediction of cv_bench"),
        (json.dumps({**vars(prediction(4)), "index": "4"}), "is no prediction of cv_bench"),
        (json.dumps({**vars(prediction(4)), "score": 2}), "is no prediction of cv_bench"),
        (json.dumps({**vars(prediction(4)), "score": float("nan")}), "is no prediction of cv_bench"),
        (json.dumps({**vars(prediction(4)), "answer": None}), "is no prediction of cv_bench"),
    ],
)
def test_a_spoilt_line_is_named(tmp_path, line, why):
    those, file = Predictions(tmp_path), tmp_path / "cv_bench.jsonl"
    those.append([prediction(0)])
    with file.open("a") as f:
        f.write(line + "\n")
    those.append([prediction(1)])
    with pytest.raises(JobFailed, match=rf"cv_bench\.jsonl:2 {why}"):
        those.done("cv_bench")


def test_ranks_write_apart_and_are_merged_in_the_order_of_index(tmp_path):
    first, second, tenth = (Predictions(tmp_path, rank) for rank in (0, 1, 10))
    second.append([prediction(5), prediction(1)])
    first.append([prediction(4), prediction(0)])
    tenth.append([prediction(3)])
    first.append([Prediction("cv_bench_2", 0, "?", {}, "", None, 0.0)])
    assert list(second.done("cv_bench")) == [0, 1, 3, 4, 5]
    assert list(first.merge("cv_bench")) == [0, 1, 3, 4, 5]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cv_bench.jsonl", "cv_bench_2.jsonl"]
    lines = (tmp_path / "cv_bench.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 3, 4, 5]


def test_a_merge_that_dies_loses_and_doubles_nothing(tmp_path, monkeypatch):
    first, second = Predictions(tmp_path), Predictions(tmp_path, 1)
    first.append([prediction(0)])
    second.append([prediction(1)])
    unlink = Path.unlink

    def die(file, missing_ok=False):
        if file.name == "cv_bench.rank-1.jsonl":
            raise KeyboardInterrupt
        unlink(file, missing_ok)

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            first.merge("cv_bench")
    assert (tmp_path / "cv_bench.rank-1.jsonl").exists()
    assert first.done("cv_bench") == first.merge("cv_bench") == {0: prediction(0), 1: prediction(1)}
    assert not (tmp_path / "cv_bench.rank-1.jsonl").exists()


def test_an_item_with_two_answers_is_refused(tmp_path):
    first, second = Predictions(tmp_path), Predictions(tmp_path, 1)
    first.append([prediction(0), prediction(7)])
    second.append([prediction(7)])
    assert list(first.done("cv_bench")) == [0, 7]
    second.append([prediction(0, "(A)")])
    with pytest.raises(JobFailed, match=r"rank-1\.jsonl:2 and .*cv_bench\.jsonl:1 are two answers to item 0"):
        first.done("cv_bench")


def test_answers_to_another_question_are_refused(tmp_path):
    those, stored = Predictions(tmp_path), prediction(2, prompt="Look at the picture. How many chairs are there?")
    those.check(stored, stored.prompt, dict(ITEM))
    with pytest.raises(JobFailed, match=r"the prompt of cv_bench, item 2, was '\.\.\..*chairs are there\?' and"):
        those.check(stored, "Look at the picture. How many tables are there?", ITEM)
    with pytest.raises(JobFailed, match=r"the item of cv_bench, item 2, was .* another dataset or protocol"):
        those.check(stored, stored.prompt, {**ITEM, "answer": "(A)"})
