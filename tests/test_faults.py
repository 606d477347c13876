"""The fault table: it says what the results say, the results are good, and a quick run of every fault is as good."""

import copy
import json
import os
import subprocess
import sys

import pytest

from benchmarks.faults.catalogue import CATALOGUE
from benchmarks.faults.damages import DAMAGES
from benchmarks.faults.table import DOCUMENT, RESULTS, ROOT, complaints, render

LOSSES = ("wrong_values", "untrue_status", "zeros_by_zarr", "undone_commits", "lost_shards")


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text())


def test_the_table_is_of_the_results(results):
    assert DOCUMENT.read_text() == render(results), "make it anew with: python -m benchmarks.faults"


def test_the_results_are_of_every_fault_and_nothing_was_lost(results):
    assert [fault["name"] for fault in results["faults"]] == [entry.name for entry in CATALOGUE]
    assert list(results["damages"]) == list(DAMAGES)
    assert sum(count["tried"] for count in results["damages"].values()) >= 2000
    assert complaints(results) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_complained_of(results, loss):
    for i, fault in enumerate(results["faults"]):
        if "skipped" not in fault:
            spoilt = copy.deepcopy(results)
            spoilt["faults"][i][loss] = 1
            allowed = loss == "undone_commits" and fault["undone_allowed"]
            assert len(complaints(spoilt)) == (0 if allowed else 1), fault["name"]


def test_a_control_arm_without_a_loss_and_a_missed_damage_are_complained_of(results):
    for i, fault in enumerate(results["faults"]):
        if "skipped" not in fault:
            spoilt = copy.deepcopy(results)
            spoilt["faults"][i]["control"]["losing_times"] = 0
            assert len(complaints(spoilt)) == 1, fault["name"]
    for kind in results["damages"]:
        for change in ({"found_by_reading": 0}, {"found_by_verify": 0}, {"wrong_values": 1}):
            spoilt = copy.deepcopy(results)
            spoilt["damages"][kind].update(change)
            assert len(complaints(spoilt)) == 1, kind


@pytest.mark.skipif(sys.platform != "linux", reason="faults are made by Linux means")
def test_every_fault_a_few_times(tmp_path):
    """All protected arms lose nothing, all control arms lose something, every damage is found."""
    file = tmp_path / "results.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--quick", "--json", file], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    quick = json.loads(file.read_text())
    for fault in quick["faults"]:
        if "skipped" in fault:
            assert os.getuid() != 0 or "mounted" in fault["skipped"], fault
            continue
        assert fault["times"] == fault["bytes_equal"] >= 3, fault["name"]
        assert not any(fault[loss] for loss in LOSSES if loss != "undone_commits"), fault["name"]
        assert fault["control"]["losing_times"], fault["name"]
    for kind, count in quick["damages"].items():
        assert count["tried"] == count["found_by_reading"] == count["found_by_verify"] >= 1, kind
        assert count["wrong_values"] == 0, kind
