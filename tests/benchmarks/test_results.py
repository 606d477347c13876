"""The miniature's statistics are right, seeds of several runs are put together, and its page says what was measured."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest


def test_intervals_by_hand(module):
    intervals = module("intervals")
    # Two-sided 95 % quantiles of any table of Student's t; with 1 and 2 degrees they have closed forms.
    assert intervals.t_quantile(1) == pytest.approx(math.tan(0.95 * math.pi / 2))
    assert intervals.t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))
    for degrees, known in ((3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert intervals.t_quantile(degrees) == pytest.approx(known, abs=5e-4)
    found = intervals.t_interval([1, 2, 3])  # a standard deviation of 1, so 4.3027 / sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert not found.without_zero
    pairs = intervals.paired([5.0, 7.0, 9.5], [4.0, 6.0, 8.0])  # 1, 1, 1.5
    assert (pairs.mean, pairs.without_zero) == (pytest.approx(7 / 6), True)
    assert intervals.t_interval([3.0]).low == -math.inf
    with pytest.raises(ValueError, match="no values"):
        intervals.t_interval([])


def probe_scores(folder: Path, layers: dict[int, float]) -> None:
    (folder / "probes" / "eval").mkdir(parents=True)
    found = {"layers": {str(layer): {"mean": mean} for layer, mean in layers.items()}}
    (folder / "probes" / "eval" / "scores.json").write_text(json.dumps({"models": [{"tasks": {"depth": found}}]}))


def answers(folder: Path, right: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    figures = {name: {"value": value} for name, value in right.items()}
    (folder / "scores.json").write_text(json.dumps({"tasks": {"cv_bench": {"figures": figures}}}))


@pytest.fixture
def made(tmp_path):
    """A folder with the scores of runs that never were: three seeds of single, of distilled, and one of a baseline."""
    here = {"commit": "abc", "date": "then", "load": 1.5, "cpu": "x", "cores": 2, "memory_gb": 8, "versions": {}}
    lines = (
        {"began": {"began": 0, "workers": 2, "machine": here}},
        {"step": {"name": "seed 0/single/pt", "kind": "pt", "seconds": 60, "ended": 65}},
        {"run": {"began": 0, "seconds": 90}},
        {"began": {"began": 200, "workers": 2, "machine": {**here, "commit": "def", "date": "later", "load": 0.5}}},
        {"step": {"name": "seed 0/single/ift", "kind": "ift", "seconds": 10, "ended": 210}},
        {"began": {"began": 300, "workers": 2, "machine": {**here, "commit": "of a run that did nothing"}}},
    )
    (tmp_path / "journal.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for seed in range(3):
        for arm, at in (("single", 0.8), ("distilled", 0.9)):
            run = tmp_path / "runs" / arm / f"seed-{seed}"
            probe_scores(run / "pt", {layer: at + 0.01 * seed + 0.001 * layer for layer in range(1, 7)})
        answers(tmp_path / f"runs/single/seed-{seed}/ift/benchmarks", {"Depth": 0.50 + 0.01 * seed, "Overall": 0.4})
    for seed in (0, 2):  # of which the last is not taken, since 1 is not there
        answers(tmp_path / f"runs/feature_concat/seed-{seed}/ift/benchmarks", {"Depth": 0.75, "Overall": 0.7})
    return tmp_path


@pytest.fixture
def results(module, made, monkeypatch):
    """What is collected there; the predictions themselves are not."""
    found = module("miniature.results")
    monkeypatch.setattr(found, "item_pairs", lambda *_: [])
    arms = ["single", "feature_concat", "distilled"]
    run = found.collect(made, module("miniature.forms").FORMS["quick"], arms, range(3))
    return run


def test_scores_are_collected_by_seed(module, results):
    (after_pt,) = results["figures"]["figure 3"]
    assert after_pt.values["single encoder"]["layer 2"] == pytest.approx([0.802, 0.812, 0.822])
    difference = after_pt.difference("distilled", "layer 2")
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert "60 s" in after_pt.notes[0]
    (table,) = results["figures"]["table 1"]
    assert table.values["single encoder"]["Depth"] == pytest.approx([50, 51, 52])
    assert table.values["feature concat"]["Depth"] == [75.0]
    assert table.difference("feature concat", "Depth").mean == 25  # of the one seed that both have
    assert results["seeds"] == [0, 1, 2]
    assert results["seconds"] == 90 + 10  # of the run that was killed until its last step
    assert [results["machine"][name] for name in ("commit", "date", "load")] == ["abc, def", "then", 1.5]
    lines = after_pt.markdown().splitlines()
    assert lines[-3].startswith("| distilled minus single encoder | 3 | 0.1000 [0.1000, 0.1000] |")


def test_runs_of_other_seeds_are_put_together(module):
    joined, figures = module("miniature.joining").joined, module("figures")

    def run(seeds: list[int], arms=("single encoder", "distilled"), have: int | None = None, **changed) -> dict:
        n = len(seeds) if have is None else have
        values = {arm: {"Depth": [10.0 * i + s for s in seeds[:n]]} for i, arm in enumerate(arms)}
        table = figures.Seeds("t", values, {"distilled": "single encoder"}, 1)
        counts, p = {"Depth": [[960, s, 0] for s in seeds]}, {"Depth": [0.5] * len(seeds)}
        pairs = figures.ItemPairs("p", "a", "b", seeds, counts, p)
        models = figures.Count("llm", {"": {"Depth": 0.8}})
        found = {"models": [models], "table 1": [table], "item by item": [pairs]}
        found = {name: figures.to_json(parts) for name, parts in found.items()}
        about = {"form": {"name": "full"}, "seeds": seeds, "seconds": 60.0, "figures": found}
        return about | {"machine": {"commit": f"c{seeds[0]}", "date": "now", "cpu": "x", "cores": 2}} | changed

    all_five = joined(joined(run([0]), run([1, 2])), run([3, 4]))
    assert (all_five["seeds"], all_five["seconds"]) == ([0, 1, 2, 3, 4], 180)
    (table,) = figures.from_json(all_five["figures"]["table 1"])
    assert table.values == {"single encoder": {"Depth": [0, 1, 2, 3, 4]}, "distilled": {"Depth": [10, 11, 12, 13, 14]}}
    assert table.notes == [
        "Of several runs: seeds 0 in 1 minutes on 2 cores of x, commit c0, now; "
        "seeds 1, 2 in 1 minutes on 2 cores of x, commit c1, now; "
        "seeds 3, 4 in 1 minutes on 2 cores of x, commit c3, now."
    ]
    (pairs,) = figures.from_json(all_five["figures"]["item by item"])
    assert [row[1] for row in pairs.counts["Depth"]] == [0, 1, 2, 3, 4]
    assert len(pairs.p["Depth"]) == 5
    assert pairs.seeds == [0, 1, 2, 3, 4]
    assert "| seed 4: only a, only b, p |" in pairs.markdown()
    assert joined(run([0, 1]), run([0, 1, 2])) == run([0, 1, 2])  # the same seeds again take their place
    for other, why in (
        (run([1, 2]), "seeds 1 are there already"),
        (run([2], form={"name": "quick"}), "of another form"),
        (run([0, 1, 2], form={"name": "quick"}), "of another form"),
        (run([0, 1, 2], arms=("distilled",)), "seeds 0, 1 are there already.* of all the arms"),
        (run([2, 3], have=1), "of 2 and 2 seeds 2 and 1 are there"),
        (run([2], arms=("single encoder", "distilled", "n4")), "run the same arms"),
        (run([0, 1, 2], have=1), "seeds 0, 1 are there already.* of all the arms"),  # begun again, and not finished
        (run([2], figures={"table 1": []}), "other small models"),
    ):
        with pytest.raises(ValueError, match=why):
            joined(run([0, 1]), other)
    with pytest.raises(ValueError, match="no run of the experiments"):
        joined({"figures": {"shortcuts": []}}, run([0]))


def test_findings_say_what_the_intervals_do(module, results):
    seeds = module("figures").Seeds
    told = module("miniature.findings").findings(results["figures"], 6)
    assert told == [
        "Probes of depth after PT, distilled minus single encoder over 3 seeds: layer 2 +0.1000 [+0.1000, +0.1000], "
        "layer 4 +0.1000 [+0.1000, +0.1000]. The interval lies above 0 at 2 of the 2 distilled layers, and at 6 of all "
        "6.",
        "Fed the teachers' features (feature concat): Depth 75.0 % (chance 50).",
    ]
    (chart,) = results["figures"]["figure 3"]
    same = {column: [0.75] * 3 for column in chart.columns}
    chart.values["the same for every picture"] = same
    told = module("miniature.findings").findings(results["figures"], 6, {"Depth": 58.25})
    assert told[1] == (
        "Above what is the same for every picture (0.7500) stand single encoder by 0.0610 to 0.0660, distilled by "
        "0.1610 to 0.1660."
    )
    assert told[2].endswith("Depth 75.0 % (chance 50, without any depth at least 58.2).")
    over = {"distilled": "single encoder"}
    worse = {"single encoder": {"Depth": [60.0, 61.0, 62.0], "Overall": [5.0, 6.0, 5.0]},
             "distilled": {"Depth": [50.0, 50.5, 52.0], "Overall": [6.0, 5.0, 5.5]}}  # fmt: skip
    (sentence,) = module("miniature.findings").findings({"table 1": [seeds("t", worse, over, 1)]}, 6)
    assert "That is no difference overall that these seeds can tell from none. Of 2 intervals" in sentence
    assert sentence.endswith("uncorrected, 1 leaves out 0: Depth -10.2 [-10.9, -9.4].")
    fewer = {arm: {"Overall": columns["Depth"]} for arm, columns in worse.items()}
    (sentence,) = module("miniature.findings").findings({"table 1": [seeds("t", fewer, over, 1)]}, 6)
    assert "That is fewer right answers overall. Of 1 intervals" in sentence
    base = {"Depth": [50.0, 51.0, 52.0], "Overall": [40.0, 41.0, 42.0]}
    more = {"Depth": [52.0, 53.0, 54.5], "Overall": [41.0, 40.0, 42.0]}
    tables = {
        "table 4": [seeds("t", {"base": base, "pt": more}, {"pt": "base"}, 1)],
        "table 5": [seeds("t", {"n0": base, "n4": {name: of[:1] for name, of in more.items()}}, {"n4": "n0"}, 1)],
    }
    assert module("miniature.findings").findings(tables, 6) == [
        "Table 4, pt minus base: +0.0 [-2.5, +2.5] points overall over 3 seeds. Of 2 intervals, each by itself and "
        "uncorrected, 1 leaves out 0: Depth +2.2 [+1.4, +2.9].",
        "Table 5, n4 minus n0: +1.0 points overall in one seed, of which alone nothing is said.",
    ]


def test_arms_are_compared_with_their_tables_base(module, tmp_path, monkeypatch):
    """Question by question, over the seeds that both have."""
    found, asked = module("miniature.results"), []
    for arm, seeds in (("single", 2), ("distilled", 2), ("tokens_only", 1), ("n0", 2), ("n4", 2)):
        for seed in range(seeds):
            answers(tmp_path / f"runs/{arm}/seed-{seed}/ift/benchmarks", {"Depth": 0.5})

    def compared(_: Path, arm: str, base: str, seed: int) -> dict:
        asked.append((arm, base, seed))
        return {"Depth": {"items": 960, "first_better": seed, "second_better": 7, "p": 0.1}}

    monkeypatch.setattr(found, "_compared", compared)
    pairs = found.item_pairs(tmp_path, ["single", "distilled", "tokens_only", "n0"], range(5))
    assert asked == [
        ("distilled", "single", 0), ("distilled", "single", 1), ("distilled", "tokens_only", 0), ("distilled", "n0", 0),
        ("distilled", "n0", 1),
    ]  # fmt: skip
    assert [pair.seeds for pair in pairs] == [[0, 1], [0], [0, 1]]
    assert pairs[0].title == "distilled against single encoder on the same questions"
    assert pairs[2].counts == {"Depth": [[960, 0, 7], [960, 1, 7]]}
    assert pairs[2].title == "8 tokens a task (distilled) against no task tokens on the same questions"


def test_count_is_told_by_what_is_counted(module, tmp_path):
    run = tmp_path / "runs/single/seed-0/ift/benchmarks"
    answers(run, {"Count": 0.5, "Overall": 0.5})
    (run / "predictions").mkdir()
    asked = [("objects", 1.0), ("objects", 0.0), ("red objects", 0.0), ("cubes", 0.0), ("spheres", 1.0)]
    lines = [
        {"task": "cv_bench", "index": i, "prompt": f"How many {what} are in the image? ...", "item": {"kind": "Count"},
         "answer": "(A)", "parsed": "(A)", "score": score} for i, (what, score) in enumerate(asked)
    ]  # fmt: skip
    lines.append({**lines[0], "index": 9, "prompt": "Which is closer?", "item": {"kind": "Depth"}})
    (run / "predictions" / "cv_bench.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (table,) = module("miniature.results").counted(tmp_path, ["single", "distilled"], range(3))
    assert table.values == {"single encoder": {"objects": [50.0], "a shape or a colour": [pytest.approx(100 / 3)]}}


def test_probes_are_shown_beside_what_needs_no_picture(module, made, monkeypatch):
    results = module("miniature.results")
    monkeypatch.setattr(results, "blind_cosine", lambda *_: 0.6)
    form = module("miniature.forms").FORMS["quick"]
    (chart,) = results.figure_3(made, form, ["single", "distilled"], range(3))
    assert chart.values[results.SAME] == {f"layer {n}": [0.6] * 3 for n in range(1, 7)}
    assert chart.over == {"distilled": "single encoder"}


@pytest.mark.parametrize("name", ["two-cores", "two-cores-5-seeds", "two-cores-full"])
def test_pages_that_are_kept_are_those_of_their_results(module, name):
    """All but the pictures and the commands, which the figures do not hold."""
    file = Path(__file__).parents[2] / "benchmarks" / "miniature" / "results" / f"{name}.json"
    made = module("miniature.page").page_of(json.loads(file.read_text()), [])
    figures, how = made.split("<div class=block><h3>How</h3>")
    kept_figures, kept_how = (
        file.with_suffix(".html").read_text(encoding="utf-8").split("<div class=block><h3>How</h3>")
    )
    assert re.sub("(?s)<div class=block><h3>(Depth, from|The world, and).*", "", kept_figures) == figures
    assert re.sub("(?s)<details><summary>The commands.*</details>", "", kept_how) == how


def test_the_page_holds_what_was_found_and_asks_for_nothing(module, results):
    figures = module("figures")
    pairs = figures.ItemPairs("a against b", "a", "b", [3], {"Depth": [[96, 20, 10]]}, {"Depth": [0.0987]})
    results["figures"]["item by item"] = [pairs]
    assert "| Depth | 96 | 20, 10, 0.099 |" in pairs.markdown()
    results["figures"] = {name: figures.to_json(found) for name, found in results["figures"].items()}
    html = module("miniature.page").page_of(json.loads(json.dumps(results)), [], ["olavlm-train pt"])
    for text in ("+0.1000 [+0.1000, +0.1000]", "75.0", "20 : 10, p 0.099", "olavlm-train pt", "2 of the 2 distilled"):
        assert text in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "None" not in html
    assert "inf" not in html.lower().replace("information", "")
    assert ">seed 3<" in html
    for found in results["figures"].values():  # of one seed
        for figure in found:
            for columns in figure.get("values", {}).values():
                columns |= {name: values[:1] for name, values in columns.items() if isinstance(values, list)}
    html = module("miniature.page").page_of(json.loads(json.dumps(results)), [])
    assert "inf" not in html.lower().replace("information", "")
    assert "distilled minus single: +0.1000<" in html


def test_a_page_is_made_of_what_is_done(module, made, tmp_path, capsys):
    """Without running anything; an empty folder has none."""
    run = module("miniature.run")
    arguments = argparse.ArgumentParser()
    run.add_arguments(arguments)
    with pytest.raises(run.RunError, match="nothing is done there"):
        run.run(arguments.parse_args(["--dir", str(tmp_path / "empty"), "--page"]))
    for seed in range(3):
        for name in ("single", "distilled"):
            for stage in ("pt", "ift"):
                folder = made / "runs" / name / f"seed-{seed}" / stage
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "stage.json").write_text('{"finished": true}')
    before = (made / "journal.jsonl").read_text()
    with run._held(made):  # a run that is at work
        run.run(arguments.parse_args(["--dir", str(made), "--page"]))
    assert (made / "journal.jsonl").read_text() == before
    assert "Probes of depth after PT" in (made / "index.html").read_text()
