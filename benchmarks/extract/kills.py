"""Random kills while extractions run on a cluster of several Ray nodes of this machine.

    python -m benchmarks.extract.kills --kills 30 --seed 1       10 to 20 minutes on two cores; results/kills.json

Workers are killed and made to hang, nodes are killed with their workers or without, and new nodes join; more runs, each
into a store of its own, until so many kills have struck. Every run must end within its time limit with status 0 and
with the bytes of a quiet run: every row there, no shard committed twice, no lease left, no worker alive. The control
arm runs without retries, and must lose something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import psutil

from olavlm.cache import FeatureStore
from olavlm.cache.records import Record
from olavlm.teachers.tiny import make_tiny

from ..machine import describe

RESULTS = Path(__file__).parent / "results" / "kills.json"
TEACHERS = ("depth", "gen")
KINDS = ("worker killed", "worker hung", "node killed", "machine killed")
NODES = 3
PAUSE = (0.5, 6.0)  # seconds before the next kill
KILLS_A_RUN = (2, 4)  # fewer than lose a shard: it is given up after five
STALL = 15  # seconds; a hung worker is found after it
LIMIT = 300  # seconds a run
WITHOUT_RETRIES = (
    "import sys; from olavlm.pipelines import extract; from olavlm.pipelines.extraction import scheduler; "
    "scheduler.DEATHS = scheduler.FAILURES = 1; sys.exit(extract.main(sys.argv[1:]))"
)
_LOGS = ("gcs_server", "raylet", "python-core-driver", "python-core-worker", "worker")
_CONFIG = {
    "worker_niceness": 0,  # Ray's 15 would leave workers next to nothing beside whatever else runs in this session
    # That a node is gone is noticed in two seconds, not in fifteen:
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}


class Site:
    """Tiny teachers, a dataset of so many images, and what a quiet extraction of it gives."""

    def __init__(self, folder: Path, rows: int, checkpoints: dict[str, Path] | None = None) -> None:
        self.folder, self.checkpoints = folder, checkpoints or make_tiny(folder / "tiny")
        images = folder / "images"
        images.mkdir(parents=True)
        photographs = sorted(Path(str(files("olavlm.pipelines") / "sample" / "images")).glob("*.jpg"))
        for row in range(rows):
            shutil.copy(photographs[row % len(photographs)], images / f"{row:05d}.jpg")
        said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A photograph."}]
        samples = [{"id": f.stem, "image": f.name, "conversations": said} for f in sorted(images.iterdir())]
        (folder / "data.json").write_text(json.dumps(samples))
        self.rows = rows

    def arguments(self, store: Path, *more: object) -> list[str]:
        """Of an `olavlm-extract` into `store`."""
        teachers = [word for name in TEACHERS for word in ("--teacher", f"{name}={self.checkpoints[name]}")]
        fixed = ["--data", self.folder / "data.json", "--images", self.folder / "images", "--store", store]
        options = ["--shard-rows", 4, "--batch-size", 4, "--device", "cpu", "--stall", STALL]
        return [str(word) for word in (*teachers, *fixed, *options, *more)]

    def start(self, store: Path, *more: object, program: str | None = None, **options: object) -> subprocess.Popen:
        """An `olavlm-extract`, or a `program` that takes its arguments, as a process of its own."""
        how = ["-c", program] if program else ["-m", "olavlm.pipelines.extract"]
        return subprocess.Popen(
            [sys.executable, *how, *self.arguments(store, *more)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            **options,
        )  # fmt: skip


def shard_bytes(store: Path) -> dict[str, bytes]:
    """What two runs must agree on: plan segments, shard files, and records without host and timings."""
    files_of = (*store.glob("plan/*.parquet"), *store.glob("*/features/c/*/0/0"))
    records = {f: json.dumps(Record.read(f).comparable(), sort_keys=True) for f in store.glob("*/commits/[0-9]*.json")}
    found = {f: f.read_bytes() for f in files_of} | {f: text.encode() for f, text in records.items()}
    return {str(f.relative_to(store)): content for f, content in found.items()}


class Nodes:
    """A Ray cluster on this machine: a head without room for workers, and nodes with room for one each."""

    def __init__(self, number: int = NODES) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        self._ray = Cluster()
        self._small = {"object_store_memory": 80_000_000, "include_dashboard": False}
        self._small |= {"include_log_monitor": False, "no_monitor": True}  # processes that nobody here needs
        self._ray.add_node(num_cpus=0, _system_config=_CONFIG, **self._small)
        self.address, self.nodes = self._ray.address, []
        for _ in range(number):
            self.join()
        self._ray.wait_for_nodes()

    def join(self) -> None:
        self.nodes.append(self._ray.add_node(num_cpus=1, wait=False, **self._small))

    def workers(self) -> list[psutil.Process]:
        """The processes of actors, on any node."""
        return [p for node in self.nodes for p in _below(_raylet(node)) if _name(p) == "ray::_Actor"]

    def strike(self, kind: str, draw: random.Random) -> bool:
        """Do one of `KINDS` to somebody; False if there is nobody."""
        if kind.startswith("worker"):
            workers = self.workers()
            if workers:
                victim = draw.choice(workers)
                victim.kill() if kind == "worker killed" else victim.suspend()
            return bool(workers)
        node = draw.choice(self.nodes)
        victims = [_raylet(node)]
        # A worker that cannot run does not find out that its node is gone.
        victims += [p for p in _below(victims[0]) if kind == "machine killed" or p.status() == psutil.STATUS_STOPPED]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes.remove(node)
        self._ray.remove_node(node, allow_graceful=False)
        self.join()
        return True

    def account(self) -> str:
        """For who waits in vain: nodes, resources and actors as Ray sees them, processes as the machine does, and the
        ends of Ray's logs."""
        import ray
        from ray._private.state import actors  # the public listing asks a dashboard, which this cluster has none of

        ray.init(self.address, log_to_driver=False, logging_level="ERROR")
        try:
            told = [*ray.nodes(), ray.available_resources(), *actors().values()]
        finally:
            ray.shutdown()
        for process in (p for node in self.nodes for p in (_raylet(node), *_below(_raylet(node)))):
            with contextlib.suppress(psutil.NoSuchProcess):
                told.append(process.as_dict(["pid", "name", "status", "nice", "num_threads", "cpu_times"]))
        logs = Path(self._ray.head_node.get_logs_dir_path())
        latest = [log for kind in _LOGS for log in sorted(logs.glob(f"{kind}*"), key=lambda f: f.stat().st_mtime)[-3:]]
        return "\n".join([f"load {os.getloadavg()}", *map(str, told), *map(_end_of, latest)])

    def close(self) -> None:
        self._ray.shutdown()


def _end_of(log: Path) -> str:
    """Its last messages, without the tables of statistics that Ray writes between them."""
    lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.startswith("[2")]
    return "\n  ".join([log.name, *[line for line in lines if "stats" not in line][-12:]])


def _raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@contextlib.contextmanager
def cluster(number: int = NODES) -> Iterator[Nodes]:
    nodes = Nodes(number)
    try:
        yield nodes
    finally:
        nodes.close()


@dataclass
class Outcome:
    """Of one run."""

    seed: str
    kills: list[dict] = field(default_factory=list)
    """Each with the seconds since the run began, the kind, and how many rows were committed."""
    seconds: float = 0.0
    status: int | None = None
    """None: it did not end within the limit, and was killed."""
    rows_lost: int = 0
    shards_twice: int = 0
    identical: bool = False
    left: list[str] = field(default_factory=list)
    """Leases, staged files and workers that outlived the run."""
    garbage: int = 0
    """Private files of writers that were killed while they published; `olavlm-cache gc` removes them."""
    cost: dict = field(default_factory=dict)
    """Deaths and retries that the run put on record."""
    said: str = ""
    """Its last words, if it failed."""

    @property
    def sound(self) -> bool:
        clean = not (self.rows_lost or self.shards_twice or self.left)
        return self.status == 0 and self.identical and clean


def run(
    site: Site,
    nodes: Nodes,
    quiet: dict[str, bytes],
    seed: str,
    kills: int,
    *,
    kinds: Sequence[str] = KINDS,
    pause: tuple[float, float] = PAUSE,
    program: str | None = None,
) -> Outcome:
    """One extraction with so many kills, if it lasts so long."""
    draw, outcome, store = random.Random(seed), Outcome(seed), site.folder / f"store {seed}"
    began = time.monotonic()
    driver = site.start(store, "--address", nodes.address, program=program)
    while driver.poll() is None and len(outcome.kills) < kills and time.monotonic() - began < LIMIT:
        rows = committed_rows(store)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(draw.uniform(*pause) if rows else 0.2)
            break
        kind = draw.choice(kinds)
        if rows and nodes.strike(kind, draw):
            outcome.kills.append(
                {"kind": kind, "at": round(time.monotonic() - began, 1), "rows": committed_rows(store)}
            )
    try:
        _, errors = driver.communicate(timeout=max(1.0, LIMIT - (time.monotonic() - began)))
        outcome.status = driver.returncode
    except subprocess.TimeoutExpired:
        driver.kill()
        _, errors = driver.communicate()
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.said = "" if outcome.status == 0 else errors[-2000:]
    _look_at(outcome, site, store, quiet, nodes)
    shutil.rmtree(store)
    return outcome


def committed_rows(store: Path) -> int:
    """Of all teachers; from the number of records, as this is asked often."""
    return 4 * len(list(store.glob("*/commits/[0-9]*.json")))


def _look_at(outcome: Outcome, site: Site, store: Path, quiet: dict[str, bytes], nodes: Nodes) -> None:
    opened = FeatureStore(store)
    outcome.rows_lost = sum(site.rows - opened[key].coverage().valid for key in opened.teachers)
    records = [file.name.split(".") for key in TEACHERS for file in (store / key / "commits").glob("[0-9]*.json")]
    outcome.shards_twice = sum(revision != "0" for _, revision, *_ in records)
    outcome.identical = shard_bytes(store) == quiet
    outcome.left = [str(f.relative_to(store)) for name in ("leases", "staging") for f in store.glob(f"*/{name}/[0-9]*")]
    outcome.garbage = len(list(store.glob("**/.*")))
    deadline = time.monotonic() + 20
    while (workers := nodes.workers()) and time.monotonic() < deadline:
        psutil.wait_procs(workers, timeout=1)
    outcome.left += [f"worker {process.pid}" for process in workers]
    (record,) = (json.loads(file.read_text()) for file in (store / "runs").glob("*.json"))
    outcome.cost = {key: record.get("cost", {}).get(key) for key in ("deaths", "retries", "workers", "nodes")}


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.extract.kills", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--kills", type=int, default=30, help="in all runs together (default 30)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--rows", type=int, default=2000, help="of a run's dataset (default 2000)")
    p.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    args = p.parse_args()
    began, runs = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="olavlm-kills-") as folder, cluster() as nodes:
        machine = describe(Path(folder), ("ray", "torch", "numpy"))
        site = Site(Path(folder), args.rows)
        quiet = site.start(site.folder / "quiet", "--workers", 1)
        if quiet.wait():
            sys.exit(quiet.stderr.read())
        expected = shard_bytes(site.folder / "quiet")
        while (struck := sum(len(r.kills) for r in runs)) < args.kills:
            seed = f"{args.seed} {len(runs)}"
            kills = min(random.Random(seed).randint(*KILLS_A_RUN), args.kills - struck)
            runs.append(run(site, nodes, expected, seed, kills))
            print(f"run {seed}: {_short(runs[-1])}", file=sys.stderr, flush=True)
        # As many kills as a run may have, of workers: of two that are hit, both may still be loading.
        control = run(
            site,
            nodes,
            expected,
            f"{args.seed} control",
            KILLS_A_RUN[1],
            kinds=("worker killed",),
            program=WITHOUT_RETRIES,
        )
        print(f"without retries: {_short(control)}", file=sys.stderr, flush=True)
    sound = all(r.sound for r in runs) and control.rows_lost > 0
    results = {
        "command": f"python -m benchmarks.extract.kills --kills {args.kills} --seed {args.seed} --rows {args.rows}",
        "machine": machine,
        "seconds": round(time.monotonic() - began),
        "limit_seconds": LIMIT,
        "rows": args.rows,
        "kills": struck,
        "kinds": {kind: sum(k["kind"] == kind for r in runs for k in r.kills) for kind in KINDS},
        "rows_lost": sum(r.rows_lost for r in runs),
        "shards_twice": sum(r.shards_twice for r in runs),
        "not_ended": sum(r.status is None for r in runs),
        "sound": sound,
        "runs": [vars(r) for r in runs],
        "control": {"without": "retries", **vars(control)},
    }
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{struck} kills in {len(runs)} runs: " + ("nothing was lost" if sound else "SOMETHING IS WRONG"))
    sys.exit(not sound)


def _short(outcome: Outcome) -> str:
    kinds = ", ".join(f"{kill['kind']} at {kill['at']} s" for kill in outcome.kills) or "no kill"
    verdict = "sound" if outcome.sound else f"{outcome.rows_lost} rows lost, {outcome.said[-300:]}"
    return f"{kinds}; status {outcome.status} after {outcome.seconds} s, {outcome.cost}: {verdict}"


if __name__ == "__main__":
    main()
