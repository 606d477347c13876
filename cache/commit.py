"""Committing a shard: lease, stage, compare, place, publish.

    lease     leases/000012.0 by exclusive create: one writer a shard (lease.py)
    recover   a shard file without a record, or a record that is not the file's: both are removed
    stage     staging/000012.NONCE.features (and .scales), row by row; closed with the shard index
    compare   read back, every row's crc32c and the file's
    fsync     the staged files
    place     linked to features/c/12/0/0 (and scales/c/12/0), never over another file; folders fsynced
    record    commits/000012.0.json by exclusive create: now the shard exists
    release   the staged names and the lease go

On an object store the staged files lie in a temporary folder of this machine, and `place` is a conditional PUT.

A crash before `record` leaves a shard that does not exist; whoever takes its lease next sweeps up. A writer that was
taken for dead and wakes up finds its staged file or its lease gone, or the shard placed, and drops its work.
Replacing a shard withdraws its record before its file is touched.
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
from pathlib import Path

import numpy as np
from google_crc32c import extend

from . import files
from .codec import Fidelity
from .errors import BadImage, CorruptFeatures, LeaseLost
from .files import Location
from .lease import Lease, acquire_lease
from .records import Record, ShardFile, revisions_of, valid_record, withdraw
from .shard import CRC_BYTES, ArrayLayout, Layout, crc32c

_SMALL_ROW = 2**16  # bytes; smaller rows are written and read many at a time


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

        Raises `LeaseHeld`. A committed shard may be begun again, to replace it; it stands until `commit`.
        """
        assert self.layout.shard_of(rows[0]) == self.layout.shard_of(rows[1] - 1) == shard, (shard, rows)
        self.on_step("lease")
        lease = acquire_lease(self.leases, shard)
        try:
            self.on_step("recover")
            self._recover(lease, segment=segment)
            self.on_step("stage")
            return OpenShard(self, lease, shard, rows, segment)
        except BaseException:
            lease.release()
            raise

    def sweep(self, shard: int, *, withdraw_all: bool = False) -> None:
        """Remove what a dead writer left of `shard`; raises `LeaseHeld` if its writer lives.

        With `withdraw_all` the shard itself goes too: its record is withdrawn, then its files are removed.
        """
        lease = acquire_lease(self.leases, shard)
        try:
            self._recover(lease, keep=not withdraw_all)
        finally:
            lease.release()

    def valid_record(self, shard: int) -> Record | None:
        """As `records.valid_record`; a shard whose records are all damaged does not exist for a writer."""
        try:
            return valid_record(self.group, self.layout, shard, self.fingerprint)
        except CorruptFeatures:
            return None

    def shard_files(self, shard: int) -> dict[str, Location]:
        """Where the shard's files are, or would be, by array."""
        return {name: array.file(self.group, shard) for name, array in self.layout.arrays.items()}

    def remove_files(self, shard: int) -> None:
        """Scales go first and come last: to a plain Zarr reader features without scales are NaN, never zeros."""
        for file in reversed(self.shard_files(shard).values()):
            files.remove(file)

    def _recover(self, lease: Lease, keep: bool = True, segment: str | None = None) -> None:
        """Leave the shard's files and the record that counts, or nothing. One of another segment does not count.

        Who was taken for dead must not sweep up what its successor has placed.
        """
        shard = lease.shard
        lease.check()
        if files.is_local(self.staging):
            for left in self.staging.glob(f"{shard:06d}.*"):
                left.unlink(missing_ok=True)
        record = self.valid_record(shard) if keep else None
        if record is not None and segment not in (None, record.segment):
            record = None
        for file in revisions_of(self.commits, shard)[0]:
            if record is None or file.name != record.name:
                lease.check()
                withdraw(file)
        if record is None:
            lease.check()
            self.remove_files(shard)


class _Staged:
    """One array's shard file on its way: rows are added in order, then the index."""

    def __init__(self, layout: ArrayLayout, path: Path) -> None:
        self.layout, self.path = layout, path
        self.file = path.open("xb", buffering=2**20)
        self.rows_crc32c: list[int | None] = []
        self.rows_bytes: list[int | None] = []
        self.size = self.crc32 = 0  # known once it was read back
        self._index = b""

    def add(self, row: np.ndarray | None) -> None:
        if row is None:
            self.rows_crc32c.append(None)
            self.rows_bytes.append(None)
            return
        chunk = self.layout.pack(row)
        checksum, length = crc32c(chunk), chunk.nbytes if isinstance(chunk, np.ndarray) else len(chunk)
        self.rows_crc32c.append(checksum)
        self.rows_bytes.append(length)
        self.file.write(chunk)
        self.file.write(checksum.to_bytes(CRC_BYTES, "little"))

    def add_batch(self, rows: np.ndarray, valid: np.ndarray) -> None:
        """As `add` for each of `rows` (n, *row_shape), where `valid` (n,) is False for None; small rows cost less."""
        if self.layout.compress != "none" or self.layout.row_bytes > _SMALL_ROW:
            for row, is_valid in zip(rows, valid, strict=True):
                self.add(row if is_valid else None)
            return
        rows = rows[valid].reshape(-1).view(np.uint8).reshape(-1, self.layout.row_bytes)
        slots = np.empty(len(rows), [("row", np.uint8, (self.layout.row_bytes,)), ("crc32c", "<u4")])
        slots["row"] = rows
        checksums = [extend(0, row) for row in rows]
        slots["crc32c"] = checksums
        self.file.write(slots)
        upcoming = iter(checksums)
        self.rows_crc32c += (next(upcoming) if is_valid else None for is_valid in valid)
        self.rows_bytes += (self.layout.row_bytes if is_valid else None for is_valid in valid)

    def close_with_index(self, first_offset: int) -> None:
        """`first_offset` is that of the first row in the shard."""
        valid = [(first_offset + i, n + CRC_BYTES) for i, n in enumerate(self.rows_bytes) if n is not None]
        self._index = self.layout.index(*zip(*valid, strict=True))
        self.file.write(self._index)
        self.file.flush()

    def compare(self) -> None:
        """Read the file back and compare every row, its checksum and the index with what was meant.

        Raises `CorruptFeatures`, or FileNotFoundError if it was swept up.
        """
        buffer = np.empty(max(n for n in self.rows_bytes if n is not None) + CRC_BYTES, np.uint8)
        total = size = 0
        with self.path.open("rb", buffering=_SMALL_ROW) as staged:
            for expected, length in zip(self.rows_crc32c, self.rows_bytes, strict=True):
                if expected is None:
                    continue
                slot, trailer = buffer[: length + CRC_BYTES], expected.to_bytes(CRC_BYTES, "little")
                whole = staged.readinto(slot) == len(slot) and slot[length:].tobytes() == trailer
                if not whole or extend(0, slot[:length]) != expected:
                    raise CorruptFeatures(f"{self.path}: reads back differently than written")
                total, size = zlib.crc32(slot, total), size + len(slot)
            index = staged.read()
        if index != self._index:
            raise CorruptFeatures(f"{self.path}: reads back differently than written")
        self.crc32, self.size = zlib.crc32(index, total), size + len(index)

    def entry(self) -> ShardFile:
        packed = None if self.layout.compress == "none" else self.rows_bytes
        return ShardFile(self.size, self.crc32, self.rows_crc32c, packed)


class OpenShard:
    """A leased shard being written: `append` every row in order, then `commit` or `drop`."""

    def __init__(self, writer: ShardWriter, lease: Lease, shard: int, rows: tuple[int, int], segment: str) -> None:
        self.writer, self.lease, self.shard, self.rows, self.segment = writer, lease, shard, rows, segment
        self._standing, self._revision = revisions_of(writer.commits, shard)  # to replace, and the number to publish
        self._temporary = None if files.is_local(writer.group) else Path(tempfile.mkdtemp(prefix="olavlm-staging-"))
        folder = self._temporary or writer.staging
        folder.mkdir(parents=True, exist_ok=True)
        self._staged: dict[str, _Staged] = {}
        self._reasons: list[dict[str, str] | None] = []
        self._images: list[str | None] = []
        self._fidelity: list[Fidelity] = []
        self._began = time.perf_counter()
        try:
            for name, array in writer.layout.arrays.items():
                self._staged[name] = _Staged(array, folder / f"{shard:06d}.{lease.nonce}.{name}")
        except BaseException:
            self.drop()
            raise

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

        Fidelity and norms are those of the rows appended, or those of the record `like` that they were copied from.
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
            writer.remove_files(self.shard)
        step("place")
        for staged in filled:
            self._unless_swept_up(self._place, staged)
        step("record")
        self.lease.check()
        record = Record(
            shard=self.shard,
            revision=self._revision,
            fingerprint=writer.fingerprint,
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
        try:
            record.publish(writer.commits)
        except FileExistsError:
            raise LeaseLost(f"shard {self.shard} was committed by another writer; this work is dropped") from None
        if not self.lease.held() and not self._is_in_place(record):
            # Taken for dead between the last check and the record, which is of files that are gone.
            # Removed and not withdrawn: the other publishes under this number, and `.withdrawn` would hide its record.
            files.remove(writer.commits / record.name)
            raise LeaseLost(f"shard {self.shard} was taken over by another writer; this work is dropped")
        step("release")
        self.drop()
        return record

    def drop(self) -> None:
        """Give the shard up (or, after `commit`, tidy): the staged names and the lease go."""
        try:
            for staged in self._staged.values():
                with contextlib.suppress(OSError):  # on a full disk: what could not be flushed is not wanted
                    staged.file.close()
                staged.path.unlink(missing_ok=True)
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
        finally:
            self.lease.release()

    def _place(self, staged: _Staged) -> None:
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
