"""Image paths to bytes: folders, zips and URLs, several at once, and no way out of them."""

import os
import pickle
import socket
import stat
from pathlib import Path

import pytest

from olavlm.cache import BadImage, DatasetError, ImageRoots, images
from olavlm.cache.images import split_root
from olavlm.cache.wording import printable


def test_every_kind_of_root_reads_alike(any_root, reason):
    roots = ImageRoots([any_root])
    assert roots.read("a.jpg") == b"a"
    assert roots.read("sub/b.jpg") == roots.read("./sub//b.jpg") == b"b"
    assert reason(roots, "nothing.jpg") == "missing"
    assert reason(roots, "a.jpg/b.jpg") == "missing"
    again = pickle.loads(pickle.dumps(roots))
    assert again.read("sub/b.jpg") == b"b"
    assert again.specs == roots.specs
    assert ImageRoots([f"coco={any_root}"]).read("coco/sub/b.jpg") == b"b"


def test_where_a_prefix_ends(tmp_path, monkeypatch):
    """A root that is gone is split as it was when it was there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run=3" / "imgs"
    folder.mkdir(parents=True)
    split = {
        "coco=images": ("coco", "images"),
        "coco/=s3://bucket/a=b": ("coco", "s3://bucket/a=b"),
        "https://host/x?a=b": ("", "https://host/x?a=b"),
        str(folder): ("", str(folder)),
        "run=3/imgs": ("", "run=3/imgs"),  # it is there
    }
    assert {spec: split_root(spec) for spec in split} == split
    folder.rmdir()
    assert split_root(str(folder)) == ("", str(folder))
    assert split_root("run=3/imgs") == ("run", "3/imgs")


OUTSIDE = ["../secret", "sub/../../secret", "/etc/passwd", "..", "sub\\..\\secret", "a.jpg\0", ""]


@pytest.mark.parametrize("image", OUTSIDE)
def test_a_path_that_leaves_the_root_is_refused(any_root, image, reason):
    assert reason(ImageRoots([any_root]), image) == "outside-root"
    assert reason(ImageRoots([f"coco={any_root}"]), image) == "outside-root"


@pytest.mark.parametrize("image", ["coco/../secret", "coco//../secret", "coco/..", "../coco/a.jpg"])
def test_nor_does_a_prefix_open_a_way_out(any_root, image, reason):
    assert reason(ImageRoots([f"coco={any_root}"]), image) == "outside-root"


def test_what_a_prefix_leaves_is_never_an_absolute_path(folder, tmp_path, reason):
    secret = tmp_path / "secret"
    assert secret.read_bytes() == b"secret"
    assert reason(ImageRoots([f"coco={folder}"]), f"coco/{secret}") == "missing"


def test_a_link_that_the_user_put_into_the_root_is_followed(folder, tmp_path):
    (folder / "link.jpg").symlink_to(tmp_path / "secret")
    (folder / "elsewhere").symlink_to(tmp_path)
    roots = ImageRoots([str(folder)])
    assert roots.read("link.jpg") == roots.read("elsewhere/secret") == b"secret"


def test_unicode_and_odd_names(folder, reason):
    names = ["ünï/日本 語.jpg", "e\u0301.jpg", "a=b.jpg", "🐘.png", "..jpg", "a b%20#?.jpg"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    for root in (str(folder), f"file://{folder}", f"pré={folder}"):
        for name in names:
            prefix = "pré/" if root.startswith("pré") else ""
            assert ImageRoots([root]).read(prefix + name) == name.encode()
    assert reason(ImageRoots([str(folder)]), "\ud800.jpg") == "unreadable"  # half a character names no file


def test_a_folder_or_a_refused_file_is_unreadable(public_path, unprivileged, reason):
    (public_path / "x.jpg").mkdir()
    (public_path / "locked.jpg").write_bytes(b"x")
    (public_path / "locked.jpg").chmod(0)
    roots = ImageRoots([str(public_path)])
    assert reason(roots, "x.jpg") == "unreadable"
    assert reason(roots, "n" * 300) == "unreadable"  # longer than a name can be

    def work():
        with pytest.raises(BadImage, match=r"unreadable \(Permission denied\)"):
            roots.read("locked.jpg")

    unprivileged(work)


SPECIAL = {
    "FIFO": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: Path(path).symlink_to("/dev/zero"),  # it would never end
    "folder": os.mkdir,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_no_regular_file_is_unreadable_at_once(public_path, kind, scheme):
    SPECIAL[kind](public_path / "x.jpg")
    assert not stat.S_ISREG((public_path / "x.jpg").stat().st_mode)
    (public_path / "link.jpg").symlink_to("x.jpg")
    (public_path / "good.jpg").write_bytes(b"good")
    (public_path / "good link.jpg").symlink_to("good.jpg")
    roots = ImageRoots([f"{scheme}{public_path}"])
    for name in ("x.jpg", "link.jpg"):
        with pytest.raises(BadImage) as e:
            roots.read(name)
        assert str(e.value) == f"{name}: unreadable (a {kind}, not a regular file)"
    assert roots.read("good.jpg") == roots.read("good link.jpg") == b"good"


@pytest.mark.timeout(20)
def test_a_file_that_becomes_a_fifo_while_it_is_opened_does_not_hang(folder, monkeypatch):
    os.mkfifo(folder / "x.jpg")
    regular = (folder / "a.jpg").stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: regular)
    with pytest.raises(BadImage, match=r"unreadable \(a FIFO, not a regular file\)"):
        ImageRoots([str(folder)]).read("x.jpg")


def test_a_file_that_no_memory_holds_is_unreadable(folder):
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(2**43)  # of which the disk keeps nothing
    with pytest.raises(BadImage, match=f"{2**43} bytes, limit {2**30}") as e:
        ImageRoots([str(folder)]).read("huge.jpg")
    assert e.value.reason == "unreadable"


@pytest.mark.parametrize("kind", ["folder", "S3", "web", "copied web", "memory URL"])
def test_a_file_over_the_limit_is_unreadable_behind_any_root(kind, behind, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    root = behind(kind.removeprefix("copied "), {"most.jpg": b"x" * 10, "more.jpg": b"x" * 11, "empty.jpg": b""})
    roots = ImageRoots([f"simplecache::{root}" if kind == "copied web" else root])
    assert roots.read("most.jpg") == b"x" * 10
    assert roots.read("empty.jpg") == b""
    with pytest.raises(BadImage, match=r"more.jpg: unreadable \((at least )?11 bytes, limit 10\)"):
        roots.read("more.jpg")


def test_links_that_lead_nowhere(folder, reason):
    (folder / "broken.jpg").symlink_to("nothing")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    roots = ImageRoots([str(folder)])
    assert reason(roots, "broken.jpg") == "missing"
    assert reason(roots, "loop.jpg") == "unreadable"


def test_prefixes_longest_first_then_the_others_in_order(tmp_path, reason):
    content = {
        "short": {"a.jpg": b"short a", "val/a.jpg": b"short val a", "val/b.jpg": b"short val b"},
        "long": {"a.jpg": b"long a"},
        "first": {"coco/c.jpg": b"first c", "d.jpg": b"first d"},
        "second": {"coco/c.jpg": b"second c", "d.jpg": b"second d", "e.jpg": b"second e", "coconut/a.jpg": b"nut"},
    }
    for root, files in content.items():
        for name, data in files.items():
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / name).write_bytes(data)
    roots = ImageRoots(
        [f"{tmp_path}/first", f"coco={tmp_path}/short", f"coco/val/={tmp_path}/long", f"{tmp_path}/second"]
    )
    assert roots.read("coco/a.jpg") == b"short a"
    assert roots.read("coco/val/a.jpg") == b"long a"  # the longest prefix
    assert roots.read("coco/val/b.jpg") == b"short val b"  # then the shorter
    assert roots.read("coco/c.jpg") == b"first c"  # then the roots without one, with the whole path
    assert roots.read("d.jpg") == b"first d"
    assert roots.read("e.jpg") == b"second e"
    assert roots.read("coconut/a.jpg") == b"nut"  # a prefix is whole folder names
    assert reason(roots, "coco/z.jpg") == "missing"


def test_a_folder_with_an_equals_sign_in_its_name_is_no_prefix(tmp_path):
    (tmp_path / "run=3").mkdir()
    (tmp_path / "run=3" / "a.jpg").write_bytes(b"a")
    assert ImageRoots([f"{tmp_path}/run=3"]).read("a.jpg") == b"a"
    assert ImageRoots([f"x={tmp_path}/run=3"]).read("x/a.jpg") == b"a"


@pytest.mark.parametrize("specs", [[], ["/no/such/folder"], ["x=/no/such/folder"], ["memory://no/such"],
                                   ["nosuchprotocol://x"], ["file:///no/such/folder"]])  # fmt: skip
def test_a_root_that_is_not_there_is_a_dataset_error(specs):
    with pytest.raises(DatasetError) as e:
        ImageRoots(specs)
    assert "image root" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_zip_and_a_damaged_zip_are_dataset_errors(tmp_path, archive):
    (tmp_path / "x.tar").write_bytes(b"not a zip" * 100)
    with pytest.raises(DatasetError, match="not a zip"):
        ImageRoots([str(tmp_path / "x.tar")])
    file = archive(tmp_path / "x.zip", {f"{i}.jpg": b"x" * 50 for i in range(20)})
    data = file.read_bytes()
    refused = 0
    for at in range(data.index(b"PK\1\2"), len(data), 3):  # the central directory
        file.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            ImageRoots([str(file)])
        except DatasetError as e:
            refused += 1
            assert "zip" in str(e)  # noqa: PT017
    assert refused > 30


def test_open_decodes_and_names_the_image(folder):
    with pytest.raises(BadImage, match=r"sub/b.jpg: not-an-image"):
        ImageRoots([str(folder)]).open("sub/b.jpg")


def test_a_path_s_control_characters_do_not_reach_the_terminal(folder):
    """Escapes, a line break, CSI in one byte, a bidi override, half a character; visible ones stay."""
    names = {"\x1b[2J\x1b]0;x\x07.jpg": r"\x1b[2J\x1b]0;x\x07.jpg", "a\nb\r.jpg": r"a\nb\r.jpg",
             "\x9b31m.jpg": r"\x9b31m.jpg", "\u202egpj.exe": r"\u202egpj.exe", "\udcff.jpg": r"\udcff.jpg",
             "日本 ü🐘'.jpg": "日本 ü🐘'.jpg"}  # fmt: skip
    roots = ImageRoots([str(folder)])
    for name, shown in names.items():
        with pytest.raises(BadImage) as e:
            roots.read(name)
        assert e.value.image == name
        assert str(e.value).startswith(f"{shown}: {e.value.reason} (")
        assert printable(str(e.value)) == str(e.value)
        assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    assert str(BadImage("a", "unreadable", "\x1b[31mno")) == r"a: unreadable (\x1b[31mno)"
