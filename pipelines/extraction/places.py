"""Where workers can be: what an extraction asks of its workers, and how many of them each node of a cluster holds."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from olavlm.pipelines.cli import JobFailed

from .extractor import TeacherSpec
from .scheduler import STALL_SECONDS

CONNECT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the workers of an extraction are, and where."""

    store: str
    images: Sequence[str]
    specs: Sequence[TeacherSpec]
    batch_size: int
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA if a node has a GPU."""
    compile: bool = False
    address: str | None = None
    """Of a running Ray cluster; None is a Ray of this machine, for this job alone."""
    workers: int | None = None
    """At most; as many as the nodes hold by default."""
    worker_gpus: float | None = None
    worker_cpus: float | None = None
    stall: float = STALL_SECONDS
    """Seconds without progress after which a worker counts as stuck."""
    known_images: Sequence[str] = ()
    """That the driver can read, and so must every worker."""


def find_cluster(address: str) -> None:
    """JobFailed if nobody answers there; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and port.isdigit()):
        return  # of another form, such as `auto`: Ray looks it up, and says at once if it is wrong
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise JobFailed(
            f"no Ray cluster answers at {address} ({e}); give the --address of a running one (ray start --head), or "
            "leave it out"
        ) from None


@dataclass(frozen=True)
class Place:
    """A node, how many workers it holds, and what each of them gets."""

    node: str
    host: str
    slots: int
    gpus: float
    cpus: float


def find_places(nodes: Sequence[dict], job: Job, device: str) -> list[Place]:
    """The nodes with room for a worker on `device`; `nodes` as `ray.nodes()` tells them.

    A GPU worker gets one GPU (or `worker_gpus`, a part of one) and an even share of its node's CPUs, a CPU worker one
    CPU, or less if more workers are asked for than there are CPUs.
    """
    found, alive = [], [node for node in nodes if node["Alive"]]
    cpus_of = [node["Resources"].get("CPU", 0) for node in alive]
    for node, cpus in zip(alive, cpus_of, strict=True):
        if device == "cuda":
            gpus = job.worker_gpus or 1
            slots = int(node["Resources"].get("GPU", 0)) * int(1 / gpus)
            share = job.worker_cpus or _countable(cpus / max(1, slots))
        else:
            gpus, share = 0, job.worker_cpus or _cpu_share(cpus_of, job.workers or 0)
            slots = int(cpus / share)
        if share:
            slots = min(slots, int(cpus / share))
        if slots:
            found.append(Place(node["NodeID"], node["NodeManagerHostname"], slots, gpus, share))
    return found


def _cpu_share(cpus: Sequence[float], workers: int) -> float:
    """The most CPUs, one at most, that so many workers on these nodes can each have."""
    shares = {_countable(c / n) for c in set(cpus) for n in range(1, workers + 1) if c}
    enough = (s for s in shares if 0 < s <= 1 and sum(int(c / s) for c in cpus) >= workers)
    return 1.0 if sum(map(int, cpus)) >= workers else max(enough, default=1.0)


def _countable(cpus: float) -> float:
    """Down to what Ray counts: whole ones, and below one ten-thousandths."""
    return float(int(cpus)) if cpus >= 1 else int(cpus * 10_000) / 10_000
