"""The miniature's experiments: its recipes are the paper's, its steps are commands that parse, come in order and go on
after a death."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from olavlm.cache import Dataset, FeatureStore, StoreBuilder, pending
from olavlm.pipelines import evaluate, extract, probe, report
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.student.recipes import load_recipe, table_rows

ROOT = Path(__file__).parents[2]


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
    with pytest.raises(run.UsageError, match="n4: trained, and not probed as figure 3 is; add --measure answers"):
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
    fake(*rows)
    assert [run["steps"] for run in journal.runs()] == [1, 3, 0, 0]  # what came behind it is there


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
def test_a_step_that_fails_ends_the_run_with_its_log_and_command(module, fake, what, said, capsys):
    with pytest.raises(module("miniature.run").RunError) as error:
        fake(("it/of seed", what))
    assert said in str(error.value)
    assert "says it/of seed" in capsys.readouterr().err
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
    assert run.chosen(arguments.parse_args(["--measure", "probes", "probes"]))[0].measured == ("probes",)


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
    assert html.count("<img") == 4 * (1 + 4 + 2 * 6)  # a photograph, truth, teacher twice, its mean, two stages' layers
    assert "olavlm-eval" in html
    assert (prepared / "runs/distilled/seed-0/ift/benchmarks/scores.json").is_file()
