"""Files that appear whole or not at all, and never in place of another: on a local disk or an object store.

A location is a `pathlib.Path`, or for an fsspec URL (`s3://bucket/features`) a `UPath`; every access of the store goes
through the functions here, which know both. `publish` is the one way in which plans, leases and records come to be:

- on a file system the content is written under a private name beside the target, flushed to the disk, and linked to
  its public name, which fails if that name exists;
- on an object store it is one conditional PUT (`If-None-Match: *`), which fails if the object exists.

A reader therefore never sees half a file, and of two writers exactly one succeeds. Whether a server keeps that promise
is tried by `probe` before a store is written there.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import fsspec

from .errors import MissingExtra, StoreError
from .images import redacted

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = "Path | UPath"
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EISDIR)
"""Errors of a name whose content is lost: a sector that its disk cannot give back, a folder in a file's place."""
_LARGEST_PUT = 5 * 2**30  # bytes that S3 takes in one request
_PRIVATE = re.compile(r"\..+\.[0-9a-f]{16}")
_TRIES = 5  # of a conditional PUT that the server could not decide


def location(path: str | os.PathLike) -> Location:
    """Where `path` is: a `Path`, or a `UPath` for a URL other than `file://`. StoreError for an unknown protocol."""
    text = str(path)
    if "://" not in text:
        return Path(path)
    if text.startswith(("file://", "local://")):
        return Path(fsspec.core.strip_protocol(text))
    from upath import UPath

    try:
        fsspec.get_filesystem_class(text.partition("://")[0])  # is its package installed?
        return UPath(text.rstrip("/"), use_listings_cache=False)  # a cached listing would hide what others commit
    except ValueError as e:
        raise StoreError(f"store {redacted(text)} cannot be opened: {e}") from None
    except ImportError as e:
        raise _missing(text, e) from None


def _missing(url: str, error: ImportError) -> MissingExtra:
    remedy = "pip install 'olavlm[s3]'" if url.startswith(("s3://", "s3a://")) else "install that package"
    return MissingExtra(f"store {redacted(url)} cannot be opened ({error}): {remedy}")


def is_local(file: Location) -> bool:
    """Whether it lies on a file system of this machine."""
    return isinstance(file, Path)


def _remote(file: UPath) -> fsspec.AbstractFileSystem:
    """This process's client: fsspec keeps one a process, as their event loops do not survive a fork."""
    return fsspec.filesystem(file.protocol, **file.storage_options)


def _ask(method: Callable, *args: object, **options: object):
    """Call a client. Errors that are not OSErrors (botocore's, aiohttp's) become one."""
    try:
        return method(*args, **options)
    except OSError:
        raise
    except Exception as e:
        raise OSError(f"{args[0] if args else ''}: {type(e).__name__}: {e}") from None


@dataclass(frozen=True)
class Stamp:
    """Tells one content of a name from another without reading it, by its size in bytes and its version.

    `changed` is when it was written, in seconds of the store's clock; 0 where the store does not say.
    """

    size: int
    version: str
    changed: float = 0.0

    @classmethod
    def of_local(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_size, f"{stat.st_mtime_ns}.{stat.st_ctime_ns}", stat.st_mtime)

    @classmethod
    def of_object(cls, info: dict) -> Stamp:
        changed = info.get("LastModified") or info.get("created")
        version = info.get("ETag") or info.get("etag") or changed or ""
        return cls(
            int(info["size"]), str(version).strip('"'), changed.timestamp() if hasattr(changed, "timestamp") else 0.0
        )


def read(file: Location) -> bytes:
    """The whole file; FileNotFoundError if there is none."""
    if is_local(file):
        return file.read_bytes()
    client = _remote(file)
    method = getattr(client, "_cat_file", client.cat_file)  # the asynchronous one tells its options
    # Where a client can ask for parts at once (s3fs from 2026.3), it would ask for the size first.
    one = {"max_concurrency": 1} if "max_concurrency" in inspect.signature(method).parameters else {}
    return _ask(client.cat_file, file.path, **one)


def read_ranges(files: Sequence[UPath], starts: Sequence[int], stops: Sequence[int]) -> list[bytes | Exception]:
    """Bytes [start, stop) of each object, asked for at once; an exception in place of what could not be read.

    As of a file, what is asked for beyond the end is not there: fewer bytes, or none.
    """
    if not files:
        return []
    paths = [f.path for f in files]
    answers = _ask(_remote(files[0]).cat_ranges, paths, list(starts), list(stops), on_error="return")
    return [b"" if isinstance(a, OSError) and _error_code(a) in ("InvalidRange", "416") else a for a in answers]


def _error_code(error: OSError) -> str:
    """What an S3 server calls the error, empty if it is none of S3's."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def stamp(file: Location) -> Stamp | None:
    """Size and time of one file; None if there is none."""
    try:
        if is_local(file):
            return Stamp.of_local(file.stat())
        info = _ask(_remote(file).info, file.path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Stamp.of_object(info) if info["type"] == "file" else None


def size(file: Location) -> int | None:
    """In bytes; None if there is no such file."""
    found = stamp(file)
    return None if found is None else found.size


def exists(file: Location) -> bool:
    """Whether there is a file or folder, or an object."""
    return stamp(file) is not None


def listing(folder: Location, prefix: str = "") -> dict[str, Stamp]:
    """The files in `folder` whose names begin with `prefix`, by name; empty if there is no folder."""
    if is_local(folder):
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    if entry.name.startswith(prefix) and entry.is_file():
                        found[entry.name] = Stamp.of_local(entry.stat())
        return found
    return {
        name: Stamp.of_object(info)
        for name, info in _entries(folder, prefix).items()
        if info["type"] == "file" and name.startswith(prefix)
    }


def names(folder: Location) -> list[str]:
    """The names in `folder`, of files and folders, sorted; [] if there is no folder."""
    if is_local(folder):
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208 - names are what is wanted
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(_entries(folder))


def _entries(folder: UPath, prefix: str = "") -> dict[str, dict]:
    try:
        if prefix:  # which servers sift, where a folder of many names takes a request a thousand
            infos = _ask(_remote(folder).find, folder.path, prefix=prefix, detail=True).values()
        else:
            infos = _ask(_remote(folder).ls, folder.path, detail=True)
    except FileNotFoundError:
        return {}
    inside, found = folder.path.strip("/"), {}
    for info in infos:
        parent, _, name = info["name"].strip("/").rpartition("/")
        if parent == inside:  # else the folder's own marker object, or what is further down
            found[name] = info
    return found


def sizes_below(folder: Location) -> dict[str, int]:
    """Bytes of every file under `folder`, by its path relative to it with `/`."""
    if is_local(folder):
        found = {}
        for where, _, in_folder in os.walk(folder):
            for name in in_folder:
                file = Path(where, name)
                with contextlib.suppress(FileNotFoundError):
                    found[file.relative_to(folder).as_posix()] = file.stat().st_size
        return found
    base = folder.path.strip("/")
    infos = _ask(_remote(folder).find, folder.path, detail=True)
    return {name.strip("/").removeprefix(base).lstrip("/"): info["size"] for name, info in infos.items()}


def fsync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """With its parents, each name durable; nothing if it is there."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        fsync_folder(new.parent)


@contextlib.contextmanager
def _private(file: Path, content: bytes | memoryview):
    """`content` on the disk under a private name beside `file`."""
    make_folder(file.parent)
    private = file.parent / f".{file.name}.{secrets.token_hex(8)}"
    try:
        with private.open("xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        yield private
    finally:
        with contextlib.suppress(OSError):  # what it was for is decided; `gc` removes it
            private.unlink(missing_ok=True)


def publish(file: Location, content: bytes | memoryview) -> None:
    """Create `file` with `content`, durable and all at once; raises FileExistsError if it is there already.

    On an object store a file that is there with this very content counts as created: a client that was not answered
    asks again, and the server refuses what it did the first time.
    """
    if not is_local(file):
        try:
            _put_new(file, bytes(content))
        except FileExistsError:
            if not _holds(file, bytes(content)):
                raise
        return
    with _private(file, content) as private:
        os.link(private, file)
    try:
        fsync_folder(file.parent)
    except OSError:  # what is reported as failed must not be there
        file.unlink(missing_ok=True)
        raise


def _put_new(file: UPath, content: bytes) -> None:
    """One conditional PUT, whatever the size: servers that heed its condition may ignore that of an upload in parts."""
    whole = {"chunksize": _LARGEST_PUT} if file.protocol in ("s3", "s3a") else {}
    for left in reversed(range(_TRIES)):
        try:
            _ask(_remote(file).pipe_file, file.path, content, mode="create", **whole)
            return
        except OSError as e:
            if not left or _error_code(e) != "ConditionalRequestConflict":
                raise
            time.sleep(0.05 * random.random())  # two have met on the server, which asks both for another try


def _holds(file: UPath, content: bytes) -> bool:
    try:
        return size(file) == len(content) and read(file) == content
    except FileNotFoundError:  # removed in between
        return False


def replace(file: Location, content: bytes | memoryview) -> None:
    """Give `file` new content, durable and all at once, whether it is there or not."""
    if not is_local(file):
        _ask(_remote(file).pipe_file, file.path, bytes(content))
        return
    with _private(file, content) as private:
        private.replace(file)
    fsync_folder(file.parent)


def place(staged: Path, file: Location) -> None:
    """Give a finished, flushed local file its public name; FileExistsError if that is taken.

    On a file system `staged` is on the same one and is linked; to an object store it is sent by one conditional PUT.
    """
    if not is_local(file):
        publish(file, staged.read_bytes())
        if (there := size(file)) != staged.stat().st_size:
            raise OSError(f"{file} has {there} bytes, {staged.stat().st_size} were sent")
        return
    make_folder(file.parent)
    os.link(staged, file)


def remove(file: Location) -> None:
    """If it is there."""
    if is_local(file):
        with contextlib.suppress(NotADirectoryError):
            file.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        _ask(_remote(file).rm_file, file.path)


def is_private(name: str) -> bool:
    """Whether it is the name that a writer gives to what nobody else is to see, and not a dotfile of the user's."""
    return _PRIVATE.fullmatch(name) is not None


def remove_tree(folder: Location, first: Callable[[str], object] | None = None) -> None:
    """With all below it, if it is there.

    On a file system it vanishes at once, by a rename; on an object store object by object, in the order of `first`. Of
    a link to a folder, the link goes and all that is in the folder.
    """
    if is_local(folder):
        dropped = folder.parent / f".dropped.{folder.name.lstrip('.')}.{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(dropped)
            if not dropped.is_symlink():
                shutil.rmtree(dropped)
                return
            for child in dropped.iterdir() if dropped.is_dir() else ():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            dropped.unlink()
        return
    client = _remote(folder)
    for name in sorted(_ask(client.find, folder.path), key=first or str):  # not `rm`, which takes a name for a pattern
        with contextlib.suppress(FileNotFoundError):
            _ask(client.rm_file, name)


def changed_at(file: Location) -> float:
    """When it was last written, in seconds of the store's own clock; FileNotFoundError if there is none."""
    if is_local(file):
        return file.stat().st_mtime
    return _ask(_remote(file).modified, file.path).timestamp()


def clock(folder: Location) -> float:
    """The store's own clock, which may not be this host's, in seconds."""
    probe = folder / f".clock.{secrets.token_hex(8)}"
    try:
        if is_local(probe):
            probe.touch()
        else:
            publish(probe, b"")
        return changed_at(probe)
    finally:
        remove(probe)


def refresh(file: Location) -> None:
    """Make `changed_at` now; FileNotFoundError if there is no such file."""
    if is_local(file):
        os.utime(file)
    else:
        replace(file, read(file))


def probe(folder: Location) -> None:
    """Refuse to write where two writers could both believe they were first.

    Creates one name twice: the second must fail. Raises `StoreError` if it does not.
    """
    trial = folder / f".probe.{secrets.token_hex(8)}"
    try:
        publish(trial, b"first")
        try:
            publish(trial, b"second")
        except FileExistsError:  # as it must be
            first = read(trial) == b"first"
        else:
            first = False
    except OSError as e:
        raise StoreError(f"{folder} cannot be written: {e}") from None
    finally:
        with contextlib.suppress(OSError):
            remove(trial)
    if not first:
        raise StoreError(
            f"{folder} lets a second exclusive create replace the first, so two writers could overwrite each other; "
            "it can be read but not written: use a store with conditional PUT (If-None-Match), or a file system"
        )
