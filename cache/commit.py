"""Committing a shard: lease, stage, compare, place, publish.

    lease     leases/000012 by exclusive create: one writer a shard
    recover   a shard file without a record, or a record that is not the file's: both are removed
    stage     staging/000012.NONCE, row by row; closed with the shard index
    compare   read back, every row's crc32c and the file's
    fsync     the staged file
    place     linked to features/c/12/0/0, never over another file; folder fsynced
    record    commits/000012.0.json by exclusive create: now the shard exists
    release   the staged name and the lease go

A crash before `record` leaves a shard that does not exist; whoever takes its lease next sweeps up. A writer that was
taken for dead and wakes up finds its staged file or its lease gone, or the shard placed, and drops its work.
Replacing a shard withdraws its record before its file is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .codec import Fidelity, encode
from .errors import BadImage, CorruptFeatures, LeaseHeld, LeaseLost
from .files import fsync_folder, publish
from .records import Record, revisions_of, valid_record, withdraw
from .shard import CRC_BYTES, Layout, crc32c, shard_file

LEASE_SECONDS = 900.0  # without a sign of life for this long, a writer on another host is taken for dead
RETURN_TRIES, RETURN_SECONDS = 5, 0.02  # for a lease taken by mistake to be given back, see `acquire_lease`


def _process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if it is gone, or dead but not reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot_id() -> str:
    """Names the set of processes that a pid is looked up in: this boot, and the container's pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


@dataclass
class Lease:
    """The right to write one shard, held until `release`."""

    file: Path
    nonce: str
    released: bool = False

    def held(self) -> bool:
        """Whether it is still this writer's."""
        for _ in range(RETURN_TRIES):
            holder = _read_lease(self.file)
            if holder is not None:
                return holder.get("nonce") == self.nonce
            time.sleep(RETURN_SECONDS)
        return False

    def check(self) -> None:
        """Raise `LeaseLost` if another writer has taken the shard over."""
        if not self.held():
            raise LeaseLost(f"lease {self.file} was taken over by another writer; this shard's work is dropped")

    def renew(self) -> None:
        """Give a sign of life; call it more often than every `LEASE_SECONDS`."""
        self.check()
        with contextlib.suppress(FileNotFoundError):  # taken over this instant: the next check tells
            os.utime(self.file)

    def release(self) -> None:
        """Give it back; again does nothing."""
        if not self.released and self.held():
            self.file.unlink(missing_ok=True)
        self.released = True


def _read_lease(file: Path) -> dict | None:
    """What the lease says of its holder, {} if it is damaged, None if there is none."""
    try:
        holder = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(file: Path, holder: dict, now: float) -> bool:
    here = holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id()
    if here and holder.get("started") is not None:
        return _process_start(holder.get("pid")) != holder["started"]
    return now - file.stat().st_mtime > LEASE_SECONDS


def lease_is_live(file: Path) -> bool:
    """Whether a living writer holds the lease."""
    try:
        holder = _read_lease(file)
        return bool(holder) and not _is_dead(file, holder, time.time())
    except FileNotFoundError:
        return False


def acquire_lease(file: Path) -> Lease:
    """Take the lease, from a dead holder if need be; raises `LeaseHeld` if its holder lives."""
    nonce = secrets.token_hex(16)
    me = {
        "nonce": nonce,
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
    }
    for _ in range(8):
        try:
            publish(file, json.dumps(me).encode())
            return Lease(file, nonce)
        except FileExistsError:
            pass
        holder = _read_lease(file)
        if holder is None:
            continue  # released in between
        probe = file.parent / f".clock.{nonce}"  # the file system's own clock, not this host's
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            if holder and not _is_dead(file, holder, now):
                raise LeaseHeld(f"shard lease {file} is held by process {holder.get('pid')} on {holder.get('host')}")
            # Of several that judge the holder dead one wins the rename; what it took must be what it judged, or goes
            # back. `Lease.held` waits for that.
            taken = file.parent / f".dead.{nonce}"
            file.rename(taken)
            if (_read_lease(taken) or {}).get("nonce") != holder.get("nonce"):
                with contextlib.suppress(FileExistsError):
                    os.link(taken, file)
            taken.unlink()
        except FileNotFoundError:
            continue  # released, or taken over, in between
    raise LeaseHeld(f"shard lease {file} changes hands too fast; try again")


class ShardWriter:
    """Writes shards of one teacher group; one `begin` ... `commit` at a time, from one thread.

    `on_step(name)` is called before every step of the protocol; fault tests kill there.
    """

    def __init__(self, group: Path, layout: Layout, fingerprint: str, on_step: Callable[[str], None] | None = None):
        self.group, self.layout, self.fingerprint = group, layout, fingerprint
        self.array = group / "features"
        self.commits, self.leases, self.staging = (group / name for name in ("commits", "leases", "staging"))
        self.on_step = on_step or (lambda step: None)

    def begin(self, shard: int, rows: tuple[int, int], segment: str) -> OpenShard:
        """Lease `shard` for plan rows [start, stop) and sweep up what a dead writer left.

        Raises `LeaseHeld`. A committed shard may be begun again, to replace it; it stands until `commit`.
        """
        assert self.layout.shard_of(rows[0]) == self.layout.shard_of(rows[1] - 1) == shard, (shard, rows)
        self.on_step("lease")
        lease = acquire_lease(self.leases / f"{shard:06d}")
        try:
            self.on_step("recover")
            self._recover(shard)
            self.on_step("stage")
            return OpenShard(self, lease, shard, rows, segment)
        except BaseException:
            lease.release()
            raise

    def sweep(self, shard: int) -> None:
        """Remove what a dead writer left of `shard`; raises `LeaseHeld` if its writer lives."""
        lease = acquire_lease(self.leases / f"{shard:06d}")
        try:
            self._recover(shard)
        finally:
            lease.release()

    def valid_record(self, shard: int) -> Record | None:
        """As `records.valid_record`; a shard whose records are all damaged does not exist for a writer."""
        try:
            return valid_record(self.group, self.layout, shard, self.fingerprint)
        except CorruptFeatures:
            return None

    def _recover(self, shard: int) -> None:
        for left in self.staging.glob(f"{shard:06d}.*"):
            left.unlink(missing_ok=True)
        record = self.valid_record(shard)
        for file in revisions_of(self.commits, shard)[0]:
            if record is None or file.name != record.name:
                withdraw(file)
        if record is None:
            shard_file(self.array, shard).unlink(missing_ok=True)


class OpenShard:
    """A leased shard being written: `append` every row in order, then `commit` or `drop`."""

    def __init__(self, writer: ShardWriter, lease: Lease, shard: int, rows: tuple[int, int], segment: str) -> None:
        self.writer, self.lease, self.shard, self.rows, self.segment = writer, lease, shard, rows, segment
        self._standing, self._revision = revisions_of(writer.commits, shard)  # to replace, and the number to publish
        writer.staging.mkdir(parents=True, exist_ok=True)
        self.staged = writer.staging / f"{shard:06d}.{lease.nonce}"
        self._file = self.staged.open("xb")
        self._crc: list[int | None] = []
        self._reasons: list[dict[str, str] | None] = []
        self._images: list[str | None] = []
        self._fidelity: list[Fidelity] = []
        self._file_crc = 0
        self._began = time.perf_counter()

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()  # after commit there is nothing left to drop

    def append(
        self,
        features: np.ndarray | None,
        *,
        image_sha256: str | None,
        reason: str | None = None,
        detail: str = "",
    ) -> None:
        """Add the next row: `(tokens, dim)` float32 features, or None with the reason it is quarantined for.

        `reason` is one of `BadImage.REASONS`.
        """
        layout, stored = self.writer.layout, None
        if features is None:
            if reason not in BadImage.REASONS:
                raise ValueError(f"a row without features has a reason of {', '.join(BadImage.REASONS)}, not {reason}")
        else:
            if features.shape != (layout.tokens, layout.dim):
                raise ValueError(f"features of shape {features.shape} in an array of ({layout.tokens}, {layout.dim})")
            stored, reason, fidelity = encode(features, layout.numpy_dtype)
        self._images.append(image_sha256)
        if stored is None:
            self._crc.append(None)
            self._reasons.append({"reason": reason, "detail": detail})
            return
        checksum = crc32c(stored)
        self._crc.append(checksum)
        self._reasons.append(None)
        self._fidelity.append(fidelity)
        self._write(stored)
        self._write(checksum.to_bytes(CRC_BYTES, "little"))

    def _write(self, data: np.ndarray | bytes) -> None:
        self._file.write(data)
        self._file_crc = crc32c(data, self._file_crc)

    def commit(self, *, timings: dict[str, float] | None = None, host: dict[str, str] | None = None) -> Record:
        """Make the shard exist. Raises `LeaseLost` if it was taken over, `CorruptFeatures` if the disk lies."""
        writer, step = self.writer, self.writer.on_step
        start, stop = self.rows
        if len(self._crc) != stop - start:
            raise ValueError(f"shard {self.shard} has {stop - start} rows, {len(self._crc)} were appended")
        first = self.shard * writer.layout.shard_rows
        valid = [start - first + i for i, c in enumerate(self._crc) if c is not None]
        if valid:
            self._write(writer.layout.index(valid))
            self._file.flush()
            step("compare")
            self._compare()
            step("fsync")
            os.fsync(self._file.fileno())
        inode = os.fstat(self._file.fileno()).st_ino if valid else None  # open until `drop`, so not used again

        self.lease.check()
        if revisions_of(writer.commits, self.shard) != (self._standing, self._revision):
            raise LeaseLost(f"shard {self.shard} was committed by another writer; this work is dropped")
        for file in self._standing:
            step("withdraw")
            self.lease.check()
            try:
                withdraw(file)
            except FileNotFoundError:
                raise LeaseLost(f"{file} was withdrawn by another writer; this shard's work is dropped") from None
            self.lease.check()
            shard_file(writer.array, self.shard).unlink(missing_ok=True)
        step("place")
        if valid:
            target = shard_file(writer.array, self.shard)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.staged, target)
            except FileExistsError:
                raise LeaseLost(f"{target} was placed by another writer; this shard's work is dropped") from None
            except FileNotFoundError:
                raise self._swept_up() from None
            for folder in (target.parent, target.parent.parent, writer.array / "c"):
                fsync_folder(folder)
        step("record")
        self.lease.check()
        record = Record(
            shard=self.shard,
            revision=self._revision,
            fingerprint=writer.fingerprint,
            segment=self.segment,
            rows=self.rows,
            crc32c=self._crc,
            reasons=self._reasons,
            images_sha256=self._images,
            file={"size": writer.layout.file_bytes(len(valid)), "crc32c": self._file_crc} if valid else None,
            fidelity=self._fidelity_summary(),
            norms=self._norm_summary(),
            timings={"commit_s": time.perf_counter() - self._began, **(timings or {})},
            host={"host": socket.gethostname(), **(host or {})},
        )
        try:
            record.publish(writer.commits)
        except FileExistsError:
            raise LeaseLost(f"shard {self.shard} was committed by another writer; this work is dropped") from None
        if not self.lease.held() and self._inode_in_place() != inode:
            # Taken for dead between the last check and the record, which is of a file that is gone.
            withdraw(writer.commits / record.name)
            raise LeaseLost(f"shard {self.shard} was taken over by another writer; this work is dropped")
        step("release")
        self.drop()
        return record

    def drop(self) -> None:
        """Give the shard up (or, after `commit`, tidy): the staged name and the lease go."""
        try:
            with contextlib.suppress(OSError):  # on a full disk: what could not be flushed is not wanted
                self._file.close()
            self.staged.unlink(missing_ok=True)
        finally:
            self.lease.release()

    def _swept_up(self) -> LeaseLost:
        return LeaseLost(f"{self.staged} was swept up by another writer; this shard's work is dropped")

    def _inode_in_place(self) -> int | None:
        try:
            return shard_file(self.writer.array, self.shard).stat().st_ino
        except FileNotFoundError:
            return None

    def _compare(self) -> None:
        """Read the staged file back and compare every row, and the whole, with what was meant."""
        size, total = self.writer.layout.slot_bytes, 0
        try:
            staged = self.staged.open("rb")
        except FileNotFoundError:
            raise self._swept_up() from None
        with staged as f:
            for offset, expected in enumerate(self._crc):
                if expected is None:
                    continue
                slot = f.read(size)
                total = crc32c(slot, total)
                if crc32c(slot[:-CRC_BYTES]) != expected or slot[-CRC_BYTES:] != expected.to_bytes(CRC_BYTES, "little"):
                    raise CorruptFeatures(
                        f"{self.staged}: row {self.rows[0] + offset} reads back differently than written"
                    )
            total = crc32c(f.read(), total)
        if total != self._file_crc:
            raise CorruptFeatures(f"{self.staged}: reads back differently than written")

    def _fidelity_summary(self) -> dict[str, float]:
        if not self._fidelity:
            return {}
        cosines = [f.cosine for f in self._fidelity]
        errors = [f.relative_error for f in self._fidelity]
        return {
            "cosine_mean": float(np.mean(cosines)),
            "cosine_worst": min(cosines),
            "relative_error_worst": max(errors),
        }

    def _norm_summary(self) -> dict[str, float]:
        norms = [f.norm for f in self._fidelity]
        return {"mean": float(np.mean(norms)), "min": min(norms), "max": max(norms)} if norms else {}
