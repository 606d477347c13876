"""A zip as published, read in place: an index of its members, then one positioned read a member.

The standard library's `zipfile` keeps several objects for every member, which 558K images make a third of a gigabyte,
and hands one file position around under a lock. Here the central directory stays the bytes it is, two arrays lead from
a name's hash into it, and there is neither a lock nor a position: any number of threads may read at once, and a forked
process reads through what its parent opened, in its parent's memory.

Members stored, deflated, bzip2 and LZMA; zip64; names as Windows tools write them (`a\\b.jpg`) and with a leading `./`;
of two members of one name the last counts, as when a zip was updated.
"""

from __future__ import annotations

import bisect
import bz2
import contextlib
import lzma
import stat
import struct
import zlib
from array import array
from collections.abc import Callable

import numpy as np

MAX_BYTES = 2**30
"""Of one member, packed or unpacked. A larger one is refused: no photograph is that large, and a zip bomb is."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of the central directory; name, extra field and comment follow
_LENGTHS = struct.Struct("<4s24x3H12x")  # of an entry: its signature, and the lengths of what follows
_MEMBER = struct.Struct("<4s5H3L2H")  # what precedes a member's bytes; name and extra field come between
_LOCAL_EXTRA = 64  # read ahead for a member's own extra field, whose length the central directory does not tell

_ENCRYPTED, _PATCHED, _UTF8 = 0x1, 0x20, 0x800  # bits of an entry's flags
_UNIX = 3  # the system that an entry was made on


class NotAZip(ValueError):
    """The file is no zip, or its central directory is damaged."""


class ZipArchive:
    """The members of a zip of `size` bytes, of which `pread(start, length)` gives any part.

    Raises `NotAZip`, and whatever `pread` raises.
    """

    def __init__(self, size: int, pread: Callable[[int, int], bytes]) -> None:
        self._size, self._pread = size, pread
        try:
            self._directory, self._shift = self._read_directory()
            self._hashes, self._entries = _index(self._directory)
        except struct.error:
            raise NotAZip("its central directory is cut off") from None

    def read(self, path: str) -> bytes:
        """The bytes of one member, checked against its checksum.

        Raises FileNotFoundError, or OSError saying what is wrong with this member.
        """
        at = self._find(path)
        (_, made_by, _, flags, method, _, _, crc, packed_size, size, name_length, extra_length, _, _, _, attributes,
         start) = _ENTRY.unpack_from(self._directory, at)  # fmt: skip
        name_at = at + _ENTRY.size
        name = self._directory[name_at : name_at + name_length]
        try:
            extra = self._directory[name_at + name_length : name_at + name_length + extra_length]
            size, packed_size, start = _wide([size, packed_size, start], extra)
            if flags & _ENCRYPTED:
                raise OSError("encrypted in the zip")
            if made_by >> 8 == _UNIX and stat.S_ISLNK(attributes >> 16):
                raise OSError("a link within the zip")
            if flags & _PATCHED or method not in _UNPACK:
                raise OSError(f"packed in the zip by a method not supported ({method})")
            if max(size, packed_size) > MAX_BYTES:
                raise OSError(f"{max(size, packed_size)} bytes in the zip, limit {MAX_BYTES}")
            content = _UNPACK[method](self._packed(start + self._shift, packed_size, name), size)
        except (zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError) as e:
            raise OSError(f"damaged in the zip: {e}") from None
        if len(content) != size or zlib.crc32(content) != crc:
            raise OSError("damaged in the zip: its length or checksum is wrong")
        return content

    def _find(self, path: str) -> int:
        """Where the central directory has `path`. Names are UTF-8, or code page 437 where no flag says UTF-8."""
        at = self._entry(path.encode())
        if at is None and not path.isascii():
            with contextlib.suppress(UnicodeEncodeError):
                at = self._entry(path.encode("cp437"))
            if at is not None and _ENTRY.unpack_from(self._directory, at)[3] & _UTF8:
                at = None
        if at is None:
            raise FileNotFoundError(path)
        return at

    def _entry(self, name: bytes) -> int | None:
        """Where the central directory has the last member of this name."""
        i = bisect.bisect_right(self._hashes, hash(name)) - 1
        while i >= 0 and self._hashes[i] == hash(name):
            at = self._entries[i]
            if _plain(self._directory, at, _LENGTHS.unpack_from(self._directory, at)[1]) == name:
                return at
            i -= 1
        return None

    def _packed(self, start: int, length: int, name: bytes) -> memoryview:
        """A member's packed bytes; one read, as long as its own extra field is no surprise."""
        if start >= self._size:
            raise ValueError("it lies beyond the end of the zip")
        data = self._pread(start, min(_MEMBER.size + len(name) + _LOCAL_EXTRA + length, self._size - start))
        signature, *_, name_length, extra_length = _MEMBER.unpack_from(data)
        skip = _MEMBER.size + name_length + extra_length
        if signature != b"PK\3\4" or data[_MEMBER.size : _MEMBER.size + name_length] != name:
            raise ValueError("another member lies in its place")
        if start + skip + length > self._size:
            raise ValueError("it goes beyond the end of the zip")
        if len(data) < skip + length:
            data += self._pread(start + len(data), skip + length - len(data))
        return memoryview(data)[skip : skip + length]

    def _read_directory(self) -> tuple[bytes, int]:
        """The central directory, and by how much offsets in it fall short (a zip may have something before it)."""
        length = min(self._size, 2**16 + 2 * _END64.size)
        tail = self._pread(self._size - length, length)
        end = tail.rfind(b"PK\5\6")
        while end >= 0 and len(tail) - end < _END.size:
            end = tail.rfind(b"PK\5\6", 0, end)
        if end < 0:
            raise NotAZip("it has no end-of-directory record")
        _, disk, _, _, _, length, offset, _ = _END.unpack_from(tail, end)
        locator = end - _LOCATOR64.size
        if locator >= 0 and tail.startswith(b"PK\6\7", locator):
            end = tail.rfind(b"PK\6\6", 0, locator)
            if end < 0:
                raise NotAZip("its zip64 end-of-directory record is missing")
            _, _, _, _, disk, _, _, _, length, offset = _END64.unpack_from(tail, end)
        if disk:
            raise NotAZip("it is one part of a split archive")
        start = self._size - len(tail) + end - length
        if start < 0 or offset > start:
            raise NotAZip("its central directory is not where it says")
        directory = self._pread(start, length)
        if len(directory) != length:
            raise NotAZip("its central directory is cut off")
        return directory, start - offset


def _index(directory: bytes) -> tuple[array[int], array[int]]:
    """The hashes of the members' names, ascending, and where their entries are; of equal hashes in their order."""
    hashes, entries = array("q"), array("q")
    at, unpack, size = 0, _LENGTHS.unpack_from, _LENGTHS.size
    while at < len(directory):
        signature, name_length, extra_length, comment_length = unpack(directory, at)
        if signature != b"PK\1\2":
            raise NotAZip("its central directory is damaged")
        name = _plain(directory, at, name_length)
        if not name.endswith(b"/"):  # a folder
            hashes.append(hash(name))
            entries.append(at)
        at += size + name_length + extra_length + comment_length
    if at != len(directory):
        raise NotAZip("its central directory is cut off")
    order = np.argsort(np.array(hashes, np.int64), kind="stable")
    ordered = (np.array(part, np.int64)[order].tobytes() for part in (hashes, entries))
    return array("q", next(ordered)), array("q", next(ordered))


def _plain(directory: bytes, at: int, length: int) -> bytes:
    """The name of an entry as a plain relative path; a folder's ends with a slash."""
    name = directory[at + _ENTRY.size : at + _ENTRY.size + length]
    if b"\\" in name or b"./" in name or b"//" in name or name.startswith(b"/"):
        parts = name.replace(b"\\", b"/").split(b"/")
        name = b"/".join([p for p in parts[:-1] if p not in (b"", b".")] + parts[-1:])
    return name


def _wide(values: list[int], extra: bytes) -> list[int]:
    """Size, packed size and offset; those that do not fit 32 bits are in the zip64 extra field, in this order."""
    if 0xFFFFFFFF in values:
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == 1:
                wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
                return [next(wide, v) if v == 0xFFFFFFFF else v for v in values]
            at += 4 + length
    return values


# Each gives at most one byte more than the size it is told, however much there is.


def _inflate(packed: memoryview, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)


def _bunzip(packed: memoryview, size: int) -> bytes:
    try:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    except OSError as e:  # not the file's
        raise ValueError(str(e)) from None


def _unlzma(packed: memoryview, size: int) -> bytes:
    """A zip has a version, then the length of the coder's properties (5), these, and no size: not quite `.lzma`."""
    (length,) = struct.unpack_from("<2xH", packed)
    if length != 5:
        raise ValueError("unknown LZMA properties")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_BYTES)
    return unpacker.decompress(bytes(packed[4:9]) + b"\xff" * 8 + bytes(packed[9:]), size + 1)


_UNPACK: dict[int, Callable[[memoryview, int], bytes]] = {
    0: lambda packed, size: bytes(packed),
    8: _inflate,
    12: _bunzip,
    14: _unlzma,
}
