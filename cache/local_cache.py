"""What was read of remote stores, kept on a local disk: bounded in bytes, least recently used out.

    >>> store = FeatureStore("s3://bucket/features", local_cache=LocalCache("/scratch/rows", max_bytes=50 * 10**9))

Of every shard file that is read there is a sparse local file, in which what was fetched lies at its own offset. Nothing
else is kept, and nothing is locked: what a reader takes from it is compared with the commit record's crc32c as any row
is, so that a hole, a row of which a killed process wrote a part, and damage are all the same, not there, and are
fetched and written again. Processes that write the same row write the same bytes. The file's name follows from the
store, the array and the record's revision and checksum: rows of a shard that was replaced are never asked for again,
and go as the least recently used do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from .errors import StoreError

SUFFIX = ".rows"
_KEPT = 0.9  # of the bound, after room was made
_WRITERS = 32  # processes that may write what is left of it between two looks at the folder
_BLOCK = 4096  # bytes that a file system gives out at once


class LocalCache:
    """A folder that any number of processes share, each with a `LocalCache` of its own or one that it was forked with.

    Args:
        folder: made if it is not there. Files in it that are not of the cache are left alone.
        max_bytes: of disk space, for all stores together. Holds with up to 32 processes that write at once.

    Raises:
        StoreError: the folder cannot be written, or the disk has no room for so much.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), int(max_bytes)
        trial = self.folder / f".probe.{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"probe")
            trial.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as e:
            raise StoreError(f"local cache {folder} cannot be written ({e.strerror}); name another folder") from None
        self._unseen = self.max_bytes  # bytes written since the last look at the folder, which is still to come
        if self.max_bytes > (room := free + sum(size for _, size, _ in self._files())):
            raise StoreError(
                f"local cache {folder} is to hold {self.max_bytes / 1e9:.1f} GB and its disk has room for "
                f"{room / 1e9:.1f} GB; give it less, or another disk"
            )
        self._told = _SharedFlag()
        self._full = False

    def file(self, *identity: object) -> Path:
        """For the bytes of the remote shard file that these values, in their order, tell from all others."""
        digest = hashlib.sha256("\0".join(map(str, identity)).encode()).hexdigest()
        return self.folder / f"{digest[:40]}{SUFFIX}"

    def read(self, file: Path, start: int, stop: int) -> bytes:
        """What is there of bytes [start, stop), which may be nothing, zeros or damaged: the caller has checksums."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        except OSError as e:
            self._tell(e)
            return b""
        try:
            return os.pread(descriptor, stop - start, start)
        except OSError as e:
            self._tell(e)
            return b""
        finally:
            os.close(descriptor)

    def used(self, file: Path) -> None:
        """Note that what was read of a file was sound, so that the file stays longer than others."""
        with contextlib.suppress(OSError):  # another process made room
            now = time.time_ns()
            os.utime(file, ns=(now, now))

    def keep(self, file: Path, start: int, content: bytes) -> None:
        """Write what was fetched, and found sound, at its offset. A disk that fails is told of once, and left alone."""
        size = (len(content) // _BLOCK + 2) * _BLOCK  # it may begin and end within a block
        if self._full or size > _KEPT * self.max_bytes:
            return
        try:
            if self._unseen + size > (1 - _KEPT) * self.max_bytes / _WRITERS:
                self._make_room(size)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                written = os.pwrite(descriptor, content, start)
            finally:
                os.close(descriptor)
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self._full = True
            self._tell(e)
            return
        self._unseen += size
        self.used(file)

    def num_bytes(self) -> int:
        """Bytes of disk space in use now."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[int, int, str]]:
        """Time of the last use in nanoseconds, bytes of disk space and path, of each file."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # another process made room
                        about = entry.stat()
                        found.append((about.st_mtime_ns, about.st_blocks * 512, entry.path))
        return found

    def _make_room(self, wanted: int) -> None:
        """Remove the files that were used the longest ago, until `wanted` bytes fit below the part that is kept."""
        there = sorted(self._files())
        used = sum(size for _, size, _ in there)
        for _, size, path in there:
            if used + wanted <= _KEPT * self.max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - a path as scandir gives it
            used -= size
        self._unseen = 0

    def _tell(self, error: OSError) -> None:
        if self._told.set():
            print(
                f"warning: local cache {self.folder}: {error.strerror}; what is not in it is read from the store, and "
                "no longer kept",
                file=sys.stderr,
                flush=True,
            )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_told"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._told = _SharedFlag()


class _SharedFlag:
    """Set once, by one of a process and those that it forks."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> bool:
        """Whether it was not set before. Two at the very same moment may both hear yes."""
        before, self._byte[0] = self._byte[0], 1
        return not before
