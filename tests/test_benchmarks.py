"""The benchmarks run, their arithmetic is right, wrong bytes end them, and README.md's tables are the results'."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "benchmarks" / "cache"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """module(name) -> `benchmarks.name`; benchmarks are no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return load


def test_the_tables_are_those_of_the_results(module):
    assert (CACHE / "README.md").read_text() == module("cache.readme").rendered(CACHE)


def test_results_are_small():
    assert all(file.stat().st_size < 1e6 for file in CACHE.glob("results/*"))


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """All benchmarks at toy size; the folder that they wrote results and tables to."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(CACHE / "README.md", folder)
    (folder / "work").mkdir()
    options = ["--size", "toy", "--dir", folder / "work", "--name", "toy", "--results", folder]
    subprocess.run([sys.executable, "-m", "benchmarks.cache", *map(str, options)], cwd=ROOT, check=True)
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
    assert (toy_run / "README.md").read_text() == module("cache.readme").rendered(toy_run)
    assert "## Results: toy" in (toy_run / "README.md").read_text()
    assert list((toy_run / "work").iterdir()) == []


def test_ratios_are_of_the_same_round(module):
    comparison = module("cache.figures").Comparison(
        title="t", rows=10, bytes=4_000_000, floor="f", seconds={"f": [1.0, 2.0, 4.0], "a": [2.0, 2.0, 2.0]}
    )
    assert comparison.ratios("a") == [0.5, 1.0, 2.0]
    assert comparison.markdown().splitlines()[-2:] == ["| f | 2 | 200 | 1 |", "| a | 2 | 200 | 1 (0.5..2) |"]


def test_figures_survive_json(module):
    figures = module("cache.figures")
    measured = figures.Measurement("m", {"s": {"all s": [1.0, 3.0, 2.0]}}, rows={"s": 500_000}, limits={"all s": 5.0})
    (back,) = figures.from_json(json.loads(json.dumps(figures.to_json([measured]))))
    assert back == measured
    assert back.markdown().splitlines()[-2:] == ["| s | 2 (1..3) | 4 |", "| must stay below | 5 |"]


def test_arms_take_turns(module):
    order = []
    arms = {name: lambda k, name=name: order.append(f"{name}{k}") or float(k) for name in "ab"}
    assert module("rounds").alternate(arms, 2) == {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]


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
