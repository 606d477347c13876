"""Image paths to bytes: folders, zips and URLs, several at once, and no way out of them."""

import base64
import functools
import gzip
import multiprocessing
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pytest

from olavlm.cache import BadImage, DatasetError, ImageRoots, images
from olavlm.cache.images import redacted
from olavlm.cache.wording import printable


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


def run_server(*module: str) -> tuple[subprocess.Popen, str]:
    """`python -m MODULE ...` as a process, and the URL that it prints."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", *module], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    url = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    threading.Thread(target=server.stdout.read, daemon=True).start()  # one line a request: a full pipe would stop it
    return server, url


def bucket(name: str) -> str:
    """A new bucket."""
    fsspec.filesystem("s3").mkdir(f"s3://{name}")
    return f"s3://{name}"


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder, and the URL at which a process of Python's own web server shows it."""
    folder = tmp_path_factory.mktemp("web")
    server, url = run_server("http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder))
    yield folder, url
    server.kill()
    server.wait()


@pytest.fixture
def behind(request, tmp_path):
    """behind(kind, files) -> the root behind which they lie."""

    def make(kind: str, files: dict[str, bytes]) -> str:
        folder, zipped = tmp_path / "images", tmp_path / "images.zip"
        if kind == "memory URL":
            fsspec.filesystem("memory").pipe({f"{folder}/{name}": content for name, content in files.items()})
            return f"memory:/{folder}"
        if kind in ("S3", "zip on S3"):
            request.getfixturevalue("s3_server")
            s3, there = fsspec.filesystem("s3"), bucket(re.sub("[^a-z0-9]", "-", tmp_path.name))
            if kind == "zip on S3":
                s3.put(str(archive(zipped, files)), f"{there}/images.zip")
                return f"{there}/images.zip"
            s3.pipe({f"{there}/images/{name}": content for name, content in files.items()})
            return f"{there}/images"
        if "zip" in kind:
            top = "top/" if kind == "folder in a zip" else ""
            archive(zipped, {top + name: content for name, content in files.items()})
            return {"zip": "", "zip URL": "file://", "folder in a zip": "zip://top::file://"}[kind] + str(zipped)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if kind == "web":
            shown, url = request.getfixturevalue("web")
            (shown / tmp_path.name).symlink_to(folder)
            return f"{url}/{tmp_path.name}"
        return {"folder": "", "folder URL": "file://"}[kind] + str(folder)

    return make


@pytest.fixture(
    params=["folder", "folder URL", "zip", "zip URL", "folder in a zip", "zip on S3", "S3", "web", "memory URL"]
)
def any_root(request, behind) -> str:
    """The same two images behind each kind of root."""
    return behind(request.param, {"a.jpg": b"a", "sub/b.jpg": b"b"})


def test_every_kind_of_root_reads_alike(any_root):
    roots = ImageRoots([any_root])
    assert roots.read("a.jpg") == b"a"
    assert roots.read("sub/b.jpg") == roots.read("./sub//b.jpg") == b"b"
    assert reason(roots, "nothing.jpg") == "missing"
    assert reason(roots, "a.jpg/b.jpg") == "missing"
    again = pickle.loads(pickle.dumps(roots))
    assert again.read("sub/b.jpg") == b"b"
    assert again.specs == roots.specs
    assert ImageRoots([f"coco={any_root}"]).read("coco/sub/b.jpg") == b"b"


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


class Odd(BaseHTTPRequestHandler):
    """Bodies of 256 MiB whose length is not told, or told wrong; others that are packed, or cut off."""

    protocol_version = "HTTP/1.1"
    requests, sent = [], 0

    def do_GET(self):
        Odd.requests.append(self.path)
        kind = Path(self.path).stem
        packed = {"photo": gzip.compress(b"photo" * 1000), "bomb": gzip.compress(bytes(10**7))}
        if kind in packed:
            self.answer(200, "Content-Encoding: gzip", f"Content-Length: {len(packed[kind])}")
            self.wfile.write(packed[kind])
        elif kind == "short":
            self.answer(200, "Content-Length: 100", "Connection: close")
            self.wfile.write(b"short")
        else:
            status = {"gone": 404, "denied": 403}.get(kind, 200)
            self.answer(status, "Content-Length: 1000000000000" if kind == "long" else "Transfer-Encoding: chunked")
            self.stream(2**28, bytes(2**16))

    def answer(self, status: int, *headers: str):
        self.send_response(status)
        for header in headers:
            self.send_header(*header.split(": "))
        self.end_headers()

    def stream(self, size: int, chunk: bytes):
        self.close_connection = True
        try:
            for _ in range(size // len(chunk)):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                Odd.sent += len(chunk)
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def odd(monkeypatch):
    """URL of an odd web server."""
    monkeypatch.setattr(Odd, "requests", [])
    monkeypatch.setattr(Odd, "sent", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_body_that_is_too_long_is_not_read_to_its_end(odd, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10**5)
    roots = ImageRoots([f"{odd}/images"])  # whose page is as long
    for image, why in {
        "chunked.jpg": r"unreadable \(at least 1\d{5} bytes, limit 100000\)",
        "long.jpg": r"unreadable \(at least 1000000000000 bytes, limit 100000\)",
        "bomb.jpg": r"unreadable \(at least \d+ bytes, limit 100000\)",
        "short.jpg": r"unreadable \(ClientPayloadError: ",
        "denied.jpg": r"unreadable \(ClientResponseError: 403",
        "gone.jpg": "missing",
    }.items():
        with pytest.raises(BadImage, match=f"{image}: {why}"):
            roots.read(image)
    with pytest.raises(DatasetError, match="cannot be opened"):
        ImageRoots([f"{odd}/images.zip"])
    assert Odd.sent < 2**26  # what was on its way on six connections


def test_an_image_is_one_request(odd, behind, monkeypatch):
    roots = ImageRoots([odd])
    Odd.requests.clear()
    for _ in range(3):
        assert roots.read("photo.jpg") == b"photo" * 1000
    assert Odd.requests == ["/photo.jpg"] * 3
    roots = ImageRoots([behind("S3", {"a.jpg": b"a"})])
    client, calls = type(fsspec.filesystem("s3")), []
    call = client._call_s3

    def counted(self, method, *args, **kwargs):
        calls.append(method)
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(client, "_call_s3", counted)
    assert roots.read("a.jpg") == b"a"
    assert calls == ["get_object"]


def test_links_that_lead_nowhere(folder):
    (folder / "broken.jpg").symlink_to("nothing")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    roots = ImageRoots([str(folder)])
    assert reason(roots, "broken.jpg") == "missing"
    assert reason(roots, "loop.jpg") == "unreadable"


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


def read_all(roots: ImageRoots, members: dict[str, bytes] = MEMBERS, threads: int = 4) -> bool:
    """Whether threads that read at once get the right bytes for every member."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(roots.read, members)) == list(members.values())


@pytest.mark.parametrize("kind", ["folder", "zip", "S3", "zip on S3", "web"])
def test_forked_and_spawned_processes_and_threads_read_one_root_at_once(kind, behind, start):
    members = MEMBERS if kind in ("folder", "zip") else dict(list(MEMBERS.items())[:40])  # those servers are slow
    roots = ImageRoots([behind(kind, members)])
    assert read_all(roots, members)  # a connection and its event loop are open when the children fork

    def child(_):
        assert read_all(roots, members)

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        spawned = [pool.apply_async(ImageRoots.read, (roots, name)) for name in members]
        children = [start(child) for _ in range(3)]
        assert read_all(roots, members)  # a shared file position would mix them up
        assert [child.wait() for child in children] == [0, 0, 0]
        assert [r.get(60) for r in spawned] == list(members.values())


def test_a_child_forked_while_threads_read_is_never_stuck(tmp_path, start):
    """There is no lock that it could inherit taken."""
    roots = ImageRoots([str(archive(tmp_path / "x.zip", MEMBERS))])
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            roots.read(next(iter(MEMBERS)))

    readers = [threading.Thread(target=busy) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        children = [start(lambda _: read_all(roots) or os._exit(3)) for _ in range(10)]
        assert [child.wait() for child in children] == [0] * 10
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_a_zip_is_opened_once_and_a_member_is_one_read(tmp_path, start, monkeypatch):
    roots = ImageRoots([str(archive(tmp_path / "x.zip", MEMBERS, zipfile.ZIP_STORED))])
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: reads.append(length) or pread(fd, length, at))
    for name, content in MEMBERS.items():
        assert roots.read(name) == content
    # its header, its name and 64 bytes for an extra field are read with it
    assert reads == [30 + len(name) + 64 + len(content) for name, content in MEMBERS.items()]

    def child(_):
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened again"))
        assert roots.read("000/00000.jpg") == MEMBERS["000/00000.jpg"]

    assert start(child).wait() == 0


def test_a_client_error_that_is_no_os_error_is_one_image_s(folder, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{folder}/a.jpg", b"a")
    roots = ImageRoots([f"memory:/{folder}"])
    assert roots.read("a.jpg") == b"a"

    def throttled(self, path, **_):
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(type(memory), "cat_file", throttled)
    with pytest.raises(BadImage, match=r"a.jpg: unreadable \(RuntimeError: SlowDown\)"):
        roots.read("a.jpg")


def test_open_decodes_and_names_the_image(folder):
    with pytest.raises(BadImage, match=r"sub/b.jpg: not-an-image"):
        ImageRoots([str(folder)]).open("sub/b.jpg")


PASSWORD, SIGNATURE = "s3cr:t!p%w", "abcdef0123456789/+="
QUERY = f"X-Amz-Expires=3600&X-Amz-Signature={quote(SIGNATURE, safe='')}"
SECRETS = [PASSWORD, quote(PASSWORD, safe=""), SIGNATURE, quote(SIGNATURE, safe=""), "X-Amz-Expires", "bob"]


class Guarded(SimpleHTTPRequestHandler):
    """Wants user, password and signature, and repeats them all when it says no; gives parts of files, as S3 does."""

    def do_GET(self):
        wanted = "Basic " + base64.b64encode(f"bob:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] != wanted or not unquote(self.path).endswith(f"Signature={SIGNATURE}"):
            return self.send_error(403, f"Not {self.path} {unquote(self.path)}")
        if self.path.startswith("/broken/"):
            return self.send_error(500, f"Broken for bob:{PASSWORD} ({quote(PASSWORD, safe='')}), {PASSWORD}")
        file, asked = Path(self.translate_path(self.path)), re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if not asked or not file.is_file():
            return super().do_GET()
        part = file.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{file.stat().st_size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def guarded(folder, tmp_path):
    """HOST:PORT of a guarded web server that shows `images` and `images.zip`."""
    archive(tmp_path / "images.zip", MEMBERS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Guarded, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def url(host: str, path: str, password: str = PASSWORD, query: str = QUERY) -> str:
    return f"http://bob:{quote(password, safe='')}@{host}/{path}?{query}"


def test_user_password_and_signature_of_a_url_are_used(guarded, folder):
    name = "ü #1?&+%20;=.jpg"
    (folder / name).write_bytes(b"odd")
    roots = ImageRoots([f"coco={url(guarded, 'images')}"])
    assert roots.read("coco/sub/b.jpg") == b"b"
    assert roots.read(f"coco/{name}") == b"odd"  # a path goes before the query, and is none of it
    assert reason(roots, "coco/nothing.jpg") == "missing"
    assert pickle.loads(pickle.dumps(roots)).read("coco/a.jpg") == b"a"
    for wrong in (url(guarded, "images", password="wrong"), url(guarded, "images", query="X-Amz-Signature=wrong")):
        assert reason(ImageRoots([wrong]), "a.jpg") == "unreadable"


@pytest.fixture
def nobody() -> str:
    """HOST:PORT where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return f"127.0.0.1:{s.getsockname()[1]}"


def everything(error: Exception) -> str:
    return f"{error} {error.args} {vars(error)} {''.join(traceback.format_exception(error))}"


def test_no_bad_image_shows_a_credential(guarded):
    """Neither in our words nor in those of the client and of the server."""
    shown = {}
    for name, root in {
        "images": url(guarded, "images"),
        "broken": url(guarded, "broken"),
        "wrong": url(guarded, "images", query="token=" + SIGNATURE),
    }.items():
        with pytest.raises(BadImage) as e:
            ImageRoots([f"coco={root}"]).read("coco/x.jpg")
        shown[name] = e.value
    assert shown["images"].detail == f"not under coco=http://{guarded}/images"
    assert shown["broken"].detail == (
        f"ClientResponseError: 500, message='Broken for *** (***), ***', url='http://{guarded}/broken/x.jpg'"
    )
    assert shown["wrong"].detail.startswith(
        "ClientResponseError: 403, message='Not /images/x.jpg?*** /images/x.jpg?***"
    )
    for error in shown.values():
        assert not [s for s in SECRETS if s in everything(error)]


def test_no_dataset_error_shows_a_credential(guarded, nobody):
    wrong = {
        f"coco={url(nobody, 'images')}": f"image root http://{nobody}/images cannot be opened: ClientConnectorError",
        url(guarded, "images.zip", password="no"): f"image root http://{guarded}/images.zip cannot be opened: ",
        f"zip://::{url(nobody, 'images.zip')}": f"image root http://{nobody}/images.zip cannot be opened: ",
        f"ftp{url(nobody, 'images')[4:]}": f"image root ftp://{nobody}/images cannot be opened: ConnectionRefusedError",
        f"nosuch{url(nobody, 'x')[4:]}": f"image root nosuch://{nobody}/x cannot be opened: ValueError: Protocol not",
        f"coco=file://{url(nobody, 'x' * 300)[7:]}": "image root ",
    }
    for root, words in wrong.items():
        with pytest.raises(DatasetError) as e:
            ImageRoots([root])
        assert str(e.value).startswith(words)
        assert not [s for s in SECRETS if s in everything(e.value)]


REDACTED = {
    "https://user:pw@host:8443/a/b": "https://host:8443/a/b",
    "https://token@host/a": "https://host/a",
    "https://user:p@w/x": "https://w/x",
    "https://user:p?w@host/a": "https://host/a",
    "https://host/a.zip?X-Amz-Signature=0a&X-Amz-Date=1": "https://host/a.zip",
    "https://host/a?sig=1#2": "https://host/a",
    "coco/val=s3://key:secret@bucket/a@b/c": "coco/val=s3://bucket/a@b/c",
    "a?b=https://u:p@host/x?q": "a?b=https://host/x",
    "ray://user:pw@head:10001": "ray://head:10001",
    "zip://in::simplecache::https://u:p@host/a.zip?sig=1": "zip://in::simplecache::https://host/a.zip",
    "simplecache::https://u:p@h/a?sig=1::file://x": "simplecache::https://h/a::file://x",
    "http://u:p@[::1]:80/x?y=1": "http://[::1]:80/x",
}
LEFT_ALONE = [
    *("images", "", "/data/a?b=c@d", "coco=/data/me@home", "auto", "127.0.0.1:6379", "depth=org/model", "memory://x"),
    *("s3://bucket/a b/c@d", "file:///a/b", "http://[::1]:80/x", "zip://::s3://bucket/a.zip"),
]


def test_redacted_takes_user_password_and_query_and_nothing_else():
    assert {url: redacted(url) for url in REDACTED} == REDACTED
    assert [redacted(url) for url in LEFT_ALONE] == LEFT_ALONE


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


def test_the_members_of_a_zip_behind_a_url_are_read_by_ranges(guarded, web):
    roots = ImageRoots([url(guarded, "images.zip")])
    assert read_all(roots)
    assert reason(roots, "nothing.jpg") == "missing"
    shown, plain = web  # Python's own server sends all or nothing
    archive(shown / "images.zip", MEMBERS)
    with pytest.raises(DatasetError, match="range"):
        ImageRoots([f"{plain}/images.zip"])


def test_a_server_that_sends_another_range_is_noticed(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{tmp_path}/x.zip", archive(tmp_path / "x.zip", {"a.jpg": b"a" * 99}, zipfile.ZIP_STORED).read_bytes())
    roots = ImageRoots([f"memory:/{tmp_path}/x.zip"])
    assert roots.read("a.jpg") == b"a" * 99
    whole = memory.cat_file(f"{tmp_path}/x.zip")
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: whole)
    with pytest.raises(BadImage, match=rf"a.jpg: unreadable \({len(whole)} bytes came for 198 asked for\)"):
        roots.read("a.jpg")  # 30 + 5 + 64 + 99


def test_a_web_folder_need_not_be_a_page_but_its_server_must_answer(web, nobody):
    shown, url = web
    (shown / "file.jpg").write_bytes(b"x")
    assert reason(ImageRoots([f"{url}/not a folder"]), "file.jpg") == "missing"
    assert ImageRoots([url]).read("file.jpg") == b"x"
    with pytest.raises(DatasetError, match="cannot be opened: ClientConnectorError"):
        ImageRoots([f"http://{nobody}/images"])


def test_an_s3_bucket_or_folder_that_is_not_there_is_a_dataset_error(s3_server):
    fsspec.filesystem("s3").pipe(f"{bucket('there')}/images/a.jpg", b"a")
    assert ImageRoots(["s3://there/images"]).read("a.jpg") == b"a"
    for gone in ("s3://there/pictures", "s3://nowhere/images"):
        with pytest.raises(DatasetError, match=f"image root {gone} does not exist"):
            ImageRoots([gone])


def test_an_object_or_a_bucket_that_is_gone_is_missing(s3_server):
    s3 = fsspec.filesystem("s3")
    there = bucket("going")
    s3.pipe({f"{there}/images/a.jpg": b"x", f"{there}/images/b.jpg": b"x"})
    roots = ImageRoots(["s3://going/images"])
    assert roots.read("a.jpg") == b"x"
    s3.rm("s3://going/images/a.jpg")
    assert reason(roots, "a.jpg") == "missing"
    s3.rm("s3://going", recursive=True)
    assert reason(roots, "b.jpg") == "missing"


@pytest.fixture
def own_s3(s3_server, monkeypatch) -> Iterator[tuple[subprocess.Popen, str]]:
    """An S3 server that a test may kill."""
    server, endpoint = run_server("moto.server", "-H", "127.0.0.1", "-p", "0")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    clients = type(fsspec.filesystem("s3"))
    clients.clear_instance_cache()  # those have the other endpoint
    yield server, endpoint
    server.kill()
    server.wait()
    clients.clear_instance_cache()


@pytest.mark.parametrize("root", ["s3://bucket/images", "s3://bucket/images.zip"])
def test_images_of_an_s3_server_that_went_down_are_unreadable(root, own_s3, tmp_path, start):
    server, endpoint = own_s3
    s3 = fsspec.filesystem("s3")
    s3.pipe(f"{bucket('bucket')}/images/a.jpg", b"a")
    s3.put(str(archive(tmp_path / "images.zip", {"a.jpg": b"a"})), "s3://bucket/images.zip")
    roots = ImageRoots([root])
    assert roots.read("a.jpg") == b"a"
    server.kill()
    server.wait()

    def refused(_):
        with pytest.raises(BadImage) as e:
            roots.read("a.jpg")
        assert str(e.value).startswith("a.jpg: unreadable (EndpointConnectionError: Could not connect to the endpoint")
        assert endpoint in e.value.detail

    refused(None)
    assert start(refused).wait() == 0


def test_images_of_a_web_server_that_went_down_are_unreadable(tmp_path, start):
    server, url = run_server("http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"a")
    roots = ImageRoots([url])
    assert roots.read("a.jpg") == b"a"
    server.kill()
    server.wait()

    def refused(_):
        with pytest.raises(BadImage, match=r"^a.jpg: unreadable \(ClientConnectorError: Cannot connect to host 127"):
            roots.read("a.jpg")

    refused(None)
    assert start(refused).wait() == 0
