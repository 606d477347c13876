"""The miniature's experiments: its recipes are the paper's, its steps are commands that parse, come in order and go on
after a death, its statistics are right, and its page says what was measured."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import math
import os
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from olavlm.cache import Dataset, FeatureStore, StoreBuilder, pending
from olavlm.pipelines import evaluate, extract, probe, report
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.student.recipes import load_recipe, table_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def module():
    """module(name) -> `benchmarks.name`; benchmarks are no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))

        def load(name: str) -> ModuleType:
            return importlib.import_module(f"benchmarks.{name}")

        yield load


def words_of(line: str) -> tuple[str, list[str]]:
    command, _, rest = line.removeprefix("python -m ").partition(" ")
    return command, shlex.split(rest)


def test_arms_are_the_rows_of_the_paper(module):
    """Each changes of the default what the paper's row changes, and nothing else."""
    arms = module("miniature.arms").ARMS
    rows = [(arm, row) for arm in arms.values() for row in arm.rows.values() if row]
    assert len(rows) == 11
    for arm, row in rows:
        content = yaml.safe_load(arm.recipe.read_text())
        assert content.pop("base") == "miniature.yaml"
        default = {"table4/pt": {"losses": {"stages": ["pt"]}}, "table5/n8": {"model": {"num_task_tokens": 8}}}
        assert content == ({} if row in default else table_rows()[row].overrides), arm.name
        assert default.get(row, table_rows()[row].overrides) == table_rows()[row].overrides
    assert {arm.recipe for arm in arms.values()} | {arms["single"].recipe.with_name("miniature.yaml")} == set(
        arms["single"].recipe.parent.iterdir()
    )


def test_layers_are_the_papers_scaled(module):
    ours = load_recipe(str(module("miniature.arms").ARMS["distilled"].recipe), ["--train.output_dir=x"], "pt")
    theirs = load_recipe("llama3-8b-clip-l", ["--train.output_dir=x"], "pt")
    assert {name: task.layers for name, task in ours.tasks.items()} == {
        name: [round(layer * 6 / 32) for layer in task.layers] for name, task in theirs.tasks.items()
    }
    assert (ours.losses, ours.model.order, ours.model.num_task_tokens) == (
        theirs.losses, theirs.model.order, theirs.model.num_task_tokens
    )  # fmt: skip


def test_every_step_parses_and_comes_behind_what_it_needs(module, tmp_path):
    steps, forms = module("miniature.steps"), module("miniature.forms").FORMS
    full = steps.plan(tmp_path, forms["full"], forms["full"].arms, range(5))
    # 1 world, 5 models, 2 extractions; of 10 arms and 5 seeds 2 stages and answers; of 2 arms probes and their scores
    assert len(full) == 1 + 5 + 2 + 10 * 5 * (2 + 1) + 2 * 5 * (2 * 2) + 1
    assert len({step.name for step in full}) == len(full)
    seen: set[str] = set()
    for step in full:
        assert seen.issuperset(step.needs), step.name
        seen.add(step.name)
        assert not step.done()
    parsers = {
        "olavlm-extract": extract, "olavlm-probe": probe, "olavlm-eval": evaluate, "olavlm-report": report
    }  # fmt: skip
    kinds = set()
    for step in full:
        command, words = words_of(step.line)
        kinds.add(command)
        if command == "olavlm-train" and "seed 4" in step.name:  # each recipe once: it takes a tenth of a second
            recipe = load_recipe(words[2], words[3:], words[0])
            assert recipe.train.output_dir == f"runs/{Path(words[2]).stem}/seed-{recipe.train.seed}/{words[0]}"
            assert recipe.init.from_ in (None, recipe.train.output_dir.replace("/ift", "/pt"))
            assert (recipe.init.from_ is None) == (words[0] == "pt")
        elif command in parsers:
            parsers[command].arguments().parse_args(words)
    assert kinds == {"benchmarks.miniature", "olavlm-train", *parsers}


def test_quick_is_figure_3_of_depth_with_three_seeds(module, tmp_path):
    quick = module("miniature.forms").FORMS["quick"]
    assert (quick.arms, quick.seeds, quick.tasks, quick.probe_tasks) == (
        ("single", "distilled"), 3, ("depth",), ("depth",)
    )  # fmt: skip
    lines = [words_of(step.line) for step in module("miniature.steps").plan(tmp_path, quick, quick.arms, [0])]
    extracted = [words[words.index("--teacher") + 1] for command, words in lines if command == "olavlm-extract"]
    assert extracted == ["depth=models/depth"] * 2
    recipes = [load_recipe(words[2], words[3:], words[0]) for command, words in lines if command == "olavlm-train"]
    assert [(recipe.model.order, list(recipe.tasks), recipe.losses.stages) for recipe in recipes] == [
        *[(["depth"], [], [])] * 2, *[(["depth"], ["depth"], ["pt"])] * 2
    ]  # fmt: skip
    assert not any(command == "olavlm-eval" for command, _ in lines)


def test_what_is_measured_can_be_chosen(module, tmp_path):
    run, steps = module("miniature.run"), module("miniature.steps")
    arguments = argparse.ArgumentParser()
    run.add_arguments(arguments)
    counts = {}
    for measured in (["answers"], ["answers", "probes"]):
        args = arguments.parse_args(["--form", "full", "--arms", "single", "n4", "--measure", *measured])
        form, arms, seeds = run.chosen(args)
        run.check_form(tmp_path, form)  # which may be added to
        kinds = collections.Counter(step.kind for step in steps.plan(tmp_path, form, arms, seeds))
        counts[tuple(measured)] = kinds["answers"], kinds["pt probes"], kinds["ift probed"], kinds["report"]
    assert counts == {("answers",): (10, 0, 0, 1), ("answers", "probes"): (10, 5, 5, 1)}
    with pytest.raises(run.RunError, match="n4: trained, and not probed as figure 3 is; add --measure answers"):
        run.chosen(arguments.parse_args(["--form", "full", "--arms", "single", "n4", "--measure", "probes"]))
    form, arms, seeds = run.chosen(arguments.parse_args(["--form", "full", "--arms", "single", "--measure", "probes"]))
    kinds = collections.Counter(step.kind for step in steps.plan(tmp_path, form, arms, seeds))
    assert (kinds["answers"], kinds["pt probes"], kinds["ift probed"]) == (0, 5, 5)


def test_another_language_model(module, tiny, tmp_path):
    """The paper's rates and layers, scaled to its blocks; the world's own model is neither trained nor needed."""
    run, steps = module("miniature.run"), module("miniature.steps")
    arguments = argparse.ArgumentParser()
    run.add_arguments(arguments)
    form, arms, _ = run.chosen(arguments.parse_args(["--form", "full", "--llm", str(tiny["llm"])]))
    blocks = json.loads((tiny["llm"] / "config.json").read_text())["num_hidden_layers"]
    assert (form.llm, form.blocks) == (str(tiny["llm"]), blocks)
    planned = steps.plan(tmp_path, form, arms, [0])
    seen: set[str] = set()
    for step in planned:
        assert seen.issuperset(step.needs), step.name
        seen.add(step.name)
    assert "model llm" not in seen
    for step in planned:
        command, words = words_of(step.line)
        if command == "olavlm-train":
            recipe = load_recipe(words[2], words[3:], words[0])
            assert (recipe.model.llm, recipe.train.lr) == (form.llm, 1e-3 if words[0] == "pt" else 2e-5)
            for name, task in recipe.tasks.items():
                theirs = load_recipe("llama3-8b-clip-l", [], "pt").tasks[name]
                assert task.layers == [round(layer * blocks / 32) for layer in theirs.layers]
    run.check_form(tmp_path, form)
    with pytest.raises(run.RunError, match="holds a run with name full, not quick"):
        run.check_form(tmp_path, module("miniature.forms").FORMS["quick"])
    elsewhere = dataclasses.replace(form, llm="elsewhere")
    with pytest.raises(run.RunError, match=f"holds a run with llm {form.llm}, not elsewhere"):
        run.check_form(tmp_path, elsewhere)
    with pytest.raises(run.RunError, match="--llm nowhere: no language model can be read there"):
        run.chosen(arguments.parse_args(["--llm", "nowhere"]))


FAKE = '''
"""Commands that note that they were called, and do what their first word says."""
import os, signal, sys
from pathlib import Path

def main(argv):
    what, name = argv[:2]
    print("says", name)
    with open("calls", "a") as file:
        file.write(name + "\\n")
    if what == "dies-once" and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fails":
        sys.exit(3)
    if what == "hangs":
        Path("pid").write_text(str(os.getpid()))
        signal.pause()
    if what != "forgets":
        Path(name).touch()
    return 0
'''


@pytest.fixture
def fake(module, tmp_path, monkeypatch):
    """fake(steps of (name, what, needs, ...)) -> None: runs them in tmp_path / "run" on two workers."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "fake_commands.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setitem(module("miniature.workers").MODULES, "fake", "fake_commands")
    root = tmp_path / "run"
    root.mkdir()
    step = module("miniature.steps").Step

    def run(*rows) -> None:
        steps = [
            step(name, "fake", (what, name), tuple(needs), (root / name).is_file, what == "alone")
            for name, what, *needs in rows
        ]
        module("miniature.run").execute(root, steps, 2)

    return run


def test_a_run_goes_on_where_it_died(module, fake, tmp_path, capsys):
    root, rows = tmp_path / "run", [("a", "works"), ("b", "dies-once", "a"), ("c", "alone", "b"), ("d", "works", "c")]
    with pytest.raises(module("miniature.run").RunError, match="b died"):
        fake(*rows)
    assert (root / "calls").read_text().split() == ["a", "b"]
    fake(*rows)
    assert (root / "calls").read_text().split() == ["a", "b", "b", "c", "d"]  # what was done is not done again
    fake(*rows)
    assert "4 steps, 4 of them done" in capsys.readouterr().out
    assert (root / "calls").read_text().split() == ["a", "b", "b", "c", "d"]
    journal = module("miniature.run").Journal(root)
    assert [step["name"] for step in journal.steps()] == ["a", "b", "c", "d"]
    runs = journal.runs()
    assert [run["steps"] for run in runs] == [1, 3, 0]
    assert all(run["seconds"] > 0 and run["workers"] == 2 and run["machine"]["cores"] for run in runs)
    with journal.file.open("a") as file:
        file.write('{"step": {"na')  # a kill in the middle of a line
    assert len(journal.steps()) == 4


def test_a_run_that_was_killed_counts_until_its_last_step(module, tmp_path):
    journal = module("miniature.run").Journal(tmp_path)
    for line in (
        {"began": {"began": 100.0, "workers": 2, "machine": {"commit": "a"}}},
        {"step": {"name": "x", "kind": "x", "seconds": 50, "ended": 160.0}},
        {"began": {"began": 1000.0, "workers": 2, "machine": {"commit": "b"}}},
        {"step": {"name": "y", "kind": "y", "seconds": 7, "ended": 1007.0}},
        {"run": {"began": 1000.0, "seconds": 9.0}},
        {"began": {"began": 2000.0, "workers": 2, "machine": {"commit": "c"}}},
    ):
        journal.add(line)
    assert [(run["seconds"], run["steps"]) for run in journal.runs()] == [(60, 1), (9, 1), (0, 0)]


@pytest.mark.parametrize(("what", "said"), [("fails", "ended with status 3"), ("forgets", "left something undone")])
def test_a_step_that_fails_ends_the_run_with_its_log_and_command(module, fake, what, said):
    with pytest.raises(module("miniature.run").RunError) as error:
        fake(("it/of seed", what))
    assert said in str(error.value)
    assert "says it/of seed" in str(error.value)
    assert f"fake {what} 'it/of seed'" in str(error.value)


def test_workers_die_with_the_run(fake, tmp_path):
    """Killed in the middle, it leaves nobody at work in the folder."""
    root = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from benchmarks.miniature import run, workers, steps\n"
        "workers.MODULES['fake'] = 'fake_commands'\n"
        "root = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    run.execute(root, [steps.Step('it', 'fake', ('hangs', 'it'), (), (root / 'it').is_file)], 1)\n"
    )
    (tmp_path / "main.py").write_text(code)
    paths = os.pathsep.join([str(ROOT), str(tmp_path / "code")])
    runner = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", root], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE
    )
    while not (root / "pid").exists() or not (root / "pid").read_text():
        assert runner.poll() is None
    worker = os.pidfd_open(int((root / "pid").read_text()))
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    assert select.select([worker], [], [], 20)[0], "the worker lives on"
    os.close(worker)


def test_a_folder_is_of_one_form_and_one_run(module, tmp_path):
    run, forms = module("miniature.run"), module("miniature.forms").FORMS
    run.check_form(tmp_path, forms["quick"])
    run.check_form(tmp_path, forms["quick"])
    with pytest.raises(run.RunError, match=r"holds a run with name quick, not full.*--dir"):
        run.check_form(tmp_path, forms["full"])
    with run._held(tmp_path), pytest.raises(run.RunError, match="another run"), run._held(tmp_path):
        pass
    arguments = argparse.ArgumentParser()
    run.add_arguments(arguments)
    form, arms, seeds = run.chosen(arguments.parse_args(["--arms", "distilled", "single", "--seeds", "2"]))
    assert (form.name, arms, seeds) == ("quick", ["single", "distilled"], [0, 1])
    assert run.chosen(arguments.parse_args(["--seeds", "2", "--first-seed", "3"]))[2] == [3, 4]
    for words in (["--seeds", "0"], ["--first-seed", "-1"], ["--workers", "0"]):
        with pytest.raises(run.RunError, match=" ".join(words)):
            run.chosen(arguments.parse_args(words))


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


def test_the_base_encoder_tells_places_and_is_scaled_exactly(module):
    """Places differ by row and column; scaling changes the size of features, and nothing that the blocks make of it."""
    architectures, scales = module("miniature.architectures"), module("miniature.scales")
    waves = architectures.waves(96).view(8, 8, 96)
    assert torch.equal(waves[2, 3, :48], waves[2, 7, :48])  # rows
    assert torch.equal(waves[2, 3, 48:], waves[5, 3, 48:])  # columns
    assert torch.cdist(waves.flatten(0, 1), waves.flatten(0, 1)).fill_diagonal_(9).min() > 0.5
    torch.manual_seed(0)
    model, pictures = architectures.base_encoder().eval(), torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2  # as training does
        before = model(pictures, output_hidden_states=True).hidden_states
        scales.at_unit_scale(model, pictures)
        after = model(pictures, output_hidden_states=True).hidden_states
    assert after[-2][:, 1:].square().mean() == pytest.approx(1, abs=1e-3)
    assert before[-2].square().mean() > 2
    alike = torch.cosine_similarity(before[-1].flatten(1), after[-1].flatten(1))
    assert alike.min() > 0.9999  # but for the normalisations' epsilon
    ratios = [float(states.norm() / scaled.norm()) for states, scaled in zip(before[-2:], after[-2:], strict=True)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01)


def test_models_of_the_same_efforts_are_lent(module, tmp_path):
    run, forms, models = module("miniature.run"), module("miniature.forms").FORMS, module("miniature.models")
    efforts = models.SIZES["standard"].efforts
    for name, steps in (
        ("depth", efforts["depth"].steps),
        ("gen", efforts["gen"].steps + 1),
    ):  # gen is of other efforts
        (tmp_path / "trained" / name).mkdir(parents=True)
        trained = {"size": "standard", "seed": 0, **dataclasses.asdict(efforts[name]), "steps": steps}
        (tmp_path / "trained" / name / "miniature.json").write_text(json.dumps({"trained": trained}))
    ready = {name: tmp_path / "trained" / name for name in models.NAMES}
    assert run.lend_models(tmp_path / "run", forms["quick"], ready) == ["depth"]
    assert [file.name for file in (tmp_path / "run" / "models").iterdir()] == ["depth"]
    assert run.lend_models(tmp_path / "run", forms["quick"], ready) == []  # a folder is left alone
    assert run.lend_models(tmp_path / "other", forms["full"], ready) == ["depth"]
    assert run.lend_models(tmp_path / "toy", forms["toy"], ready) == []
    with pytest.raises(run.RunError, match=r"--train-models: .*depth came ready; name a new folder with --dir"):
        run.refuse_lent(tmp_path / "run", ready)
    run.refuse_lent(tmp_path / "toy", ready)


def test_a_model_is_lent_whole_or_not_at_all(module, tmp_path, monkeypatch):
    """A folder with a record counts as a model that is done, and its record may be the first file to be copied."""
    run, quick = module("miniature.run"), module("miniature.forms").FORMS["quick"]
    copied = run.shutil.copytree

    def killed(source, target):
        target.mkdir(parents=True)
        run.shutil.copy(source / "miniature.json", target)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.shutil, "copytree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.lend_models(tmp_path, quick)
    monkeypatch.setattr(run.shutil, "copytree", copied)
    names = module("miniature.models").NAMES
    assert set(run.lend_models(tmp_path, quick)) == set(names)
    assert {path.name for path in (tmp_path / "models").iterdir()} == set(names)


def test_a_model_of_the_hub_is_fetched_ahead_of_workers_that_are_offline(module, tiny, monkeypatch):
    run, asked = module("miniature.run"), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **_: asked.append(model))
    run.fetch_llm(str(tiny["llm"]))
    run.fetch_llm("somebody/a-model")
    assert asked == ["somebody/a-model"]

    def offline(model: str, **_):
        raise OSError("no way there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(run.RunError, match="--llm somebody/a-model: it cannot be fetched: no way there"):
        run.fetch_llm("somebody/a-model")


def test_a_report_is_made_again_when_a_run_ended_behind_it(module, tmp_path):
    steps, toy = module("miniature.steps"), module("miniature.forms").FORMS["toy"]
    *_, report = steps.plan(tmp_path, toy, ["single"], [0])
    assert report.name == "report"
    ends = [tmp_path / "runs/single/seed-0" / stage / end
            for stage in ("pt", "ift") for end in ("stage.json", "probes/eval/scores.json")]  # fmt: skip
    for end in ends:
        end.parent.mkdir(parents=True, exist_ok=True)
        end.touch()
        os.utime(end, (100, 100))
    (tmp_path / "report.html").touch()
    assert report.done()
    os.utime(ends[-1], (2e9, 2e9))
    assert not report.done()
    ends[-1].unlink()
    assert not report.done()


@pytest.mark.parametrize("form", ["quick", "full"])
def test_every_model_of_a_run_comes_trained(form, module, tmp_path):
    """By the efforts that stand in the code: a change of these is a reason to train anew."""
    run, forms, names = module("miniature.run"), module("miniature.forms").FORMS, module("miniature.models").NAMES
    assert set(run.lend_models(tmp_path, forms[form])) == set(names)
    assert all((tmp_path / "models" / name / "model.safetensors").is_file() for name in names)


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
        (run([0, 1, 2], arms=("distilled",)), "seeds 0, 1 are there already.* with all the arms"),
        (run([2, 3], have=1), "of 2 and 2 seeds 2 and 1 are there"),
        (run([2], arms=("single encoder", "distilled", "n4")), "run the same arms"),
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
    over = {"distilled": "single encoder"}
    worse = {"single encoder": {"Depth": [60.0, 61.0, 62.0], "Overall": [5.0, 6.0, 5.0]},
             "distilled": {"Depth": [50.0, 50.5, 52.0], "Overall": [6.0, 5.0, 5.5]}}  # fmt: skip
    (sentence,) = module("miniature.findings").findings({"table 1": [seeds("t", worse, over, 1)]}, 6)
    assert sentence.endswith("That is fewer in Depth.")
    alike = {arm: {"Depth": columns["Overall"]} for arm, columns in worse.items()}
    (sentence,) = module("miniature.findings").findings({"table 1": [seeds("t", alike, over, 1)]}, 6)
    assert sentence.endswith("That is no difference that these seeds can tell from none.")


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


@pytest.fixture(scope="module")
def prepared(module, tmp_path_factory):
    """A run's folder with the small world, models that learned next to nothing, and features extracted without Ray."""
    root = tmp_path_factory.mktemp("miniature")
    write = module("miniature.write")
    write.write_world(root / "world", write.WorldSettings(48, 48, 0))
    module("miniature.models").make_models(root / "models", "toy", 0)
    teachers = {name: str(root / "models" / name) for name in ("depth", "gen", "seg")}
    builder = StoreBuilder(root / "features")
    builder.extend_plan(Dataset([root / "world/pt.json", root / "world/held_out.json"]).images())
    specs = [TeacherSpec(name, name, folder) for name, folder in teachers.items()]
    specs.append(TeacherSpec("depth-last", "depth", teachers["depth"], recipe="last"))
    for spec in specs:
        builder.ensure_teacher(spec.key, spec.load("cpu").card.to_dict(), dtype="float16", shard_rows=48)
    worker = ShardExtractor(
        str(root / "features"), specs, [str(root / "world/images")], batch_size=16, device="cpu", threads=2
    )
    worker.load()
    for spec in specs:
        held_out_too = spec.name == "depth"  # the others take long, and held-out pictures are probed for depth alone
        tasks = pending(FeatureStore(root / "features")[spec.key], None if held_out_too else 48)
        assert {r.outcome for r in worker.extract(tasks)} == {"committed"}
    return root


def test_the_products_commands_do_the_steps(module, prepared):
    """One arm and seed, with real workers, from features to the page: the smallest there is."""
    run, forms, steps = module("miniature.run"), module("miniature.forms").FORMS, module("miniature.steps")
    listed = steps.plan(prepared, forms["toy"], ["distilled"], [0])
    undone = [step for step in listed if not step.name.startswith("features")]
    assert [step.name.split()[0] for step in undone if step.done()] == ["world", *["model"] * 5]
    known = {step.name for step in undone}
    undone = [
        module("miniature.steps").Step(s.name, s.command, s.words, tuple(known & {*s.needs}), s.done, s.alone)
        for s in undone
    ]
    run.execute(prepared, undone, 1)
    run.publish(prepared, forms["toy"], ["distilled"], [0], [step.line for step in listed], None)
    found = json.loads((prepared / "results.json").read_text())
    assert [figure["title"].split(",")[0] for figure in found["figures"]["figure 3"]] == [
        "Probes of depth after PT", "Probes of depth after IFT"
    ]  # fmt: skip
    for figure in found["figures"]["figure 3"]:
        assert list(figure["values"]["distilled"]) == [f"layer {n}" for n in range(1, 7)]
        assert all(-1 <= value <= 1 for values in figure["values"]["distilled"].values() for value in values)
    html = (prepared / "index.html").read_text()
    assert html.count("<img") == 4 * (1 + 3 + 2 * 6)  # a photograph, the truth, the teacher twice, two stages' layers
    assert "olavlm-eval" in html
    assert (prepared / "runs/distilled/seed-0/ift/benchmarks/scores.json").is_file()
