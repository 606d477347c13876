"""Images in: from folders, published zips and fsspec URLs to RGB pictures.

`ImageRoots` answers a dataset's relative image path with the file's bytes; `decode_rgb` turns bytes into an
upright 8-bit RGB picture. Both raise `BadImage` with a reason for anything a single file can have wrong, so that
one file never stops a run, and `DatasetError` for a root that is wrong for all of them.

Decoding follows the field's loader (`PIL.ImageOps.exif_transpose`, then `convert("RGB")`): the EXIF orientation
is applied, palettes and CMYK are converted by Pillow, alpha is dropped (the colours under it stay), grey is
repeated, and 16-bit samples keep their high byte, as Pillow itself does for 16-bit RGB.
"""

from __future__ import annotations

import io
import lzma
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import fsspec
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import BadImage, DatasetError


def decode_rgb(data: bytes, image: str = "image") -> Image.Image:
    """Decode an image file's bytes to an upright RGB picture, 8 bits a channel.

    Raises `BadImage` (empty, not-an-image, truncated, decompression-bomb, unsupported-mode); `image` is the name
    that the error carries.
    """
    if not data:
        raise BadImage(image, "empty")
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
    picture = _upright(picture)
    if picture.mode == "F":
        raise BadImage(image, "unsupported-mode", "float samples have no defined white")
    if picture.mode.startswith("I"):  # 16-bit samples; convert("RGB") would clip them to white
        samples = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        picture = Image.fromarray((samples >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


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


class _Root(Protocol):
    def read(self, path: str) -> bytes: ...  # raises FileNotFoundError, OSError


class _Folder:
    def __init__(self, location: str) -> None:
        self.location = Path(location)

    def read(self, path: str) -> bytes:
        return (self.location / path).read_bytes()


class _Zip:
    """A zip as published, read in place by any number of threads; each process opens its own handle."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._lock = threading.Lock()
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._archive()  # a damaged zip is an error now, not at the first image

    def _archive(self) -> zipfile.ZipFile:
        opened = self._opened
        if opened is not None and opened[0] == os.getpid():
            return opened[1]  # without the lock, which then no fork can copy while it is taken
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                try:
                    self._opened = os.getpid(), zipfile.ZipFile(self.location)
                except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:
                    raise DatasetError(f"image root {self.location} is not a readable zip file: {e}") from None
            return self._opened[1]

    def read(self, path: str) -> bytes:
        try:
            return self._archive().read(path)
        except KeyError:
            raise FileNotFoundError(path) from None
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as e:  # damaged, or locked
            raise OSError(str(e)) from None

    def __getstate__(self):
        return {"location": self.location}

    def __setstate__(self, state):
        self.location, self._lock, self._opened = state["location"], threading.Lock(), None


class _Url:
    """An fsspec file system; each process has its own, as their event loops do not survive a fork."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._opened: tuple[int, fsspec.AbstractFileSystem, str] | None = None
        try:
            fs, base = self._connect()
            exists = fs.exists(base)
        except Exception as e:  # an unknown protocol, a missing package, no network, no rights
            raise DatasetError(f"image root {location} cannot be opened: {e}") from None
        if not exists:
            raise DatasetError(f"image root {location} does not exist; give a folder, a zip file or an fsspec URL")

    def _connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), *fsspec.core.url_to_fs(self.location)
        return self._opened[1:]

    def read(self, path: str) -> bytes:
        fs, base = self._connect()
        try:
            return fs.cat_file(f"{base.rstrip('/')}/{path}")
        except OSError:
            raise
        except Exception as e:  # clients raise their own: botocore's and aiohttp's are no OSError
            raise OSError(f"{type(e).__name__}: {e}") from None

    def __getstate__(self):
        return {"location": self.location, "_opened": None}


def _open_root(location: str) -> _Root:
    if "://" in location:
        return _Url(location)
    if Path(location).is_dir():
        return _Folder(location)
    if Path(location).is_file():
        if zipfile.is_zipfile(location):
            return _Zip(location)
        raise DatasetError(f"image root {location} is a file but not a zip; give a folder, a zip file or an fsspec URL")
    raise DatasetError(f"image root {location} does not exist; give a folder, a zip file or an fsspec URL")


@dataclass(frozen=True)
class _Mount:
    prefix: str  # "" serves every path
    root: _Root


class ImageRoots:
    """The image roots of a dataset: `[PREFIX=]DIR|ZIP|URL`, several in one dataset.

    A root with a prefix serves the paths that begin with `PREFIX/`, looked up without it, and is asked before the
    roots without one, longest prefix first; roots without a prefix are asked in the order given. Safe to share
    between threads and to pickle into other processes.

    Raises `DatasetError` if a root does not exist or is neither folder, zip nor URL.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        if not specs:
            raise DatasetError("no image root given; name at least one folder, zip file or fsspec URL")
        self.specs = [str(s) for s in specs]
        mounts = []
        for spec in self.specs:
            prefix, eq, location = spec.partition("=")
            if not eq or "://" in prefix or Path(spec).exists():
                prefix, location = "", spec
            mounts.append(_Mount(prefix.strip("/"), _open_root(location)))
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
        raise BadImage(image, "missing", f"not under {', '.join(self.specs)}")

    def open(self, image: str) -> Image.Image:
        """`decode_rgb(read(image))`."""
        return decode_rgb(self.read(image), image)
