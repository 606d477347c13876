"""Images behind every kind of root, and servers that show them."""

import base64
import functools
import re
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pytest

from olavlm.cache import BadImage, ImageRoots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/{a.jpg, sub/b.jpg} and, beside it, a secret."""
    (tmp_path / "secret").write_bytes(b"secret")
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.jpg").write_bytes(b"a")
    (images / "sub" / "b.jpg").write_bytes(b"b")
    return images


def write_archive(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return file


@pytest.fixture(scope="session")
def archive():
    """archive(file, members, compression) -> the file, a zip."""
    return write_archive


def why_not(roots: ImageRoots, image: str) -> str:
    with pytest.raises(BadImage) as e:
        roots.read(image)
    assert e.value.image == image
    return e.value.reason


@pytest.fixture(scope="session")
def reason():
    """reason(roots, image) -> why it cannot be read."""
    return why_not


def start_server(*module: str) -> tuple[subprocess.Popen, str]:
    """`python -m MODULE ...` as a process, and the URL that it prints."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", *module], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    url = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    threading.Thread(target=server.stdout.read, daemon=True).start()  # one line a request: a full pipe would stop it
    return server, url


@pytest.fixture(scope="session")
def run_server():
    """run_server(module, ...) -> process of `python -m`, and the URL that it prints."""
    return start_server


def new_bucket(name: str) -> str:
    """A new bucket."""
    fsspec.filesystem("s3").mkdir(f"s3://{name}")
    return f"s3://{name}"


@pytest.fixture(scope="session")
def bucket():
    """bucket(name) -> URL of a new one."""
    return new_bucket


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder, and the URL at which a process of Python's own web server shows it."""
    folder = tmp_path_factory.mktemp("web")
    server, url = start_server("http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder))
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
            s3, there = fsspec.filesystem("s3"), new_bucket(re.sub("[^a-z0-9]", "-", tmp_path.name))
            if kind == "zip on S3":
                s3.put(str(write_archive(zipped, files)), f"{there}/images.zip")
                return f"{there}/images.zip"
            s3.pipe({f"{there}/images/{name}": content for name, content in files.items()})
            return f"{there}/images"
        if "zip" in kind:
            top = "top/" if kind == "folder in a zip" else ""
            write_archive(zipped, {top + name: content for name, content in files.items()})
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


BYTES = np.random.default_rng(0).bytes
MEMBERS = {f"{i // 50:03d}/{i:05d}.jpg": BYTES(200) * (1 + i % 7) for i in range(200)}


@pytest.fixture(scope="session")
def members() -> dict[str, bytes]:
    """The files of an archive."""
    return MEMBERS


def all_read(roots: ImageRoots, members: dict[str, bytes] = MEMBERS, threads: int = 4) -> bool:
    """Whether threads that read at once get the right bytes for every member."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(roots.read, members)) == list(members.values())


@pytest.fixture(scope="session")
def read_all():
    """read_all(roots, members, threads) -> whether threads that read at once get the right bytes for every member."""
    return all_read


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


@dataclass(frozen=True)
class Guard:
    """A guarded web server that shows `images` and `images.zip`."""

    host: str
    """HOST:PORT."""
    signature = SIGNATURE
    secrets = SECRETS

    def url(self, path: str, host: str | None = None, password: str = PASSWORD, query: str = QUERY) -> str:
        """With all that it wants, or of another host, or with something else."""
        return f"http://bob:{quote(password, safe='')}@{host or self.host}/{path}?{query}"


@pytest.fixture
def guarded(folder, tmp_path):
    write_archive(tmp_path / "images.zip", MEMBERS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Guarded, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Guard(f"127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.fixture
def nobody() -> str:
    """HOST:PORT where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return f"127.0.0.1:{s.getsockname()[1]}"
