"""Images in: from folders, published zips and fsspec URLs to RGB pictures.

`ImageRoots` answers a dataset's relative image path with the file's bytes; `decode_rgb` turns bytes into an
upright 8-bit RGB picture. Both raise `BadImage` with a reason for anything a single file can have wrong, so that
one file never stops a run, and `DatasetError` for a root that is wrong for all of them. No text of theirs shows what
is secret in a root's URL, see `redacted`.

Decoding follows the field's loader (`PIL.ImageOps.exif_transpose`, then `convert("RGB")`): the EXIF orientation
is applied, palettes and CMYK are converted by Pillow, alpha is dropped (the colours under it stay), grey is
repeated, and 16-bit samples keep their high byte, as Pillow itself does for 16-bit RGB.
"""

from __future__ import annotations

import io
import os
import re
import stat
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote, unquote

import fsspec
import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .errors import BadImage, DatasetError
from .zip_archive import MAX_BYTES, NotAZip, ZipArchive


def decode_rgb(data: bytes, image: str = "image") -> Image.Image:
    """Decode an image file's bytes to an upright RGB picture, 8 bits a channel.

    Raises `BadImage` (empty, not-an-image, truncated, decompression-bomb, unsupported-mode); `image` is the name
    that the error carries.
    """
    if not data:
        raise BadImage(image, "empty")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # of the whole process, where a library may have set it, as lmms-eval does
    try:
        picture = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadImage(image, "decompression-bomb", str(e)) from None
    except UnidentifiedImageError:
        raise BadImage(image, "not-an-image") from None
    except MemoryError:
        raise
    except Exception as e:  # on damaged files decoders raise nearly everything, RuntimeError and TypeError too
        raise BadImage(image, "truncated", str(e)) from None
    if picture.format in _NOT_DECODED:
        raise BadImage(image, "not-an-image", f"{picture.format} is not decoded")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise BadImage(image, "decompression-bomb", f"{picture.width} x {picture.height} pixels, limit {limit}")
    try:
        picture.load()
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:  # of a picture within, as in .ico
        raise BadImage(image, "decompression-bomb", str(e)) from None
    except Exception as e:
        raise BadImage(image, "truncated", str(e)) from None
    white_is_zero = getattr(picture, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
    picture = _upright(picture)
    if picture.mode == "F":
        raise BadImage(image, "unsupported-mode", "float samples have no defined white")
    if picture.mode.startswith("I"):  # 16-bit samples; convert("RGB") would clip them to white
        samples = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        if white_is_zero:  # a TIFF, which Pillow turns round at 8 bits only
            samples = 65535 - samples
        picture = Image.fromarray((samples >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


_NOT_DECODED = {"EPS", "WMF", "EMF", "MPEG", "HDF5", "GRIB", "BUFR"}
"""Formats that Pillow knows by name, but leaves to programs: EPS, a language, it would hand to Ghostscript."""


def _upright(picture: Image.Image) -> Image.Image:
    """As `PIL.ImageOps.exif_transpose`, which also rewrites the EXIF block and fails where that is damaged."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return picture
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def redacted(url: str) -> str:
    """`[PREFIX=]URL` without what may be secret in it: user and password, and the query (signatures, tokens).

    Chained URLs (`zip://::https://...`) too. What is no URL comes back as it is.
    """
    scheme, mark, rest = url.partition("://")
    return scheme + _QUERY.sub("", _USER.sub("", mark + rest)) if mark else url


def without_credentials(value: Any) -> Any:
    """`redacted` strings of a value of JSON's types, however deep: what may be kept with a run, or logged."""
    if isinstance(value, Mapping):
        return {key: without_credentials(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_credentials(v) for v in value]
    return redacted(value) if isinstance(value, str) else value


_USER = re.compile(r"(?<=://)[^/]*@")
_QUERY = re.compile(r"\?.*?(?=::[\w.+-]+:|$)", re.DOTALL)  # to the next URL of the chain
_URL_IN_TEXT = re.compile(r"[\w.+-]+://[^\s'\"<>]+")


def _message(error: Exception, location: str) -> str:
    """What a client says went wrong with `location`, in one line and without its secrets."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    for secret in _secrets(location):
        text = re.sub(secret, "***", text)
    return _URL_IN_TEXT.sub(lambda url: redacted(url[0]), text)


def _secrets(location: str) -> list[str]:
    """Patterns of the parts of a URL that a client or a server may show alone, longest first."""
    found = set()
    for user in re.findall(r"://([^/]*)@", location):
        found |= {user, user.partition(":")[2] or user}
    for query in re.findall(r"\?(.*)", location):
        values = (part.partition("=")[2] or part for part in re.split("[&;]", query))
        found |= {query, *(v for v in values if len(v) >= 8)}  # shorter ones are dates, versions and counts
    return [_spelt(unquote(secret)) for secret in sorted(found - {""}, key=len, reverse=True)]


def _spelt(secret: str) -> str:
    """A pattern for `secret` with any of its characters percent-encoded. A short one may be part of other words."""
    pattern = "".join(c if c.isalnum() else f"(?:{re.escape(c)}|(?i:{re.escape(quote(c, safe=''))}))" for c in secret)
    return pattern if len(secret) >= 8 else rf"(?<!\w){pattern}(?!\w)"


class _Root(Protocol):
    def read(self, path: str) -> bytes: ...  # raises FileNotFoundError, OSError


class _Folder:
    def __init__(self, location: str) -> None:
        self.location = Path(location)

    def read(self, path: str) -> bytes:
        file = self.location / path
        _regular(file.stat())  # before it is opened: that alone can rewind a tape
        with open(file, "rb", buffering=0, opener=_without_waiting) as f:
            status = os.fstat(f.fileno())
            _regular(status)  # it may have been replaced
            if status.st_size > MAX_BYTES:
                raise OSError(f"{status.st_size} bytes, limit {MAX_BYTES}")
            return f.readall()


def _without_waiting(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NONBLOCK)  # a FIFO would wait for its writer


def _regular(status: os.stat_result) -> None:
    """Raise OSError for what is no regular file: a device or a FIFO may never end."""
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise OSError(f"a {kind}, not a regular file")


_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device",
          stat.S_IFBLK: "device"}  # fmt: skip


class _LocalFile:
    """Parts of a file, for any number of threads, and for processes forked from this one."""

    def __init__(self, location: str) -> None:
        self._descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self.size = os.fstat(self._descriptor).st_size

    def pread(self, start: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, start)


class _Url:
    """A folder or a file in an fsspec file system, of which each process has its own: event loops survive no fork."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._opened: tuple[int, fsspec.AbstractFileSystem, str] | None = None

    def _connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), *fsspec.core.url_to_fs(self.location)
        return self._opened[1:]

    def _fetch(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        fs, _ = self._connect()
        try:
            return _cat_file(fs, name, start, end)
        except (FileNotFoundError, NotADirectoryError, MemoryError, FileTooLarge):
            raise
        except Exception as e:  # clients raise their own: botocore's and some of aiohttp's are no OSError
            raise OSError(_message(e, self.location)) from None

    def exists(self) -> bool:
        fs, base = self._connect()
        if not _is_web(base):
            return fs.exists(base)
        try:
            _cat_file(fs, base, 0, 1)
        except Exception as e:  # any answer will do: a folder of a web server need not be a page
            if not isinstance(e, FileNotFoundError | FileTooLarge) and not hasattr(e, "status"):
                raise
        return True

    def is_zip(self) -> bool:
        fs, base = self._connect()
        return base.partition("?")[0].lower().endswith(".zip") and (_is_web(base) or fs.isfile(base))

    def read(self, path: str) -> bytes:
        _, base = self._connect()
        if _is_web(base):
            folder, mark, query = base.partition("?")
            return self._fetch(f"{folder.rstrip('/')}/{quote(path)}{mark}{query}")
        return self._fetch(f"{base.rstrip('/')}/{path}")

    @property
    def size(self) -> int:
        fs, base = self._connect()
        if not _is_web(base):
            return fs.size(base)
        size = fs.size(base)
        if not size:
            raise ValueError("the server does not tell its size")
        with fs.open(base, block_size=2**16, cache_type="none", size=size) as f:
            f.seek(size - 1)  # a server that answers no ranges is refused here, before it sends all of it
            f.read(1)
        return size

    def pread(self, start: int, length: int) -> bytes:
        try:
            data = self._fetch(self._connect()[1], start, start + length) if length else b""
        except FileNotFoundError:
            raise OSError("the zip is gone") from None
        if len(data) != length:
            raise OSError(f"{len(data)} bytes came for {length} asked for")
        return data

    def __reduce__(self):
        return type(self), (self.location,)


def _is_web(base: str) -> bool:
    return base.startswith(("http://", "https://"))


class FileTooLarge(OSError):
    """A file behind a URL is longer than what it may be."""


def _cat_file(fs: fsspec.AbstractFileSystem, name: str, start: int | None, end: int | None) -> bytes:
    """The bytes of a file, or of a part of it, in one request; `FileTooLarge` for a file of over `MAX_BYTES`."""
    if _is_web(name):
        from fsspec.asyn import sync
        from fsspec.implementations.http import HTTPFileSystem

        if isinstance(fs, HTTPFileSystem):  # none that keeps copies, as in simplecache::https://
            return sync(fs.loop, _body, fs, name, start, end)
    if end is not None:
        return fs.cat_file(name, start=start, end=end)
    try:
        data = fs.cat_file(name, start=0, end=MAX_BYTES + 1)
    except Exception as e:
        if "range" in str(e).lower() and fs.size(name) == 0:  # object stores have no range of an empty file
            return b""
        raise
    if len(data) > MAX_BYTES:
        raise FileTooLarge(f"at least {len(data)} bytes, limit {MAX_BYTES}")
    return data


_PART = 2**16  # bytes of a body taken at once, and so the most that is taken beyond the limit


async def _body(fs: fsspec.AbstractFileSystem, url: str, start: int | None, end: int | None) -> bytes:
    """As an `HTTPFileSystem` fetches it, but of a body that is too long, and may never end, only the beginning."""
    limit, options = MAX_BYTES, fs.kwargs
    if end is not None:
        limit = end - start
        options = {**options, "headers": {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **options) as response:
        size, received, parts = response.content_length or 0, 0, []
        async for part in response.content.iter_chunked(_PART):  # unpacked, where the server packs
            parts.append(part)
            received += len(part)
            if max(size, received) > limit:
                break
        if response.status == HTTPStatus.NOT_FOUND:
            raise FileNotFoundError(url)
        response.raise_for_status()
    if max(size, received) > limit:
        raise FileTooLarge(f"at least {max(size, received)} bytes, limit {limit}")
    return b"".join(parts)


class _Zip:
    """A zip as published, or a folder in it, on a disk or behind a URL."""

    def __init__(self, location: str, folder: str = "") -> None:
        self.location, self.folder = location, folder
        try:
            path = _local_path(location)
            file = _Url(location) if path is None else _LocalFile(path)
            self._archive = ZipArchive(file.size, file.pread)
        except NotAZip as e:
            raise DatasetError(
                f"image root {redacted(location)} is a file but not a zip that can be read ({e}); give a folder, a zip "
                "file or an fsspec URL"
            ) from None
        except Exception as e:
            raise _not_opened(location, e) from None

    def read(self, path: str) -> bytes:
        return self._archive.read(f"{self.folder}/{path}" if self.folder else path)

    def __reduce__(self):
        return type(self), (self.location, self.folder)


def _not_opened(location: str, error: Exception) -> DatasetError:
    return DatasetError(f"image root {redacted(location)} cannot be opened: {_message(error, location)}")


def _open_root(location: str) -> _Root:
    if chained := re.fullmatch(r"zip://(.*?)::(.+)", location, re.DOTALL):
        return _Zip(chained[2], chained[1].strip("/"))
    path = _local_path(location)
    if path is not None:
        if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises for a name that is too long
            return _Folder(path)
        if os.path.isfile(path):  # noqa: PTH113
            return _Zip(path)
    else:
        url = _Url(location)
        try:
            if url.is_zip():
                return _Zip(location)
            if url.exists():
                return url
        except DatasetError:
            raise
        except Exception as e:  # an unknown protocol, a missing package, no network, no rights
            raise _not_opened(location, e) from None
    raise DatasetError(f"image root {redacted(location)} does not exist; give a folder, a zip file or an fsspec URL")


def _local_path(location: str) -> str | None:
    """The path of a local file or folder, None for one that is elsewhere."""
    if location.startswith(("file://", "local://")):
        return fsspec.core.url_to_fs(location)[1]
    return None if "://" in location else location


def split_root(spec: str) -> tuple[str, str]:
    """Prefix, or "", and location of `[PREFIX=]DIR|ZIP|URL`.

    A prefix is the beginning of relative paths: where there is one, no `/` begins the text. A relative location with a
    `=` in its name is known by being there.
    """
    prefix, eq, location = spec.partition("=")
    if not eq or spec.startswith("/") or "://" in prefix or os.path.exists(spec):  # noqa: PTH110  Path.exists raises
        return "", spec
    return prefix.strip("/"), location


@dataclass(frozen=True)
class _Mount:
    prefix: str  # "" serves every path
    root: _Root


class ImageRoots:
    """The image roots of a dataset: `[PREFIX=]DIR|ZIP|URL`, several in one dataset.

    A root with a prefix serves the paths that begin with `PREFIX/`, looked up without it, and is asked before the
    roots without one, longest prefix first; roots without a prefix are asked in the order given. Safe to share
    between threads, to fork and to pickle into other processes. A URL is a folder, or a zip if it ends in `.zip` (or
    is written `zip://[FOLDER]::URL`), of which only the members asked for are fetched.

    Raises `DatasetError` if a root does not exist or is neither folder, zip nor URL.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        if not specs:
            raise DatasetError("no image root given; name at least one folder, zip file or fsspec URL")
        self.specs = [str(s) for s in specs]
        mounts = []
        for spec in self.specs:
            prefix, location = split_root(spec)
            mounts.append(_Mount(prefix, _open_root(location)))
        self._mounts = sorted(mounts, key=lambda m: -len(m.prefix))  # stable: unprefixed keep their order

    def read(self, image: str) -> bytes:
        """The bytes of `image`, a path relative to the roots.

        Raises `BadImage`: outside-root, missing or unreadable. Links inside a root are followed: the user put
        them there.
        """
        pure = PurePosixPath(image)
        if not image or pure.is_absolute() or ".." in pure.parts or "\0" in image or "\\" in image:
            raise BadImage(image, "outside-root", "an image path is relative, without '..' or backslashes")
        whole = str(pure)  # of "coco//etc/x" a prefix would leave "/etc/x", an absolute path
        for mount in self._mounts:
            if mount.prefix and not whole.startswith(mount.prefix + "/"):
                continue
            path = whole[len(mount.prefix) + 1 :] if mount.prefix else whole
            try:
                return mount.root.read(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, UnicodeEncodeError) as e:
                raise BadImage(image, "unreadable", getattr(e, "strerror", None) or str(e)) from None
        raise BadImage(image, "missing", f"not under {', '.join(map(redacted, self.specs))}")

    def open(self, image: str) -> Image.Image:
        """`decode_rgb(read(image))`."""
        return decode_rgb(self.read(image), image)
