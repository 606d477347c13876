"""Leases: of all writers, on all machines, one at a time may write a shard.

A lease is a file `leases/000012.0` made by exclusive create, which names its holder: host, boot, process and the
process's start. The number after the shard is the lease's generation, and the highest generation is the holder. Who
finds a dead holder creates the next generation and then removes the older ones, so that of many takers one succeeds
and the dead one, should it wake up, finds that it holds nothing. Nothing but exclusive create, listing and removal is
needed, which file systems and object stores both have.

A holder is dead when its process is gone from this host, or, where that cannot be looked up, when it has given no sign
of life (`Lease.renew`) for `LEASE_SECONDS`, by the store's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import files
from .errors import LeaseHeld, LeaseLost
from .files import Location

LEASE_SECONDS = 900.0  # without a sign of life for this long, a writer on another host is taken for dead
RENEW_SECONDS = 30.0  # between two signs of life
PATIENCE_SECONDS = 5.0  # that a holder gives a taker to either remove its lease or withdraw
_NAME = re.compile(r"(\d{6}|[1-9]\d{6,})\.(0|[1-9]\d*)")


@dataclass
class Lease:
    """The right to write one shard, held until `release`."""

    folder: Location
    shard: int
    generation: int
    nonce: str
    released: bool = False
    _renewed: float = field(default_factory=time.monotonic)

    @property
    def file(self) -> Location:
        return self.folder / f"{self.shard:06d}.{self.generation}"

    def held(self) -> bool:
        """Whether it is still this writer's."""
        return generations(self.folder, self.shard)[-1:] == [self.generation] and self._is_own()

    def _is_own(self) -> bool:
        return (_read(self.file) or {}).get("nonce") == self.nonce  # the number may have been used again

    def check(self) -> None:
        """Raise `LeaseLost` if another writer has taken the shard over.

        A higher generation beside this one may be that of a slow taker, who judged an earlier holder and is about to
        withdraw: it is given `PATIENCE_SECONDS`.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not self.held():
            if self._is_own() and time.monotonic() < give_up:
                time.sleep(0.02)
                continue
            raise LeaseLost(f"lease {self.file} was taken over by another writer; this shard's work is dropped")

    def renew(self) -> None:
        """Give a sign of life, at most every `RENEW_SECONDS`; call it much more often than every `LEASE_SECONDS`."""
        if time.monotonic() - self._renewed < RENEW_SECONDS:
            return
        self.check()
        with contextlib.suppress(FileNotFoundError):  # taken over this instant: the next check tells
            files.refresh(self.file)
        self._renewed = time.monotonic()

    def release(self) -> None:
        """Give it back; again does nothing."""
        if not self.released and self._is_own():
            if self.held():
                _remove_older(self.folder, self.shard, self.generation)  # of a taker that died half-way
            files.remove(self.file)
        self.released = True


def acquire_lease(folder: Location, shard: int) -> Lease:
    """Take the lease of a shard, from a dead holder if need be; raises `LeaseHeld` if its holder lives."""
    nonce = secrets.token_hex(16)
    me = {"nonce": nonce, **this_process()}
    for _ in range(8):
        known = generations(folder, shard)
        if known:
            holder = _read(top := folder / f"{shard:06d}.{known[-1]}")
            if holder is None:
                continue  # released in between
            try:
                if not _is_dead(top, holder, files.clock):
                    raise LeaseHeld(f"shard lease {top} is held by process {holder.get('pid')} on {holder.get('host')}")
            except FileNotFoundError:
                continue  # released, or taken over, in between
        lease = Lease(folder, shard, known[-1] + 1 if known else 0, nonce)
        try:
            files.publish(lease.file, json.dumps(me).encode())
        except FileExistsError:
            continue  # another was faster
        older = [generation for generation in generations(folder, shard) if generation < lease.generation]
        judged = not older or (older[-1] == known[-1] and _read(top) == holder)
        if not judged or not lease.held():  # others were faster: who holds it now was not judged, or is higher
            files.remove(lease.file)
            continue
        _remove_older(folder, shard, lease.generation)
        return lease
    raise LeaseHeld(f"the lease of shard {shard} in {folder} changes hands too fast; try again")


def generations(folder: Location, shard: int) -> list[int]:
    """Generations of the leases of a shard, ascending; the last is the holder's."""
    found = (_NAME.fullmatch(name) for name in files.names(folder))
    return sorted(int(m[2]) for m in found if m and int(m[1]) == shard)


def leased(folder: Location) -> dict[int, Location]:
    """The lease file that counts of every leased shard, whether its holder lives or not."""
    found = sorted((int(m[1]), int(m[2])) for m in map(_NAME.fullmatch, files.names(folder)) if m)
    return {shard: folder / f"{shard:06d}.{generation}" for shard, generation in found}


def is_live(file: Location, clock: Callable[[Location], float] = lambda folder: time.time()) -> bool:
    """Whether a living writer holds the lease. By this host's clock: who only reads may not be able to ask the store's,
    `files.clock`, which those who remove anything for it have to go by."""
    try:
        holder = _read(file)
        return bool(holder) and not _is_dead(file, holder, clock)
    except FileNotFoundError:
        return False


def _remove_older(folder: Location, shard: int, generation: int) -> None:
    for older in generations(folder, shard):
        if older < generation:
            files.remove(folder / f"{shard:06d}.{older}")


def _read(file: Location) -> dict | None:
    """What the lease says of its holder, {} if it is damaged, None if there is none."""
    try:
        holder = json.loads(files.read(file))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(file: Location, holder: dict, clock: Callable[[Location], float]) -> bool:
    if not holder:  # damaged: published whole, so nobody is writing it
        return True
    running = is_running(holder)
    return clock(file.parent) - files.changed_at(file) > LEASE_SECONDS if running is None else not running


def this_process() -> dict[str, object]:
    """What others need to tell whether this process still runs, as JSON."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "started": _process_start(pid)}


def is_running(process: dict) -> bool | None:
    """Whether the process that `this_process` told of runs; None where that cannot be looked up, as on another host, or
    of another user whose processes are hidden (`hidepid`)."""
    here = process.get("host") == socket.gethostname() and process.get("boot") == _boot_id()
    if not here or process.get("started") is None:
        return None
    started = _process_start(pid := process.get("pid"))
    return None if started is None and _is_hidden(pid) else started == process["started"]


def _process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if it is gone, or dead but not reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process, of which this user is told no more."""
    if os.access(f"/proc/{pid}/stat", os.R_OK):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return True


def _boot_id() -> str:
    """Names the set of processes that a pid is looked up in: this boot, and the container's pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
