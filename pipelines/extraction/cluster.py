"""The crew of an extraction as Ray actors, on this machine or on a cluster. All that knows of Ray is here.

An actor is a `ShardExtractor` in a process of its own, with two threads for blocks and one for looks at it, so that a
look is answered while it works. Actors are placed node by node, each with the GPU and its share of that node's CPUs, so
that machines need not be alike; one gets work when its teachers are loaded, and one that no node can host never does.
Features never travel through Ray: what an actor is sent are row numbers, what it answers is what became of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from olavlm.cache import ShardTask
from olavlm.cache.files import is_local, location
from olavlm.cache.images import split_root
from olavlm.pipelines.cli import JobFailed, Stopped
from olavlm.student.processes import stop_requests

from .blocks import Block
from .crew import Event, Gone, Looked, Ready, Returned
from .extractor import ShardExtractor, ShardResult, Stages, WorkerStatus
from .places import Job, Place, find_places
from .scheduler import BLOCKS_HELD, LOOK_SECONDS, Scheduler
from .summary import Tally

STRIKES = 3  # of a node, before it is left alone: starts in a row that fail, or workers that were dismissed with blame
NODES_SECONDS = 5.0  # between two looks at which nodes there are
LAST_LOOK_SECONDS = 5.0
OBJECT_STORE_BYTES = 100_000_000  # of a Ray of our own: next to nothing travels through it


def run_tasks(job: Job, tasks: Sequence[ShardTask], tally: Tally) -> None:
    """Extract `tasks`; what became of them is in the store and in `tally`. `Stopped` on SIGINT and SIGTERM.

    Raises `JobFailed` if the cluster cannot be reached.
    """
    try:
        connect(job.address)
        with stop_requests() as stop:
            crew = RayCrew(job)
            try:
                Scheduler(crew, tasks, tally, workers=job.workers, stall=job.stall, stop=stop).run()
            finally:
                crew.close()
                tally.device, tally.hosts, tally.nodes = crew.device, sorted(crew.hosts), len(crew.nodes)
    finally:
        with stop_requests():  # all is done or dropped by now, and Ray sets handlers of its own here, too
            ray.shutdown()  # actors do not outlive their driver


def connect(address: str | None) -> None:
    """To the cluster at `address`, or to a Ray of this machine that ends with this process. `Stopped` on SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers are of niceness 15 if nobody says otherwise: beside a training, or another command of the same
    # terminal, they would hardly run at all. What is asked for has the priority that it was asked for with.
    os.environ.setdefault("RAY_worker_niceness", "0")
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except Exception as e:  # of many kinds: a node that did not start in time is a bare Exception of Ray's
        where = f"the Ray cluster at {address}" if address else "a Ray of this machine"
        raise JobFailed(
            f"{where} cannot be used: {_one_line(e)}; give the --address of a running one (ray start --head), from one "
            "of its nodes (RAY_AUTH_MODE=token if it asks for Ray's token), or leave it out"
        ) from None
    except SystemExit:  # of Ray's own handler of SIGTERM
        raise Stopped("SIGTERM") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def room_at(job: Job, device: str) -> list[Place]:
    """Where workers of `job` could be on its cluster now."""
    try:
        connect(job.address)
        return find_places(ray.nodes(), job, device)
    finally:
        ray.shutdown()


class _Actor:
    """A `ShardExtractor` as Ray's. Errors travel as text: not every exception can be pickled."""

    def __init__(self, *settings: object, **more: object) -> None:
        self._settings, self._more, self._extractor = settings, more, None

    @ray.method(concurrency_group="work")
    def load(self) -> str:
        try:
            extractor = ShardExtractor(*self._settings, **self._more)
            extractor.load()
        except Exception as e:  # a worker that cannot load is told of, with the reason, whatever it is
            return _one_line(e)
        self._extractor = extractor
        return ""

    @ray.method(concurrency_group="work")
    def extract(self, block: Block) -> tuple[list[ShardResult], str]:
        try:
            return self._extractor.extract(block), ""
        except Exception as e:
            return [], _one_line(e)

    @ray.method(concurrency_group="look")
    def look(self) -> WorkerStatus:
        return self._extractor.watch() if self._extractor else WorkerStatus(0, [], Stages())

    @ray.method(concurrency_group="look")
    def stop(self) -> None:
        if self._extractor:
            self._extractor.stop()


@dataclass(eq=False)
class RayWorker:
    """A worker as the driver sees it: its actor, its place, and what it has not answered yet."""

    name: str
    place: Place
    actor: object
    ready: bool = False
    calls: dict[object, tuple[str, Block]] = field(default_factory=dict)
    """What is not answered yet: references to what was asked (load, extract, look), and of which block."""


class RayCrew:
    """See `crew.Crew`."""

    def __init__(self, job: Job) -> None:
        self.elastic = job.address is not None
        self.obstacle = (
            "they wait for the CPUs and GPUs that they ask for (--worker-cpus, --worker-gpus), or still load"
        )
        self.hosts: set[str] = set()
        """Those that workers were ready on."""
        self.nodes: set[str] = set()
        self._workers: list[RayWorker] = []
        self._number, self._looked = 0, 0.0
        self._strikes: Counter[str] = Counter()
        self._blame: Counter[str] = Counter()
        self._places: list[Place] = []
        self._places_known = -NODES_SECONDS
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpus = any(node["Resources"].get("GPU") for node in nodes)
        self.device = ("cuda" if gpus else "cpu") if job.device == "auto" else job.device
        self._job = job
        self._class = ray.remote(concurrency_groups={"work": BLOCKS_HELD, "look": 1})(_Actor)
        if job.workers and job.workers > self.room():
            of = f"{job.worker_gpus or 1:g} GPU" if self.device == "cuda" else f"{job.worker_cpus or 1:g} CPU"
            print(f"{job.workers} workers are asked for, the nodes have room for {self.room()} of {of}", flush=True)

    def room(self) -> int:
        return sum(place.slots for place in self._open_places())

    def _open_places(self) -> list[Place]:
        if time.monotonic() - self._places_known >= NODES_SECONDS:
            nodes = ray.nodes()
            self._places, self._places_known = find_places(nodes, self._job, self.device), time.monotonic()
            if not any(node["Alive"] for node in nodes):
                self.obstacle = "no node of Ray is alive: it died or was killed, perhaps for lack of memory"
            elif not self._places:
                needs = "a GPU" if self.device == "cuda" else "a CPU"
                wanted = [f"--worker-{k} {v:g}" for k in ("gpus", "cpus") if (v := getattr(self._job, f"worker_{k}"))]
                self.obstacle = f"no node has {needs} for it" + (f" with {' '.join(wanted)}" if wanted else "")
        return [p for p in self._places if max(self._strikes[p.node], self._blame[p.node]) < STRIKES]

    def hire(self, wanted: int) -> int:
        while len(self._workers) < wanted:
            taken = Counter(worker.place.node for worker in self._workers)
            free = [(place.slots - taken[place.node], place) for place in self._open_places()]
            most, place = max(free, key=lambda pair: pair[0], default=(0, None))
            if most < 1:
                break
            self._start(place)
        return len(self._workers)

    def _start(self, place: Place) -> None:
        job = self._job
        actor = self._class.options(
            num_gpus=place.gpus,
            num_cpus=place.cpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
        ).remote(
            _absolute_store(job.store),
            list(job.specs),
            [_absolute_root(root) for root in job.images],
            batch_size=job.batch_size,
            device=self.device,
            threads=max(1, int(place.cpus)),
            compile=job.compile,
            known_images=list(job.known_images),
        )
        self._number += 1
        worker = RayWorker(f"worker {self._number} on {place.host}", place, actor)
        worker.calls[actor.load.remote()] = "load", ()
        self._workers.append(worker)

    def give(self, worker: RayWorker, block: Block) -> None:
        worker.calls[worker.actor.extract.remote(block)] = "extract", block

    def look(self, seconds: float) -> list[Event]:
        if time.monotonic() - self._looked >= LOOK_SECONDS:  # at all at once: they are waited for together
            self._looked = time.monotonic()
            for worker in self._workers:
                if worker.ready and not any(what == "look" for what, _ in worker.calls.values()):
                    worker.calls[worker.actor.look.remote()] = "look", ()
        calls = {reference: worker for worker in self._workers for reference in worker.calls}
        if not calls:
            time.sleep(seconds)
            return []
        ray.wait(list(calls), timeout=seconds)
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        events = [self._event(calls[reference], reference) for reference in answered]
        return [event for event in events if event is not None]

    def _event(self, worker: RayWorker, reference: object) -> Event | None:
        if worker not in self._workers:
            return None  # another of its calls has told that it is gone
        what, block = worker.calls.pop(reference)
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as e:
            return self._gone(worker, _one_line(e))
        match what:
            case "load" if answer:
                return self._gone(worker, answer)
            case "load":
                worker.ready = True
                self._strikes[worker.place.node] = 0
                self.hosts.add(worker.place.host)
                self.nodes.add(worker.place.node)
                return Ready(worker)
            case "look":
                return Looked(worker, answer)
            case _:
                results, error = answer
                return self._gone(worker, error) if error else Returned(worker, results, block)

    def _gone(self, worker: RayWorker, reason: str) -> Gone:
        if not worker.ready:
            self._strikes[worker.place.node] += 1
            self.obstacle = f"{worker.name}: {reason}"
        self._places_known = -NODES_SECONDS  # it may have lost its node
        self.dismiss(worker)  # it may only have lost its connection, and live
        return Gone(worker, reason)

    def last_look(self) -> list[Looked]:
        asked = {worker.actor.look.remote(): worker for worker in self._workers if worker.ready}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LAST_LOOK_SECONDS) if asked else ([], [])
        events = []
        for reference in answered:
            try:
                events.append(Looked(asked[reference], ray.get(reference)))
            except ray.exceptions.RayError:
                continue  # it died when all was done
        return events

    def stop(self) -> None:
        for worker in self._workers:
            worker.actor.stop.remote()

    def dismiss(self, worker: RayWorker, blame: str = "") -> None:
        if blame:
            self._blame[worker.place.node] += 1
            self.obstacle = f"{worker.name}: {blame}"
        ray.kill(worker.actor)
        self._workers.remove(worker)

    def close(self) -> None:
        for worker in list(self._workers):
            self.dismiss(worker)


def _absolute_store(text: str) -> str:
    where = location(text)
    return str(where.absolute() if is_local(where) else where)


def _absolute_root(text: str) -> str:
    """An image root by its full path: actors have another working directory."""
    prefix, root = split_root(text)
    if "://" in root:
        return text
    return f"{prefix}={Path(root).absolute()}" if prefix else str(Path(root).absolute())


def _one_line(error: Exception) -> str:
    """What an error says, without the numbers that Ray gives its actors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if isinstance(error, ray.exceptions.RayActorError) and len(lines) > 1:
        lines = lines[1:]
    text = " ".join(" ".join(lines).split())[:300] or "no reason given"
    return text if isinstance(error, ray.exceptions.RayError) else f"{type(error).__name__}: {text}"
