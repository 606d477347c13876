"""Zips as they come: every way to write one is read as the standard library reads it, every damage is one member's."""

import base64
import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from olavlm.cache import BadImage, DatasetError, ImageRoots, zip_archive
from olavlm.cache.zip_archive import NotAZip, ZipArchive

BYTES = np.random.default_rng(0).bytes
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, before: bytes = b"", **options) -> bytes:
    file = io.BytesIO(before)
    file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file, "a" if before else "w", method, **options) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return file.getvalue()


def opened(data: bytes) -> ZipArchive:
    return ZipArchive(len(data), lambda start, length: data[start : start + length])


def says_of(archive: ZipArchive, name: str) -> str:
    with pytest.raises(OSError) as e:  # noqa: PT011
        archive.read(name)
    return str(e.value)


def by_hand(
    name: bytes, content: bytes, *, packed: bytes | None = None, method=0, flags=0, size=None, extra=b"", made_by=20,
    attributes=0, local_extra=b"", local_name: bytes | None = None,
) -> tuple[bytes, Callable[[int], bytes]]:  # fmt: skip
    """A member as it lies in a zip, and what gives its entry in the central directory from where it lies."""
    packed, local_name = content if packed is None else packed, name if local_name is None else local_name
    size, crc = len(content) if size is None else size, zlib.crc32(content)
    numbers = struct.pack("<5H3L", 20, flags, method, 0, 0, crc, len(packed), size)
    member = b"PK\3\4" + numbers + struct.pack("<2H", len(local_name), len(local_extra)) + local_name + local_extra

    def entry(start: int) -> bytes:
        lengths = struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, attributes, start)
        return b"PK\1\2" + struct.pack("<H", made_by) + numbers + lengths + name + extra

    return member + packed, entry


def joined(*members: tuple[bytes, Callable[[int], bytes]]) -> bytes:
    data, directory = b"", b""
    for member, entry in members:
        directory += entry(len(data))
        data += member
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(data), 0)
    return data + directory + end


WRITTEN = {
    "nothing": lambda m: zipped({}),
    "empty members": lambda m: zipped(dict.fromkeys(m, b"")),
    **{f"method {method}": lambda m, method=method: zipped(m, method) for method in METHODS},
    "something before it": lambda m: zipped(m, before=b"#!/bin/sh\n" * 50),
    "something before its zip64": lambda m: b"#!/bin/sh\n" * 50 + zip64(m),
    "zip64": lambda m: zip64(m),
    "to a pipe": lambda m: streamed(m),
    "a comment": lambda m: commented(m, b"x" * 65535),
    "a folder's entry": lambda m: zipped({"d/": b"", **m}),
}


def commented(members: dict[str, bytes], comment: bytes) -> bytes:
    file = io.BytesIO(zipped(members))
    with zipfile.ZipFile(file, "a") as z:
        z.comment = comment
    return file.getvalue()


def streamed(members: dict[str, bytes]) -> bytes:
    """Sizes and checksums follow the members' bytes: where these begin, they are zero."""

    class Pipe:
        def __init__(self):
            self.data = b""

        def write(self, data):
            self.data += data
            return len(data)

        def flush(self):
            pass

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    assert pipe.data[14:26] == bytes(12)  # checksum and sizes of the first
    return pipe.data


def zip64(members: dict[str, bytes]) -> bytes:
    """As a zip of more than 4 GB or 65535 members has it, from limits that are a few bytes here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in {"ZIP64_LIMIT": 100, "ZIP_FILECOUNT_LIMIT": 2}.items():
            patch.setattr(zipfile, name, limit)
        return zipped(members)


@pytest.mark.parametrize("how", WRITTEN)
def test_reads_what_the_standard_library_reads(how, rng):
    members = {f"d/{i}{'ü' * (i % 3)}.jpg": rng.bytes(rng.integers(0, 3000)) * int(1 + i % 4) for i in range(30)}
    data = WRITTEN[how](members)
    if "zip64" in how:
        assert b"PK\6\7" in data
        assert struct.pack("<L", 0xFFFFFFFF) in data  # of a size or an offset that stands in the extra field
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        expected = {name: z.read(name) for name in z.namelist() if not name.endswith("/")}
    archive = opened(data)
    assert {name: archive.read(name) for name in expected} == expected
    assert how == "nothing" or list(expected) == list(members)
    for absent in ("d", "d/", "0.jpg", "", "ü"):
        with pytest.raises(FileNotFoundError):
            archive.read(absent)


def test_a_comment_that_looks_like_an_end_is_no_end():
    data = commented({"a.jpg": b"a"}, b"PK\5\6")
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(data))
    assert opened(data).read("a.jpg") == b"a"


def test_zip64_fields_are_used_where_a_number_does_not_fit():
    """Only those that do not fit are in the extra field, size before packed size before offset."""
    content, wide = b"x" * 300, 0xFFFFFFFF
    size_only = by_hand(b"a", content, size=wide, extra=struct.pack("<2HQ", 1, 8, 300))
    after_another = by_hand(b"b", content, size=wide, extra=b"UT\5\0" + b"1" * 5 + struct.pack("<2H2Q", 1, 16, 300, 9))
    data = joined(size_only, after_another)
    assert opened(data).read("a") == opened(data).read("b") == content
    far = joined((b"z" * 1000, lambda _: b""), by_hand(b"c", content))
    at = far.index(b"PK\1\2")
    entry = far[at : at + 30] + struct.pack("<H", 12) + far[at + 32 : at + 42] + struct.pack("<L", wide) + b"c"
    entry += struct.pack("<2HQ", 1, 8, 1000)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), at, 0)
    assert opened(far[:at] + entry + end).read("c") == content


def test_a_long_extra_field_before_the_bytes_costs_a_second_read():
    data = joined(by_hand(b"a", b"content", local_extra=b"ab\x90\1" + bytes(400)), by_hand(b"b", b"other"))
    reads = []

    def pread(start: int, length: int) -> bytes:
        reads.append(length)
        return data[start : start + length]

    archive = ZipArchive(len(data), pread)
    reads.clear()
    assert archive.read("b") == b"other"
    assert len(reads) == 1
    reads.clear()
    assert archive.read("a") == b"content"
    assert reads == [30 + 1 + 64 + 7, 30 + 1 + 404 + 7 - (30 + 1 + 64 + 7)]


NAMES = {
    b"./a.jpg": "a.jpg",
    b"sub\\b.jpg": "sub/b.jpg",  # Windows
    b".\\sub\\c.jpg": "sub/c.jpg",
    b"./sub//./d.jpg": "sub/d.jpg",
    b"/abs/e.jpg": "abs/e.jpg",
    "ü/日本.jpg".encode(): "ü/日本.jpg",
    b"f..jpg/.x": "f..jpg/.x",
}


def test_names_as_tools_write_them(tmp_path):
    (tmp_path / "x.zip").write_bytes(joined(*(by_hand(name, name, flags=0x800) for name in NAMES)))
    roots = ImageRoots([f"p={tmp_path}/x.zip"])
    assert {name: roots.read(f"p/{path}") for name, path in NAMES.items()} == {name: name for name in NAMES}


def test_names_that_do_not_say_that_they_are_utf8():
    """The standard is code page 437; many tools write UTF-8 all the same."""
    data = joined(by_hand("ü.jpg".encode(), b"UTF-8"), by_hand("ñ.jpg".encode("cp437"), b"437"))
    assert opened(data).read("ü.jpg") == b"UTF-8"
    assert opened(data).read("ñ.jpg") == b"437"
    assert opened(data).read("├╝.jpg") == b"UTF-8"  # its bytes, read as the standard has it
    said = joined(by_hand("ü.jpg".encode(), b"UTF-8", flags=0x800))
    assert opened(said).read("ü.jpg") == b"UTF-8"
    with pytest.raises(FileNotFoundError):
        opened(said).read("├╝.jpg")


def test_a_member_that_leaves_the_zip_is_reached_by_no_path(tmp_path):
    (tmp_path / "x.zip").write_bytes(joined(by_hand(b"../a", b"a"), by_hand(b"..\\b", b"b"), by_hand(b"c", b"c")))
    roots = ImageRoots([f"{tmp_path}/x.zip"])
    assert roots.read("c") == b"c"
    for path, reason in {"../a": "outside-root", "..\\b": "outside-root", "a": "missing", "b": "missing"}.items():
        with pytest.raises(BadImage) as e:
            roots.read(path)
        assert e.value.reason == reason


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_one_name_the_last_counts():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a.jpg", b"old")
        z.writestr("a.jpg", b"new")
    with zipfile.ZipFile(file) as z:
        assert z.read("a.jpg") == b"new"
    assert opened(file.getvalue()).read("a.jpg") == b"new"
    assert opened(joined(by_hand(b"x/a", b"old"), by_hand(b"./x\\a", b"new"))).read("x/a") == b"new"


def root_of(data: bytes, folder: Path) -> ImageRoots:
    (folder / "images.zip").write_bytes(data)
    return ImageRoots([f"{folder}/images.zip"])


def packed(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


CONTENT = b"a photograph" * 100
BAD_MEMBERS = {
    "encrypted": (by_hand(b"bad", CONTENT, flags=1), "encrypted in the zip"),
    "strongly encrypted": (by_hand(b"bad", CONTENT, flags=0x41), "encrypted in the zip"),
    "unknown method": (by_hand(b"bad", CONTENT, method=9), "packed in the zip by a method not supported (9)"),
    "patch": (by_hand(b"bad", CONTENT, flags=0x20), "packed in the zip by a method not supported (0)"),
    "link": (by_hand(b"bad", b"good", made_by=0x314, attributes=0o120777 << 16), "a link within the zip"),
    "other name": (by_hand(b"bad", CONTENT, local_name=b"dab"), "damaged in the zip: another member lies in its place"),
    "declared too large": (by_hand(b"bad", CONTENT, size=2**30 + 1), "1073741825 bytes in the zip, limit 1073741824"),
    "declared far too large": (
        by_hand(b"bad", CONTENT, size=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 50 * 2**30)),
        "53687091200 bytes in the zip, limit 1073741824",
    ),
    "longer than declared": (
        by_hand(b"bad", CONTENT, packed=packed(CONTENT), method=8, size=5),
        "damaged in the zip: its length or checksum is wrong",
    ),
    "shorter than declared": (
        by_hand(b"bad", CONTENT, size=5000), "damaged in the zip: its length or checksum is wrong"
    ),
    "other checksum": (
        by_hand(b"bad", CONTENT, packed=CONTENT[::-1]), "damaged in the zip: its length or checksum is wrong"
    ),
    "no deflate": (
        by_hand(b"bad", CONTENT, packed=b"\xff" * 50, method=8),
        "damaged in the zip: Error -3 while decompressing data: invalid block type",
    ),
    "no LZMA": (by_hand(b"bad", CONTENT, packed=b"\x09\x04\x06\0" + b"\xff" * 50, method=14),
                "damaged in the zip: unknown LZMA properties"),
    "cut LZMA": (by_hand(b"bad", CONTENT, packed=b"\x09", method=14), "damaged in the zip: unpack_from requires"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_bad_member_is_unreadable_and_the_others_are_read(kind, tmp_path):
    bad, words = BAD_MEMBERS[kind]
    roots = root_of(joined(by_hand(b"good", b"good"), bad, by_hand(b"well", CONTENT, packed=packed(CONTENT), method=8)),
                    tmp_path)  # fmt: skip
    with pytest.raises(BadImage) as e:
        roots.read("bad")
    assert str(e.value).startswith(f"bad: unreadable ({words}")
    assert roots.read("good") == b"good"
    assert roots.read("well") == CONTENT


ENCRYPTED = (  # by Info-ZIP 3.0: `zip -X -P x e.zip a; zip -X e.zip b`, each of the text 12345678
    "UEsDBAoACQAAALU5dV2v2uCaFAAAAAgAAAABAAAAYVETpvRQVvgEZF/Y2sLyj5xzsSSCUEsHCK/a4JoUAAAACAAAAFBLAwQKAAAAAAC1OXVdr9rg"
    "mggAAAAIAAAAAQAAAGIxMjM0NTY3OFBLAQIeAwoACQAAALU5dV2v2uCaFAAAAAgAAAABAAAAAAAAAAEAAACkgQAAAABhUEsBAh4DCgAAAAAAtTl1"
    "Xa/a4JoIAAAACAAAAAEAAAAAAAAAAQAAAKSBQwAAAGJQSwUGAAAAAAIAAgBeAAAAagAAAAAA"
)


def test_what_a_real_tool_encrypted_is_unreadable(tmp_path):
    data = base64.b64decode(ENCRYPTED)
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        assert z.read("a", pwd=b"x") == b"12345678"
    roots = root_of(data, tmp_path)
    with pytest.raises(BadImage, match=r"a: unreadable \(encrypted in the zip\)"):
        roots.read("a")
    assert roots.read("b") == b"12345678"


def most_memory(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_bomb_that_lies_about_its_size_is_unpacked_no_further(method):
    """20 MB of zeros that say they are 1000 bytes. Control: the standard library unpacks them all."""
    data = bytearray(zipped({"a": bytes(20_000_000)}, method))
    directory = data.rindex(b"PK\1\2")
    data[directory + 24 : directory + 28] = struct.pack("<L", 1000)
    archive = opened(bytes(data))
    with zipfile.ZipFile(io.BytesIO(data)) as z:

        def unpacked_in_full():
            with pytest.raises(zipfile.BadZipFile):
                z.read("a")

        assert most_memory(unpacked_in_full) > 20_000_000
    assert most_memory(lambda: says_of(archive, "a")) < 10_000_000  # LZMA has a dictionary of 8 MB
    assert says_of(archive, "a") == "damaged in the zip: its length or checksum is wrong"


def test_a_member_of_the_largest_size_is_read_and_one_byte_more_is_refused(monkeypatch):
    monkeypatch.setattr(zip_archive, "MAX_BYTES", 1000)
    data = zipped({"most": bytes(1000), "more": bytes(1001)})
    assert opened(data).read("most") == bytes(1000)
    assert says_of(opened(data), "more") == "1001 bytes in the zip, limit 1000"


@pytest.mark.parametrize("method", METHODS)
def test_damage_to_a_member_raises_nothing_else_and_hurts_no_other(method, rng):
    members = {"bad.jpg": rng.bytes(300) * 3, "good.jpg": b"good" * 50}
    data = zipped(members, method)
    start, stop = 0, data.index(b"PK\3\4", 4)
    hurt = 0
    for at in range(start, stop):
        damaged = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        archive = opened(damaged)
        assert archive.read("good.jpg") == members["good.jpg"]
        try:
            assert archive.read("bad.jpg") == members["bad.jpg"]
        except OSError:
            hurt += 1
    # A flipped bit means nothing in much of the header and in what bzip2 keeps and does not use.
    assert hurt > 0.8 * (stop - start - 30)


def test_damage_to_the_directory_is_an_error_of_the_zip_or_of_members(rng):
    members = {f"{i}.jpg": rng.bytes(50) for i in range(10)}
    data = zipped(members)
    refused = lost = 0
    for at in range(data.index(b"PK\1\2"), len(data)):
        for bit in range(8):
            damaged = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            try:
                archive = opened(damaged)
            except NotAZip:
                refused += 1
                continue
            for name, content in members.items():
                try:
                    assert archive.read(name) == content
                except OSError:
                    lost += 1
    assert refused > 100
    assert lost > 100


def test_a_zip_that_was_cut_short_is_refused(tmp_path):
    whole = zipped({f"{i}.jpg": BYTES(50) for i in range(10)})
    assert len(opened(whole).read("9.jpg")) == 50
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        with pytest.raises(NotAZip):
            opened(whole[:length])
    with pytest.raises(
        DatasetError, match=r"images.zip is a file but not a zip that can be read \(it has no end-of-dir"
    ):
        root_of(whole[:-1], tmp_path)


def test_one_part_of_a_split_archive_is_refused():
    data = bytearray(zipped({"a": b"a"}))
    data[-18] = 3  # the number of this disk
    with pytest.raises(NotAZip, match="one part of a split archive"):
        opened(bytes(data))


def test_a_zip_that_shrinks_while_it_is_read_is_unreadable(tmp_path):
    data = zipped({"a": BYTES(5000), "b": BYTES(5000)}, zipfile.ZIP_STORED)
    roots = root_of(data, tmp_path)
    assert len(roots.read("b")) == 5000
    with (tmp_path / "images.zip").open("r+b") as file:
        file.truncate(6000)
    assert len(roots.read("a")) == 5000
    with pytest.raises(BadImage, match=r"b: unreadable \(damaged in the zip"):
        roots.read("b")


def test_names_of_one_hash_are_told_apart(monkeypatch):
    members = {f"{i}.jpg": BYTES(9) for i in range(20)}
    data = zipped(members)
    monkeypatch.setattr(zip_archive, "hash", lambda name: name[0] % 2, raising=False)
    archive = opened(data)
    assert set(archive._hashes) == {0, 1}
    assert {name: archive.read(name) for name in members} == members
    with pytest.raises(FileNotFoundError):
        archive.read("20.jpg")


def test_the_index_takes_a_fifth_of_the_standard_library_s_memory():
    data = zipped({f"{i % 660:05d}/{i:09d}.jpg": b"" for i in range(20_000)}, zipfile.ZIP_STORED)

    def taken(opener: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            kept = opener()
            return tracemalloc.get_traced_memory()[0] if kept else 0
        finally:
            tracemalloc.stop()

    ours, theirs = taken(lambda: opened(data)), taken(lambda: zipfile.ZipFile(io.BytesIO(data)))
    assert 0 < ours < theirs / 5
    assert ours / 20_000 < 100  # bytes a member: its entry of 46 and its name, a hash and a place of 8
