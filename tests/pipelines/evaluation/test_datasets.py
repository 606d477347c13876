"""Rows of a published benchmark from parquet files in a folder, and what is wrong with a folder in one line."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.evaluation.datasets import open_rows
from olavlm.pipelines.evaluation.tasks import TASKS

CV_BENCH = TASKS["cv_bench"]


def test_rows_are_those_of_the_files_in_order(cv_bench):
    rows = open_rows(CV_BENCH, cv_bench)
    assert [rows.text(i)["prompt"].split("?")[0][-2:].strip() for i in range(len(rows))] == [
        "0", "1", "4", "5", "8", "9", "12", "13", "2", "3", "6", "7"
    ]  # fmt: skip
    for index in (11, 0, 7, 8):  # of several row groups and both files, back and forth
        row = rows[index]
        number = int(row["prompt"].split("?")[0].rsplit(maxsplit=1)[1])
        assert row["image"].size == (60 + number, 48)
        assert row["image"].mode == "RGB"
        assert {**rows.text(index), "image": row["image"]} == row
    assert row["choices"] == [str(number), "a cat", "a dog"]
    assert list(rows.fingerprint()["files"]) == ["test_2d.parquet", "test_3d.parquet"]
    with pytest.raises(IndexError):
        rows[12]


def test_only_what_the_task_reads_is_read(cv_bench):
    assert set(open_rows(CV_BENCH, cv_bench).text(0)) == set(CV_BENCH.published.columns)


@pytest.mark.parametrize("below", ["cv_bench", "CV-Bench", "deeper/data"])
def test_a_folder_of_datasets_will_do(cv_bench, tmp_path, below):
    place = tmp_path / below
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(cv_bench)
    shared = tmp_path if below != "deeper/data" else place.parent
    if below == "deeper/data":  # no link is followed on the way down
        place.unlink()
        place.mkdir()
        for file in cv_bench.glob("*.parquet"):
            (place / file.name).write_bytes(file.read_bytes())
    assert len(open_rows(CV_BENCH, shared)) == 12


def test_other_benchmarks_may_lie_beside_it(cv_bench, tmp_path):
    for name in ("cvbench", "RealWorldQA/data"):
        (tmp_path / name).mkdir(parents=True)
    for file in cv_bench.glob("*.parquet"):
        (tmp_path / "cvbench" / file.name).write_bytes(file.read_bytes())
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "RealWorldQA/data/test-00000-of-00001.parquet")
    assert len(open_rows(CV_BENCH, tmp_path)) == 12


def rewrite(cv_bench, file, change):
    pq.write_table(change(pq.read_table(cv_bench / "test_3d.parquet")), file)


def replaced(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


def test_files_of_other_writers_are_the_same_rows(cv_bench, tmp_path):
    """Pictures without a path, other types of text and lists, other columns in another order, no choices."""
    rows = open_rows(CV_BENCH, cv_bench)
    table = pq.read_table(cv_bench / "test_3d.parquet")
    text = {name: table[name].cast(pa.large_string()) for name in ("prompt", "source")}
    choices = table["choices"].cast(pa.large_list(pa.large_string())).to_pylist()
    changed = {
        "more": pa.array(range(4)),
        **text,
        "choices": pa.array([None, *choices[1:]], pa.large_list(pa.large_string())),
        **{name: table[name].dictionary_encode() for name in ("answer", "task")},
        "image": pa.array([row["bytes"] for row in table["image"].to_pylist()]),
    }
    pq.write_table(pa.table(changed), tmp_path / "test_3d.parquet")
    (tmp_path / "test_2d.parquet").write_bytes((cv_bench / "test_2d.parquet").read_bytes())
    other = open_rows(CV_BENCH, tmp_path)
    assert other.text(8)["choices"] is None
    assert CV_BENCH.item(other.text(8))["options"] == 26
    assert [other.text(i) for i in range(12) if i != 8] == [rows.text(i) for i in range(12) if i != 8]
    assert all(other[i]["image"].tobytes() == rows[i]["image"].tobytes() for i in range(12))


def test_what_is_wrong_with_a_file_is_one_line(cv_bench, tmp_path):
    file = tmp_path / "test.parquet"

    def reason():
        with pytest.raises(JobFailed) as caught:
            open_rows(CV_BENCH, tmp_path)[0]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file.write_bytes(b"PAR1 and no more")
    assert f"{file} is no parquet file that can be read" in reason()
    whole = (cv_bench / "test_2d.parquet").read_bytes()
    file.write_bytes(whole[:100] + bytes(len(whole) - 5000) + whole[-4900:])
    assert str(file) in reason()
    rewrite(cv_bench, file, lambda table: table.drop_columns(["choices"]))
    assert "is not nyu-visionx/CV-Bench: it lacks the column 'choices' of image, prompt" in reason()
    assert "it has idx, type, task, image" in reason()
    column = pa.array(["a.png"] * 4)
    rewrite(cv_bench, file, lambda table: table.set_column(3, "image", column))
    assert "its column 'image' is string" in reason()
    broken = pa.array([{"bytes": b"no picture", "path": "a.png"}] * 4)
    rewrite(cv_bench, file, lambda table: table.set_column(3, "image", broken))
    assert "cv_bench row 0" in reason()
    assert f"get {file} anew" in reason()
    for name, values, reason_given in (
        ("prompt", ["a?", None, "b?", "c?"], "row 1: 'prompt' is None, and in nyu-visionx/CV-Bench text"),
        ("choices", [["1"], ["2", None], None, []], "row 1: 'choices' is ['2', None], and in nyu-visionx/CV-Bench a l"),
        ("choices", ["1"] * 4, "row 0: 'choices' is '1', and"),
        ("answer", [1, 2, 3, 4], "row 0: 'answer' is 1, and in nyu-visionx/CV-Bench text"),
        ("answer", ["(A)", "(B)", "C", "(A)"], "row 2: CV-Bench: answer 'C', which is no letter in parentheses"),
        ("task", ["Count", "Kount", "Count", "Count"], "row 1: CV-Bench: task 'Kount'; known are Count"),
    ):
        rewrite(cv_bench, file, replaced(name, values))
        assert f"{file}, {reason_given}" in reason()
    rewrite(cv_bench, file, lambda table: table.slice(0, 0))
    assert f"{file}: no rows; get nyu-visionx/CV-Bench anew" in reason()
    nothing = pa.array([None] * 4, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    rewrite(cv_bench, file, lambda table: table.set_column(3, "image", nothing))
    assert "cv_bench row 0" in reason()


def test_a_copy_is_not_read_too(cv_bench, tmp_path):
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_2d.parquet").write_bytes((cv_bench / "test_2d.parquet").read_bytes())
    with pytest.raises(JobFailed, match=r"new/test_2d.parquet and .*old/test_2d.parquet, of one name"):
        open_rows(CV_BENCH, tmp_path)


def test_an_empty_folder_says_what_is_there(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(JobFailed, match=r"holds no test\*.parquet of nyu-visionx/CV-Bench.* 0.txt, 1.txt.* and 2 more"):
        open_rows(CV_BENCH, tmp_path)


def test_the_hubs_files_are_taken_as_they_lie_in_its_cache(cv_bench, tmp_path, monkeypatch):
    asked = {}

    def snapshot(repository, **options):
        asked.update(repository=repository, **options)
        return str(cv_bench)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert len(open_rows(CV_BENCH, None)) == 12
    patterns = list(CV_BENCH.published.files)
    assert asked == {"repository": "nyu-visionx/CV-Bench", "repo_type": "dataset", "allow_patterns": patterns}


def test_prompts_and_items_need_no_picture(cv_bench):
    rows = open_rows(replace(CV_BENCH), cv_bench)
    for index in range(len(rows)):
        row = rows.text(index)
        assert CV_BENCH.prompt(row).startswith("What is on picture")
        assert json.loads(json.dumps(CV_BENCH.item(row))) == CV_BENCH.item(row)
