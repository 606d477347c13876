"""Image paths to bytes: folders, zips and URLs, several at once, and no way out of them."""

import multiprocessing
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from olavlm.cache import BadImage, DatasetError, ImageRoots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/{a.jpg, sub/b.jpg} and, beside it, a secret."""
    (tmp_path / "secret").write_bytes(b"secret")
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.jpg").write_bytes(b"a")
    (images / "sub" / "b.jpg").write_bytes(b"b")
    return images


def archive(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return file


def reason(roots: ImageRoots, image: str) -> str:
    with pytest.raises(BadImage) as e:
        roots.read(image)
    assert e.value.image == image
    return e.value.reason


@pytest.fixture(params=["folder", "zip", "file URL", "memory URL"])
def any_root(request, folder, tmp_path) -> str:
    """The same images behind each kind of root."""
    members = {"a.jpg": b"a", "sub/b.jpg": b"b"}
    if request.param == "zip":
        return str(archive(tmp_path / "images.zip", members))
    if request.param == "memory URL":
        memory = fsspec.filesystem("memory")
        for name, content in members.items():
            memory.pipe(f"{folder}/{name}", content)
        return f"memory:/{folder}"
    return f"file://{folder}" if request.param == "file URL" else str(folder)


def test_every_kind_of_root_reads_alike(any_root):
    roots = ImageRoots([any_root])
    assert roots.read("a.jpg") == b"a"
    assert roots.read("sub/b.jpg") == roots.read("./sub//b.jpg") == b"b"
    assert reason(roots, "nothing.jpg") == "missing"
    assert reason(roots, "a.jpg/b.jpg") == "missing"
    again = pickle.loads(pickle.dumps(roots))
    assert again.read("sub/b.jpg") == b"b"
    assert again.specs == roots.specs


OUTSIDE = ["../secret", "sub/../../secret", "/etc/passwd", "..", "sub\\..\\secret", "a.jpg\0", ""]


@pytest.mark.parametrize("image", OUTSIDE)
def test_a_path_that_leaves_the_root_is_refused(any_root, image):
    assert reason(ImageRoots([any_root]), image) == "outside-root"
    assert reason(ImageRoots([f"coco={any_root}"]), image) == "outside-root"


@pytest.mark.parametrize("image", ["coco/../secret", "coco//../secret", "coco/..", "../coco/a.jpg"])
def test_nor_does_a_prefix_open_a_way_out(any_root, image):
    assert reason(ImageRoots([f"coco={any_root}"]), image) == "outside-root"


def test_what_a_prefix_leaves_is_never_an_absolute_path(folder, tmp_path):
    secret = tmp_path / "secret"
    assert secret.read_bytes() == b"secret"
    assert reason(ImageRoots([f"coco={folder}"]), f"coco/{secret}") == "missing"


def test_a_link_that_the_user_put_into_the_root_is_followed(folder, tmp_path):
    (folder / "link.jpg").symlink_to(tmp_path / "secret")
    (folder / "elsewhere").symlink_to(tmp_path)
    roots = ImageRoots([str(folder)])
    assert roots.read("link.jpg") == roots.read("elsewhere/secret") == b"secret"


def test_unicode_and_odd_names(folder):
    names = ["ünï/日本 語.jpg", "e\u0301.jpg", "a=b.jpg", "🐘.png", "..jpg", "a b%20#?.jpg"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    for root in (str(folder), f"file://{folder}", f"pré={folder}"):
        for name in names:
            prefix = "pré/" if root.startswith("pré") else ""
            assert ImageRoots([root]).read(prefix + name) == name.encode()
    assert reason(ImageRoots([str(folder)]), "\ud800.jpg") == "unreadable"  # half a character names no file


def test_a_folder_or_a_refused_file_is_unreadable(public_path, unprivileged):
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


def test_prefixes_longest_first_then_the_others_in_order(tmp_path):
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


def test_a_file_that_is_no_zip_and_a_damaged_zip_are_dataset_errors(tmp_path):
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


BYTES = np.random.default_rng(0).bytes
MEMBERS = {f"{i // 50:03d}/{i:05d}.jpg": BYTES(200) * (1 + i % 7) for i in range(200)}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_many_threads_read_one_zip(tmp_path, compression):
    roots = ImageRoots([str(archive(tmp_path / "x.zip", MEMBERS, compression))])
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(roots.read, MEMBERS)) == list(MEMBERS.values())


@pytest.mark.parametrize("kind", ["zip", "file"])
def test_a_root_survives_a_fork(tmp_path, start, kind):
    file = archive(tmp_path / "x.zip", MEMBERS)
    with zipfile.ZipFile(file) as z:
        z.extractall(tmp_path / "x")
    roots = ImageRoots([str(file) if kind == "zip" else f"file://{tmp_path}/x"])

    def read_all(*_):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(roots.read, MEMBERS)) == list(MEMBERS.values())

    children = [start(read_all) for _ in range(3)]
    read_all()  # a shared file position would mix them up
    assert [child.wait() for child in children] == [0, 0, 0]


def test_a_zip_root_is_sent_to_a_spawned_process(tmp_path):
    roots = ImageRoots([f"p={archive(tmp_path / 'x.zip', MEMBERS)}"])
    name = next(iter(MEMBERS))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(ImageRoots.read, (roots, f"p/{name}")) == MEMBERS[name]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_damaged_member_is_unreadable_and_the_others_are_read(tmp_path, compression):
    file = archive(tmp_path / "x.zip", {"bad.jpg": BYTES(500), "good.jpg": b"good" * 50}, compression)
    with zipfile.ZipFile(file) as z:
        start = z.getinfo("bad.jpg").header_offset + 30 + len("bad.jpg")
    data = bytearray(file.read_bytes())
    data[start + 20 : start + 120] = bytes(100)
    file.write_bytes(data)
    roots = ImageRoots([str(file)])
    assert reason(roots, "bad.jpg") == "unreadable"
    assert roots.read("good.jpg") == b"good" * 50


def test_a_client_error_that_is_no_os_error_is_one_image_s(folder, monkeypatch):
    roots = ImageRoots([f"file://{folder}"])

    def throttled(self, path, **_):
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "cat_file", throttled)
    with pytest.raises(BadImage, match=r"a.jpg: unreadable \(RuntimeError: SlowDown\)"):
        roots.read("a.jpg")


def test_open_decodes_and_names_the_image(folder):
    with pytest.raises(BadImage, match=r"sub/b.jpg: not-an-image"):
        ImageRoots([str(folder)]).open("sub/b.jpg")
