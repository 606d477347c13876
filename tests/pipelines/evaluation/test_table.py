"""The paper's rows are checked by arithmetic, and runs are put beside them."""

from decimal import Decimal

import pytest

from olavlm.pipelines.evaluation import paper
from olavlm.pipelines.evaluation.sheet import Sheet
from olavlm.pipelines.evaluation.table import all_figures, beside_paper, compared
from olavlm.pipelines.evaluation.tasks import TASKS


def scored(task, items=None, unparsed=0, **values):
    """Scores whose intervals are one point to each side."""
    items = items or TASKS[task].published.items
    figures = {
        name.lstrip("_"): {"value": v / 100, "low": v / 100 - 0.01, "high": v / 100 + 0.01, "items": items}
        for name, v in values.items()
    }
    expected = TASKS[task].published.items
    interval = {"method": "", "resamples": 10, "level": 0.95, "seed": 0}
    return dict(task=task, items=items, expected=expected, unparsed=unparsed, figures=figures, interval=interval)


CV = scored("cv_bench", Count=57.4, Relation=66.8, Depth=71.5, Distance=52.8, _2D=60, _3D=62, Overall=61)
ALL = {
    "cv_bench": CV,
    "mmstar": scored("mmstar", Final=38.5),
    "realworldqa": scored("realworldqa", Accuracy=55),
    "ok_vqa": scored("ok_vqa", Accuracy=59),
}


def cells(sheet, name):
    (row,) = (row for row in sheet.rows if row[0] == name)
    return dict(zip(sheet.head, row, strict=True))


def test_every_average_is_that_of_its_columns_but_for_one():
    assert [len(table.rows) for table in paper.TABLES] == [10, 4, 3]
    assert all(len(row.values) == len(table.columns) for table in paper.TABLES for row in table.rows)
    assert all(len(row.labels) == len(table.labels) for table in paper.TABLES for row in table.rows)
    assert paper.slips(paper.TABLE_7) == []
    (slip,) = paper.slips(paper.TABLE_1)
    assert slip.labels == ("LLaVA-1.5", "Llama3-8b", "CLIP ViT-L")
    assert (slip.average, round(paper.mean(slip), 1)) == (Decimal("55.1"), Decimal("55.8"))
    (ours,) = (row for row in paper.TABLE_1.rows if row.labels == ("OLA-VLM", *slip.labels[1:]))
    assert ours.average - slip.average == Decimal("2.5")
    assert round(paper.mean(ours) - paper.mean(slip), 1) == Decimal("1.8")


def test_the_average_of_table_2_is_no_mean_of_its_columns():
    assert not any(paper.is_mean(row) for row in paper.TABLE_2.rows)
    last = paper.TABLE_2.rows[-1]
    assert (last.average, paper.mean(last)) == (Decimal("64.6"), Decimal("65.25"))
    # with as many questions of depth as of distance, the overall score leaves a 2D one between count and relation
    for row in paper.TABLE_2.rows:
        count, depth, relation, distance = row.values
        assert count < 2 * row.average - (depth + distance) / 2 < relation


def test_a_whole_run_stands_beside_the_rows():
    one, two, seven = beside_paper({"mine": ALL})
    assert cells(one, "mine") == {
        "method": "mine",
        "LLM": "",
        "encoder": "",
        "Count2D": "57.4 ±1.0",
        "Depth3D": "71.5 ±1.0",
        "Relation2D": "66.8 ±1.0",
        "Distance3D": "52.8 ±1.0",
        "MMStar": "38.5 ±1.0",
        "RWQA": "55.0 ±1.0",
        "OK-VQA": "59.0 ±1.0",
        "Avg": "57.3 ±0.4",  # the paper's row of the same columns; sqrt(7 · 1²) / 7 = 0.378
    }
    assert cells(one, "  items")["MMStar"] == "1,500"
    assert cells(two, "mine")["Avg"] == "61.0 ±1.0"
    assert cells(seven, "mine")["CV-Bench2D"] == "60.0 ±1.0"
    assert cells(seven, "mine")["Avg"] == "54.9 ±0.5"  # (60 + 62 + 38.5 + 59) / 4 = 54.875
    assert [row[-1] for row in one.rows].count("55.1*") == 1


def test_what_a_run_lacks_is_blank_and_so_is_its_average():
    one, seven = beside_paper({"mine": {"mmstar": scored("mmstar", items=12, unparsed=2, Final=50)}})
    row = cells(one, "mine")
    assert row.pop("MMStar") == "50.0 ±1.0"
    assert set(row.values()) == {"mine", ""}
    assert cells(seven, "mine")["Avg"] == ""
    assert "mine: 12 of the 1,500 items of MMStar, and so not its score" in one.notes
    assert "mine: 2 of 12 answers to MMStar are unparsed, thus wrong" in one.notes
    assert beside_paper({"mine": {"cv_bench": scored("cv_bench", items=3)}}) == []


def test_notes_say_what_the_numbers_are_worth():
    one, two, _ = beside_paper({"mine": ALL})
    assert "* printed 55.1, but its columns give 55.8: the gain of OLA-VLM over it is 1.8, not 2.5" in one.notes
    average = "Avg is CV-Bench's Overall, not the mean of the columns (OLA-VLM, Llama3-8b: 64.6; the mean is 65.3)"
    assert average in two.notes
    # 1.96 · sqrt(0.6 · 0.4 / 2638) = 0.01869, and times sqrt(2) 0.02644
    assert any("60 % on 2,638 items is known to ±1.9" in note and "to ±2.6" in note for note in one.notes)


def test_several_runs_and_all_figures():
    one, *_ = beside_paper({"mine": ALL, "other": {"cv_bench": CV}})
    assert [row[0] for row in one.rows[-4:]] == ["mine", "  items", "other", "  items"]
    sheet = all_figures("mine", ALL)
    assert sheet.rows[6] == ["CV-Bench", "Overall", "61.0", "60.0 to 62.0", "2,638"]
    assert len(sheet.rows) == 10


def test_a_comparison_is_a_table():
    x = dict(first=0.62, second=0.6, items=2638, difference=0.02, low=-0.005, high=0.045)
    x |= dict(first_better=300, second_better=247, test="McNemar, exact", p=0.0264)
    found = {"cv_bench": {"figures": {"Overall": x}, "interval": {"level": 0.95}}}
    sheet = compared("a run", "another", found)
    assert sheet.rows == [
        ["CV-Bench", "Overall", "62.0", "60.0", "+2.0", "-0.5 to +4.5", "300", "247", "2,638", "0.026"]
    ]
    assert "McNemar, exact (CV-Bench)" in sheet.notes[0]


def test_a_sheet_as_text_and_as_markdown():
    sheet = Sheet("Title", ["name", "n"], [["a|b", "1"], ["c", "1,000"]], notes=["* a slip"])
    assert sheet.text() == "Title\nname      n\n-----------\na|b       1\nc     1,000\n  * a slip\n"
    assert sheet.markdown() == (
        "## Title\n\n| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n| c | 1,000 |\n\n- \\* a slip\n"
    )
    assert max(map(len, Sheet("Title", ["n"], [["1"]], notes=["word " * 60]).text().splitlines())) <= 100


@pytest.mark.parametrize("table", paper.TABLES, ids=lambda table: table.title[:7])
def test_columns_are_figures_that_tasks_report(table):
    for column in (*table.columns, *([table.average] if table.average else [])):
        assert column.task in TASKS
    rows = {
        "cv_bench": [
            {"kind": kind, "source": source, "options": 2, "answer": "(A)"}
            for kind, source in (("Count", "ADE20K"), ("Relation", "COCO"), ("Depth", "Omni3D"), ("Distance", "Omni3D"))
        ],
        "mmstar": [{"category": "math", "answer": "A"}],
        "realworldqa": [{"options": [], "answer": "A"}],
        "ok_vqa": [{"answers": ["a"] * 10}],
    }
    assert {column.figure for column in table.columns} <= {x for t, i in rows.items() for x in TASKS[t].metrics(i)}
