"""Committing a shard: lease, stage, compare, place, publish.

    lease     leases/000012.0 by exclusive create: one writer a shard (lease.py)
    recover   staged files of the dead, and shard files without any record, are removed
    stage     staging/000012.NONCE.features (and .scales), row by row; closed with the shard index
    compare   read back, every row's crc32c and the file's
    fsync     the staged files
    place     linked to features/c/12/0/0 (and scales/c/12/0), never over another file; folders fsynced
    record    commits/000012.0.json by exclusive create: now the shard exists
    release   the staged names and the lease go

On an object store the staged files lie in a temporary folder of this machine, and `place` is a conditional PUT.

A crash before `record` leaves a shard that does not exist; whoever takes its lease next sweeps up. A writer that was
taken for dead and wakes up finds its staged file or its lease gone, or the shard placed, and drops its work.
Replacing a shard withdraws its record before its file is touched. A shard whose records or files are damaged stays as
it is until its replacement is ready, for there may be rows in it that can be carried over (`OpenShard.carry_over`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from . import files
from .codec import Fidelity
from .errors import BadImage, CorruptFeatures, LeaseLost
from .files import Location
from .lease import Lease, acquire_lease
from .records import Record, revisions_of, valid_record, withdraw
from .replacement import Replacement, is_of_replacement, vouched_rows
from .shard import Layout
from .staged import Staged
from .vouched import VouchedRows


class ShardWriter:
    """Writes shards of one teacher group; one `begin` ... `commit` at a time, from one thread.

    `on_step(name)` is called before every step of the protocol; fault tests kill there.
    """

    def __init__(self, group: Location, layout: Layout, fingerprint: str, on_step: Callable[[str], None] | None = None):
        self.group, self.layout, self.fingerprint = group, layout, fingerprint
        self.commits, self.leases, self.staging = (group / name for name in ("commits", "leases", "staging"))
        self.on_step = on_step or (lambda step: None)

    def begin(self, shard: int, rows: tuple[int, int], segment: str) -> OpenShard:
        """Lease `shard` for plan rows [start, stop) and sweep up what a dead writer left.

        Raises `LeaseHeld`. A shard that is there may be begun again, to replace it; it stands until `commit`, sound or
        damaged.
        """
        assert self.layout.shard_of(rows[0]) == self.layout.shard_of(rows[1] - 1) == shard, (shard, rows)
        self.on_step("lease")
        lease = acquire_lease(self.leases, shard)
        try:
            self.on_step("recover")
            standing = self._recover(lease, segment=segment)
            self.on_step("stage")
            return OpenShard(self, lease, shard, rows, segment, standing)
        except BaseException:
            lease.release()
            raise

    def sweep(self, shard: int, *, withdraw_all: bool = False) -> None:
        """Remove what a dead writer left of `shard`; raises `LeaseHeld` if its writer lives.

        With `withdraw_all` the shard itself goes too: its record is withdrawn, then its files are removed.
        """
        lease = acquire_lease(self.leases, shard)
        try:
            record = self._recover(lease, keep=not withdraw_all)
            if record is not None or withdraw_all:
                Replacement(self.staging, self.layout, shard).remove()
        finally:
            lease.release()

    def valid_record(self, shard: int) -> Record | None:
        """As `records.valid_record`; a shard whose records are all damaged does not exist for a writer."""
        try:
            return valid_record(self.group, self.layout, shard, self.fingerprint)
        except CorruptFeatures:
            return None

    def vouched_rows(self, shard: int, segment: str) -> list[VouchedRows]:
        """As `replacement.vouched_rows`."""
        return vouched_rows(self.group, self.layout, self.fingerprint, shard, segment)

    def shard_files(self, shard: int) -> dict[str, Location]:
        """Where the shard's files are, or would be, by array."""
        return {name: array.file(self.group, shard) for name, array in self.layout.arrays.items()}

    def remove_files(self, shard: int) -> None:
        """Scales go first and come last: to a plain Zarr reader features without scales are NaN, never zeros."""
        for file in reversed(self.shard_files(shard).values()):
            files.remove(file)

    def _recover(self, lease: Lease, keep: bool = True, segment: str | None = None) -> Record | None:
        """Sweep up what dead writers left; the record that counts, if it is of `segment` (of any by default).

        Of a shard that exists that record alone stays; of one that has no record, nothing; of a damaged one, all. What
        is put by for rows to be carried over stays until a record counts, see `replacement.py`. Who was taken for dead
        must not sweep up what its successor has placed.
        """
        shard = lease.shard
        lease.check()
        record = self.valid_record(shard) if keep else None
        revisions, _ = revisions_of(self.commits, shard)
        if files.is_local(self.staging):
            for left in self.staging.glob(f"{shard:06d}.*"):
                if record is not None or not keep or not is_of_replacement(left.name):
                    left.unlink(missing_ok=True)
        for file in revisions if record is not None or not keep else ():
            if record is None or file.name != record.name:
                lease.check()
                withdraw(file)
        if not revisions or not keep:
            lease.check()
            self.remove_files(shard)
        return record if record is None or segment in (None, record.segment) else None


class OpenShard:
    """A leased shard being written: `append` every row in order, then `commit` or `drop`."""

    def __init__(
        self,
        writer: ShardWriter,
        lease: Lease,
        shard: int,
        rows: tuple[int, int],
        segment: str,
        standing: Record | None = None,
    ) -> None:
        self.writer, self.lease, self.shard, self.rows, self.segment = writer, lease, shard, rows, segment
        self.standing = standing
        """The record that counts, which this shard is to replace; None if the shard does not exist or is damaged."""
        self.carried_over = 0
        """Rows."""
        self._replaced, self._revision = revisions_of(writer.commits, shard)  # records, and the number to publish
        self._replacement = Replacement(writer.staging, writer.layout, shard)
        self._put_by = False  # whether there may be a replacement that this writer is to remove
        self._temporary = None if files.is_local(writer.group) else Path(tempfile.mkdtemp(prefix="olavlm-staging-"))
        folder = self._temporary or writer.staging
        folder.mkdir(parents=True, exist_ok=True)
        self._staged: dict[str, Staged] = {}
        self._reasons: list[dict[str, str] | None] = []
        self._images: list[str | None] = []
        self._fidelity: list[Fidelity] = []
        self._began = time.perf_counter()
        try:
            for name, array in writer.layout.arrays.items():
                self._staged[name] = Staged(array, folder / f"{shard:06d}.{lease.nonce}.{name}")
        except BaseException:
            self.drop()
            raise

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()  # after commit there is nothing left to drop

    @property
    def next_row(self) -> int:
        """That is appended next."""
        return self.rows[0] + len(self._reasons)

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
        layout, parts, fidelity = self.writer.layout, None, None
        if features is not None:
            if features.shape != (layout.tokens, layout.dim):
                raise ValueError(f"features of shape {features.shape} in an array of ({layout.tokens}, {layout.dim})")
            parts, reason, fidelity = layout.codec.encode(features)
        self.append_stored(parts, image_sha256=image_sha256, reason=reason, detail=detail, fidelity=fidelity)

    def append_stored(
        self,
        parts: Mapping[str, np.ndarray] | None,
        *,
        image_sha256: str | None,
        reason: str | None = None,
        detail: str = "",
        fidelity: Fidelity | None = None,
    ) -> None:
        """As `append`, for a row that is encoded already: its part of each array, contiguous, in the array's dtype."""
        self._note(image_sha256, None if parts is not None else (reason, detail), fidelity)
        for name, staged in self._staged.items():
            staged.add(None if parts is None else parts[name])

    def append_batch(
        self,
        parts: Mapping[str, np.ndarray],
        *,
        images_sha256: Sequence[str | None],
        rejections: Sequence[tuple[str, str] | None],
        fidelity: Sequence[Fidelity | None],
    ) -> None:
        """As `append_stored` for the next rows, whose parts have a leading row axis.

        `rejections` has (reason, detail) for a row that is quarantined, whose parts are not looked at, else None.
        """
        for row in zip(images_sha256, rejections, fidelity, strict=True):
            self._note(*row)
        valid = np.array([rejection is None for rejection in rejections])
        for name, staged in self._staged.items():
            staged.add_batch(parts[name], valid)

    def carry_over(self, row: int) -> tuple[dict[str, np.ndarray], str | None] | None:
        """A row to append once more as it is stored: its part of each array, and the sha256 of its image.

        None if no record of the shard to be replaced vouches for it, or its bytes are damaged.
        """
        for vouched in self._vouched:
            if (found := vouched.read(row)) is not None:
                self.carried_over += 1
                return found
        return None

    @cached_property
    def _vouched(self) -> list[VouchedRows]:
        return self.writer.vouched_rows(self.shard, self.segment)

    def _note(self, sha256: str | None, rejection: tuple[str | None, str] | None, fidelity: Fidelity | None) -> None:
        """What the record will say of the next row."""
        if rejection is not None:
            reason, detail = rejection
            if reason not in BadImage.REASONS:
                raise ValueError(f"a row without features has a reason of {', '.join(BadImage.REASONS)}, not {reason}")
            detail = detail.encode(errors="backslashreplace").decode()  # of a path that is no Unicode
            self._reasons.append({"reason": reason, "detail": detail})
        else:
            self._reasons.append(None)
        self._images.append(sha256)
        if fidelity is not None:
            self._fidelity.append(fidelity)

    def commit(
        self,
        *,
        timings: dict[str, float] | None = None,
        host: dict[str, str] | None = None,
        like: Record | None = None,
    ) -> Record:
        """Make the shard exist. Raises `LeaseLost` if it was taken over, `CorruptFeatures` if the disk lies.

        Fidelity and norms are those of the rows appended with them, or those of the record `like` that rows were copied
        from; of rows that were carried over they are not known.
        """
        writer, step = self.writer, self.writer.on_step
        start, stop = self.rows
        if len(self._reasons) != stop - start:
            raise ValueError(f"shard {self.shard} has {stop - start} rows, {len(self._reasons)} were appended")
        filled = list(self._staged.values()) if any(r is None for r in self._reasons) else []
        for staged in filled:
            staged.close_with_index(start - self.shard * writer.layout.shard_rows)
        if filled:
            step("compare")
            with ThreadPoolExecutor(len(filled), "fsync") as disk:  # which works while the files are read back
                flushed = [disk.submit(os.fsync, staged.file.fileno()) for staged in filled]
                for staged in filled:
                    self._unless_swept_up(staged.compare)
                step("fsync")
                for done in flushed:
                    done.result()

        self.lease.check()
        if revisions_of(writer.commits, self.shard) != (self._replaced, self._revision):
            raise LeaseLost(f"shard {self.shard} was committed by another writer; this work is dropped")
        if self._replaced and self.carried_over:
            staged_files = {staged.layout.name: staged.path for staged in filled}
            self._put_by = True
            self._unless_swept_up(self._replacement.keep, staged_files, self._record(filled, timings, host, like))
        for file in self._replaced:
            step("withdraw")
            self.lease.check()
            self._put_by = False  # what stood is gone: it stays until the record is there
            try:
                withdraw(file)
            except FileNotFoundError:
                raise LeaseLost(f"{file} was withdrawn by another writer; this shard's work is dropped") from None
            self.lease.check()
            writer.remove_files(self.shard)
        step("place")
        for staged in filled:
            self._unless_swept_up(self._place, staged)
        step("record")
        self.lease.check()
        record = self._record(filled, timings, host, like)
        try:
            record.publish(writer.commits)
        except FileExistsError:
            raise LeaseLost(f"shard {self.shard} was committed by another writer; this work is dropped") from None
        if not self.lease.held() and not self._is_in_place(record):
            # Taken for dead between the last check and the record, which is of files that are gone.
            # Removed and not withdrawn: the other publishes under this number, and `.withdrawn` would hide its record.
            files.remove(writer.commits / record.name)
            raise LeaseLost(f"shard {self.shard} was taken over by another writer; this work is dropped")
        self._put_by = self.carried_over > 0 or (self._revision > 0 and not self._replaced)
        step("release")
        self.drop()
        return record

    def _record(
        self,
        filled: Sequence[Staged],
        timings: dict[str, float] | None,
        host: dict[str, str] | None,
        like: Record | None,
    ) -> Record:
        return Record(
            shard=self.shard,
            revision=self._revision,
            fingerprint=self.writer.fingerprint,
            segment=self.segment,
            rows=self.rows,
            reasons=self._reasons,
            images_sha256=self._images,
            files={staged.layout.name: staged.entry() for staged in filled},
            fidelity=self._fidelity_summary() if like is None else like.fidelity,
            norms=self._norm_summary() if like is None else like.norms,
            timings={"commit_s": time.perf_counter() - self._began, **(timings or {})},
            host={"host": socket.gethostname(), **(host or {})},
        )

    def drop(self) -> None:
        """Give the shard up (or, after `commit`, tidy): the staged names and the lease go."""
        try:
            for staged in self._staged.values():
                with contextlib.suppress(OSError):  # on a full disk: what could not be flushed is not wanted
                    staged.file.close()
                staged.path.unlink(missing_ok=True)
            if self._put_by:
                self._replacement.remove()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
        finally:
            self.lease.release()

    def _place(self, staged: Staged) -> None:
        target = staged.layout.file(self.writer.group, self.shard)
        try:
            files.place(staged.path, target)
        except FileExistsError:
            raise LeaseLost(f"{target} was placed by another writer; this shard's work is dropped") from None
        if files.is_local(target):
            folder = target.parent
            while folder != self.writer.group:
                files.fsync_folder(folder)
                folder = folder.parent

    def _unless_swept_up(self, act: Callable, *args: object) -> None:
        try:
            act(*args)
        except FileNotFoundError as e:
            raise LeaseLost(f"{e.filename} was swept up by another writer; this shard's work is dropped") from None

    def _is_in_place(self, record: Record) -> bool:
        """Whether the shard files are the ones that the record vouches for, byte for byte."""
        try:
            there = {name: zlib.crc32(files.read(file)) for name, file in self.writer.shard_files(self.shard).items()}
        except FileNotFoundError:
            return not record.files
        return there == {name: file.crc32 for name, file in record.files.items()}

    def _fidelity_summary(self) -> dict[str, float]:
        if not self._fidelity:
            return {}
        cosines = [f.cosine for f in self._fidelity]
        errors = [f.relative_error for f in self._fidelity]
        return {
            "cosine_mean": float(np.mean(cosines)),
            "cosine_worst": min(cosines),
            "relative_error_mean": float(np.mean(errors)),
            "relative_error_worst": max(errors),
        }

    def _norm_summary(self) -> dict[str, float]:
        norms = [f.norm for f in self._fidelity]
        return {"mean": float(np.mean(norms)), "min": min(norms), "max": max(norms)} if norms else {}
