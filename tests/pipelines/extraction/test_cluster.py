"""Extractions on a cluster of several Ray nodes of this machine: killed at random, stopped, left by their driver."""

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from olavlm.cache import Dataset, FeatureStore, StoreBuilder, pending
from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.extract import main
from olavlm.pipelines.extraction import cluster
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.pipelines.extraction.places import Job, Place, find_places
from olavlm.pipelines.extraction.summary import Tally

ROOT = Path(__file__).parents[3]
ROWS = 240
SECONDS = 400  # that anything here may take; workers on a loaded machine had 6 of 120 to load in
NICENESS = "RAY_worker_niceness"
pytestmark = pytest.mark.timeout(900)


def node(name: str, alive: bool = True, **resources: float) -> dict:
    """As `ray.nodes()` tells of one."""
    return {"Alive": alive, "NodeID": name, "NodeManagerHostname": f"host-{name}", "Resources": resources}


@pytest.mark.parametrize("error", [Exception, ConnectionError, RuntimeError])
def test_a_ray_that_does_not_start_is_told_of_in_one_line(error, monkeypatch):
    def init(*args, **kwargs):
        raise error("the node timed out during startup\nand more")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(JobFailed, match=r"^a Ray of this machine cannot be used: .*the node timed out"):
        cluster.connect(None)


@pytest.mark.parametrize(("set_before", "expected"), [(None, "0"), ("10", "10")])
def test_workers_of_a_ray_of_ones_own_yield_to_nobody_unless_told_to(set_before, expected, monkeypatch):
    started_with = []
    monkeypatch.setenv(NICENESS, set_before or "")
    if set_before is None:
        monkeypatch.delenv(NICENESS)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: started_with.append(os.environ[NICENESS]))
    cluster.connect(None)
    assert started_with == [expected]


class TestPlaces:
    def job(self, **options) -> Job:
        return Job(store="store", images=["images"], specs=[], batch_size=4, **options)

    def test_machines_need_not_be_alike(self):
        nodes = [node("a", CPU=32.0, GPU=4.0), node("b", CPU=9.0, GPU=2.0), node("head", CPU=0.0), node("c", CPU=64.0),
                 node("dead", alive=False, CPU=8.0, GPU=8.0)]  # fmt: skip
        assert find_places(nodes, self.job(), "cuda") == [
            Place("a", "host-a", 4, 1, 8.0),
            Place("b", "host-b", 2, 1, 4.0),
        ]
        assert [(p.node, p.slots, p.cpus) for p in find_places(nodes, self.job(), "cpu")] == [
            ("a", 32, 1.0),
            ("b", 9, 1.0),
            ("c", 64, 1.0),
        ]

    def test_what_a_worker_is_to_have(self):
        nodes = [node("a", CPU=32.0, GPU=4.0), node("b", CPU=3.0, GPU=1.0)]
        shared = find_places(nodes, self.job(worker_gpus=0.4), "cuda")
        assert [(p.slots, p.gpus, p.cpus) for p in shared] == [(8, 0.4, 4.0), (2, 0.4, 1.0)], "two fit on one GPU"
        assert [(p.node, p.slots) for p in find_places(nodes, self.job(worker_cpus=4), "cuda")] == [("a", 4)]
        assert [(p.node, p.slots) for p in find_places(nodes, self.job(worker_cpus=12), "cuda")] == [("a", 2)]
        assert [p.slots for p in find_places(nodes, self.job(worker_cpus=2), "cpu")] == [16, 1]
        assert find_places(nodes, self.job(worker_cpus=33), "cpu") == []

    @pytest.mark.parametrize(
        ("cpus", "workers", "slots", "share"),
        [
            ([2.0], 2, [2], 1.0),
            ([2.0], 3, [3], 0.6666),
            ([2.0, 1.0], 4, [3, 1], 0.6666),
            ([1.0, 1.0], 1, [1, 1], 1.0),
            ([2.0], 20_001, [2], 1.0),
        ],  # more than Ray can count
    )
    def test_more_cpu_workers_than_cpus_share_them(self, cpus, workers, slots, share):
        places = find_places([node(str(i), CPU=c) for i, c in enumerate(cpus)], self.job(workers=workers), "cpu")
        assert [p.slots for p in places] == slots
        assert {p.cpus for p in places} == {share}

    def test_a_node_without_cpus_to_share_still_has_its_gpus(self):
        assert find_places([node("a", CPU=0.0, GPU=1.0)], self.job(), "cuda") == [Place("a", "host-a", 1, 1, 0.0)]


@pytest.fixture(scope="module")
def kills():
    """The module `benchmarks.extract.kills`; benchmarks are no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.extract.kills")


@pytest.fixture(scope="module")
def site(kills, tiny, tmp_path_factory):
    return kills.Site(tmp_path_factory.mktemp("site"), ROWS, tiny)


@pytest.fixture(scope="module")
def nodes(kills):
    """A cluster of two nodes, of one CPU each."""
    with kills.cluster(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def quiet(kills, site, tmp_path_factory) -> dict[str, bytes]:
    """What an extraction without Ray gives."""
    store = tmp_path_factory.mktemp("quiet") / "store"
    builder, specs = StoreBuilder(store), [TeacherSpec(k, k, str(site.checkpoints[k])) for k in kills.TEACHERS]
    builder.extend_plan(Dataset([site.folder / "data.json"]).images())
    worker = ShardExtractor(str(store), specs, [str(site.folder / "images")], batch_size=4, device="cpu", threads=1)
    worker.load()
    for spec in specs:
        group = builder.ensure_teacher(spec.key, spec.load("cpu").card.to_dict(), dtype="float16", shard_rows=4)
        assert {result.outcome for result in worker.extract(pending(group))} == {"committed"}
    return kills.shard_bytes(store)


def wait_for_rows(kills, number: int, store: Path, driver: subprocess.Popen, nodes) -> None:
    """Until so many are committed, which is done by workers and said by nobody: the store is asked again and again."""
    deadline = time.monotonic() + SECONDS
    while (rows := kills.committed_rows(store)) < number:
        if time.monotonic() > deadline or driver.poll() is not None:
            pytest.fail(f"{rows} of {number} rows. {account_of(driver, nodes)}")
        time.sleep(0.05)


def end_of(driver: subprocess.Popen, nodes) -> str:
    """What it said on stderr; it ends by itself."""
    try:
        return driver.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        pytest.fail(f"it does not end. {account_of(driver, nodes)}")


def account_of(driver: subprocess.Popen, nodes) -> str:
    """Why an extraction makes no progress, from all who could know; `driver` is stopped."""
    parts = [f"status {driver.poll()}", nodes.account()]
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.terminate()
        driver.wait(30)
    driver.kill()
    return "\n".join([*parts, "the driver's last words:", driver.communicate()[1]])


def test_killed_at_random_it_ends_with_the_bytes_of_a_quiet_run(kills, site, nodes, quiet):
    seed = str(random.randrange(2**32))
    print(f"seed {seed}")
    outcome = kills.run(site, nodes, quiet, seed, 2, pause=(0.2, 1.5))
    assert outcome.sound, outcome
    assert outcome.kills, "it ended before anybody was killed"


def test_the_control_without_retries_something_is_lost(kills, site, nodes, quiet):
    early = {"pause": (0.2, 1.5), "kinds": ("worker killed",)}  # before all rows are there
    # Several, for the first may hit a worker that has nothing at hand.
    outcome = kills.run(site, nodes, quiet, "0", 4, **early, program=kills.WITHOUT_RETRIES)
    assert outcome.status == 1
    assert outcome.rows_lost > 0
    assert "shards given up: " in outcome.said
    assert (outcome.left, outcome.shards_twice) == ([], 0)


def test_the_committed_thirty_kills_lost_nothing_and_the_control_did(kills):
    results = json.loads(kills.RESULTS.read_text())
    assert results["kills"] == sum(results["kinds"].values()) >= 30
    assert min(results["kinds"].values()) > 0
    assert all(kills.Outcome(**run).sound for run in results["runs"])
    assert (results["rows_lost"], results["shards_twice"], results["not_ended"]) == (0, 0, 0)
    assert results["control"]["rows_lost"] > 0


def test_workers_do_not_outlive_a_driver_that_was_killed(kills, site, nodes, quiet, tmp_path):
    driver = site.start(tmp_path / "store", "--address", nodes.address)
    wait_for_rows(kills, 20, tmp_path / "store", driver, nodes)
    workers = nodes.workers()
    assert workers
    assert {worker.nice() for worker in workers} == {os.nice(0)}, "beside other tests they would hardly run"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=SECONDS)
    assert not alive
    assert 20 <= kills.committed_rows(tmp_path / "store") < 2 * ROWS, "the control: it was killed half-way"
    again = site.start(tmp_path / "store", "--address", nodes.address)
    errors = end_of(again, nodes)
    assert again.returncode == 0, errors
    assert kills.shard_bytes(tmp_path / "store") == quiet
    runs = [json.loads(f.read_text()) for f in sorted((tmp_path / "store" / "runs").glob("*.json"))]
    assert [run["outcome"] for run in runs] == ["running", "done"]
    assert (runs[1]["cost"]["workers"], runs[1]["cost"]["nodes"], runs[1]["cost"]["deaths"]) == (2, 2, 0)


def test_control_c_reaches_the_whole_group_and_drops_what_is_in_flight(kills, site, nodes, tmp_path):
    driver = site.start(tmp_path / "store", "--address", nodes.address, start_new_session=True)
    wait_for_rows(kills, 20, tmp_path / "store", driver, nodes)
    workers = nodes.workers()
    os.killpg(driver.pid, signal.SIGINT)
    errors = end_of(driver, nodes)
    assert driver.returncode == 1
    assert "stopped by SIGINT" in errors
    assert "Traceback" not in errors
    assert not psutil.wait_procs(workers, timeout=SECONDS)[1]
    assert not [f for name in ("leases", "staging") for f in (tmp_path / "store").glob(f"*/{name}/[0-9]*")]
    (run,) = (json.loads(f.read_text()) for f in (tmp_path / "store" / "runs").glob("*.json"))
    assert run["outcome"] == "stopped by SIGINT"
    assert 4 * (run["cost"]["teachers"]["depth"]["shards"] + run["cost"]["teachers"]["gen"]["shards"]) <= (
        kills.committed_rows(tmp_path / "store")) < 2 * ROWS  # fmt: skip


def test_a_model_that_its_nodes_do_not_have_is_named(kills, site, nodes, quiet, tmp_path, monkeypatch):
    from olavlm.pipelines.extraction import scheduler

    monkeypatch.setattr(scheduler, "JOIN_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "STRIKES", 1)
    store, tally = tmp_path / "store", Tally()
    builder = StoreBuilder(store)
    builder.extend_plan(Dataset([site.folder / "data.json"]).images())
    here = TeacherSpec("gen", "gen", str(site.checkpoints["gen"]))
    group = builder.ensure_teacher("gen", here.load("cpu").card.to_dict(), dtype="float16")
    gone = TeacherSpec("gen", "gen", str(tmp_path / "not there"))
    job = Job(
        store=str(store),
        images=[str(site.folder / "images")],
        specs=[gone],
        batch_size=4,
        device="cpu",
        address=nodes.address,
        workers=1,
    )
    cluster.run_tasks(job, pending(group), tally)
    assert tally.broken_off.startswith("no worker could be started: worker ")
    assert "not there" in tally.broken_off
    assert FeatureStore(store)["gen"].coverage().covered == 0


def test_a_dry_run_counts_the_workers_of_the_cluster(site, nodes, tmp_path, capsys):
    assert main(site.arguments(tmp_path / "store", "--address", nodes.address, "--dry-run")) == 0
    assert "with 2 cpu workers, if its nodes are like this machine" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_a_cluster_that_is_not_there_is_one_line(site, tmp_path, capsys):
    assert main(site.arguments(tmp_path / "store", "--address", "127.0.0.1:9")) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("olavlm-extract: error: no Ray cluster answers at 127.0.0.1:9"), errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "store").exists()
