"""olavlm-report: faults are seen, the page asks for nothing, runs are compared, what is gone is said."""

import json
import math

import pytest
from PIL import Image

from olavlm.pipelines.report import main

TERMS = [f"loss/{task}/{x}/{kind}" for task, x in (("depth", 2), ("seg", 3)) for kind in ("smooth_l1", "contrastive")]


def test_a_sound_run_shows_what_ran_and_flags_nothing(make_run, report):
    page = report(make_run(), "--samples", 0)
    assert "fault" not in page.by_class
    assert "mark" not in {attrs.get("class") for _, attrs in page.tags}
    for text in ("Pre-training (PT)", "some/llm", "<b>encoder</b>", "16 = 4 × 2 × 2", "bfloat16 autocast", "torch 9.9"):  # noqa: RUF001
        assert text in page.text
    assert "160" in page.by_class["tiles"]  # 16 samples in 100 ms
    assert "2.0 %" in page.by_class["tiles"]
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    titles = ["Total loss", "Text loss", "Learning rate", "Smooth-L1, depth", "Smooth-L1, seg", "Contrastive, depth"]
    titles += ["Contrastive, seg", "Factor on similarities, exp(s)", "Time a step", "Throughput"]
    assert [c.partition(":")[0] for c in charts] == titles
    assert "Smooth-L1, depth: layer 2 ends at 0.5" in charts
    assert "4,009" in page.text
    assert "llm: some/llm" in page.text  # the recipe itself


def test_a_page_has_no_request_and_a_policy_that_forbids_them(make_run, report, read_page):
    page = report(make_run(), "--samples", 0)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    with pytest.raises(AssertionError):
        read_page(page.html.replace("</main>", '<img src="picture.png"></main>'))
    with pytest.raises(AssertionError):
        read_page(page.html.replace("</main>", "</div></main>"))
    for old, new in (("h2>", "h4>"), ('role="img" aria-label="', 'role="img" aria-label="" title="')):
        with pytest.raises((AssertionError, KeyError)):
            read_page(page.html.replace(old, new))


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({TERMS[2]: 0.0}, "seg/3/smooth_l1 is exactly zero in 30 of 30 steps, first in step 1. Those batches had"),
        ({TERMS[1]: lambda s: 0.0 if s == 7 else 1.0}, "depth/2/contrastive is exactly zero in 1 of 30 steps, first"),
        ({TERMS[3]: 0.0, "valid/seg": 1}, "one valid target, and so no negatives"),
        ({TERMS[2]: 0.0, "valid/seg": 0}, "had no valid target"),
        ({"loss/text": lambda s: math.nan if s == 5 else 1.0}, "text is not finite in 1 of 30 steps, first in step 5."),
        ({"loss/total": lambda s: None if s > 28 else 1.0}, "total is not finite in 2 of 30 steps, first in step 29."),
        ({TERMS[0]: math.inf}, "loss/depth/2/smooth_l1 is not finite in 30 of 30 steps"),
    ],
)  # fmt: skip
def test_losses_that_are_zero_or_not_finite_are_flagged_and_marked(make_run, report, metrics, sentence):
    page = report(make_run(**metrics), "--samples", 0)
    assert sentence in page.by_class["fault"]
    assert "mark" in {attrs.get("class") for _, attrs in page.tags}


def test_of_many_faults_the_first_are_open_and_none_is_lost(make_run, report):
    layers = [f"loss/depth/{x}/smooth_l1" for x in range(1, 33)]
    page = report(make_run(**dict.fromkeys(layers, 0.0)), "--samples", 0)
    assert page.by_class["fault"].count("is exactly zero") == 32
    opened, _, folded = page.html.partition("<summary>20 more</summary>")
    assert (opened.count("is exactly zero"), folded.count("is exactly zero")) == (12, 20)


def test_losses_that_were_not_logged_an_unfinished_run_and_a_cut_line_are_flagged(make_run, report, capsys):
    folder = make_run(**dict.fromkeys(TERMS[2:], "absent"), bad_images=lambda s: int(s < 3))
    (folder / "adapter.json").unlink()
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 31, "loss/te')
    faults = report(folder, "--samples", 0).by_class["fault"]
    assert "The recipe distils seg at layer 3, but no such loss was logged." in faults
    assert "distils depth" not in faults
    assert "not finished: its last logged step is 30" in faults
    assert "1 line damaged or cut short" in faults
    assert "2 samples with an image that could not be read" in faults


def test_a_run_without_a_step_or_its_side_files_still_has_a_page(make_run, report):
    folder = make_run(steps=0)
    for name in ("recipe.yaml", "stage.json", "versions.json", "adapter.json"):
        (folder / name).unlink()
    page = report(folder)
    assert "No step was logged." in page.by_class["fault"]
    assert "recipe.yaml is missing" in page.text
    assert "stage.json is missing" in page.text


@pytest.mark.parametrize(
    "line", ['{"step": Infinity}', '{"step": 1e400}', f'{{"step": {"9" * 400}}}', '{"step": 3.5}', "[]",
             f'{{"step": 31, "loss/text": {"9" * 400}}}', '{"step": 31, "loss/text": 1e308}']
)  # fmt: skip
def test_a_line_that_no_training_wrote_is_damaged(make_run, report, line):
    folder = make_run(**{"loss/depth/²/smooth_l1": 1.0, "step_ms": 0.0, "data_wait_ms": 0.0})
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(line + "\n")
    assert "1 line damaged or cut short" in report(folder, "--samples", 0).by_class["fault"]


@pytest.mark.parametrize(
    ("was", "is_", "said"),
    [
        ("lr: 0.001", "lr: 1e-3", "train.lr is '1e-3'"),  # text, by YAML
        ("batch_size: 4", "batch_size: '4'", "train.batch_size is '4'"),
        ("layers: [2]", "layers: 2", "tasks.depth.layers is 2"),
        ("layers: [2]", "layers: [two]", "tasks.depth.layers is ['two']"),
        ("{depth: {layers: [2], weight: 0.5}, seg: {layers: [3], weight: 0.5}}", "[depth]", "tasks is ['depth']"),
    ],
)
def test_a_recipe_mended_by_hand_is_shown_without_what_cannot_be(make_run, report, was, is_, said):
    folder = make_run()
    recipe = (folder / "recipe.yaml").read_text()
    assert was in recipe
    (folder / "recipe.yaml").write_text(recipe.replace(was, is_))
    page = report(folder, "--samples", 0)
    assert f"recipe.yaml: {said}: left out" in page.by_class["fault"]
    assert "some/llm" in page.text


@pytest.mark.parametrize(
    "changed",
    [{"parts": "x"}, {"parts": [1]}, {"parts": [{"parameters": None}]}, {"processes": "x"}, {"stage": ["a"]},
     {"teachers": ["depth"]}],
)  # fmt: skip
def test_a_damaged_stage_file_hides_no_more_than_what_it_says(make_run, report, changed):
    folder = make_run()
    stage = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(stage | changed))
    assert "some/llm" in report(folder, "--samples", 0).text


def test_what_is_no_run_is_one_line_and_status_1(make_run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for words in (["nowhere"], [str(empty)], [str(make_run()), "--output", str(empty)]):
        assert main([*words, "--samples", "0"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("olavlm-report: error: ")
        assert error.count("\n") == 1
    for words in ([], ["a", "--samples", "-1"], ["a", "--samples", "many"], ["a", "--decode", "timm:x"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


def test_several_runs_are_compared_by_stage_and_written_where_they_meet(make_run, read_page, tmp_path, capsys):
    runs = [make_run("a/pt"), make_run("b/pt", **{"loss/text": 1.5}), make_run("b/ift", stage="ift")]
    assert main([*map(str, runs), "--samples", "0"]) == 0
    page = read_page((tmp_path / "runs" / "report.html").read_text())
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    assert "Text loss, pt: a/pt ends at 2; b/pt ends at 1.5" in charts
    assert not any(c.startswith("Text loss, ift") for c in charts)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    anchors = ["#" + attrs["id"] for tag, attrs in page.tags if tag == "section" and "id" in attrs]
    assert links == anchors
    assert len(links) == 3


def test_answers_and_names_of_pictures_may_be_anything(make_run, report):
    folder = make_run()
    entries = [{"image": image, "prompt": "What?", "answer": "half \ud800 of a pair"} for image in (5, "x" * 5000)]
    (folder / "answers.json").write_text(json.dumps(entries))
    page = report(folder, "--samples", 0)
    assert page.text.count("of a pair") == 2
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_answers_are_shown_with_their_photographs(make_run, report, tmp_path):
    folder = make_run(stage="ift")
    Image.new("RGB", (30, 20)).save(folder / "own.png")
    (tmp_path / "images").mkdir()  # the recipe's root, beside the runs
    Image.new("RGB", (31, 20)).save(tmp_path / "images" / "rooted.png")
    images = ["own.png", "rooted.png", "gone.png", None]
    answers = [{"image": i, "prompt": f"What is {i}?", "answer": "<script>no</script>"} for i in images]
    (folder / "answers.json").write_text(json.dumps(answers))
    page = report(folder)
    assert page.by_class["answers"].count("<script>no</script>") == 4
    assert [a["alt"] for t, a in page.tags if t == "img"] == ["own.png", "rooted.png"]
    assert "gone.png: not found" in page.by_class["empty"]
    assert "text only" in page.by_class["empty"]
    (folder / "answers.json").write_text('{"image": 1}')
    assert "answers.json is not a list" in report(folder).text
