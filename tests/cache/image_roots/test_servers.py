"""Roots behind web servers and S3: what is asked of them, and what they may answer."""

import gzip
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from olavlm.cache import BadImage, DatasetError, ImageRoots, images


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


def test_the_members_of_a_zip_behind_a_url_are_read_by_ranges(guarded, web, archive, reason, read_all, members):
    roots = ImageRoots([guarded.url("images.zip")])
    assert read_all(roots)
    assert reason(roots, "nothing.jpg") == "missing"
    shown, plain = web  # Python's own server sends all or nothing
    archive(shown / "images.zip", members)
    with pytest.raises(DatasetError, match="range"):
        ImageRoots([f"{plain}/images.zip"])


def test_a_server_that_sends_another_range_is_noticed(tmp_path, monkeypatch, archive):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{tmp_path}/x.zip", archive(tmp_path / "x.zip", {"a.jpg": b"a" * 99}, zipfile.ZIP_STORED).read_bytes())
    roots = ImageRoots([f"memory:/{tmp_path}/x.zip"])
    assert roots.read("a.jpg") == b"a" * 99
    whole = memory.cat_file(f"{tmp_path}/x.zip")
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: whole)
    with pytest.raises(BadImage, match=rf"a.jpg: unreadable \({len(whole)} bytes came for 198 asked for\)"):
        roots.read("a.jpg")  # 30 + 5 + 64 + 99


def test_a_web_folder_need_not_be_a_page_but_its_server_must_answer(web, nobody, reason):
    shown, url = web
    (shown / "file.jpg").write_bytes(b"x")
    assert reason(ImageRoots([f"{url}/not a folder"]), "file.jpg") == "missing"
    assert ImageRoots([url]).read("file.jpg") == b"x"
    with pytest.raises(DatasetError, match="cannot be opened: ClientConnectorError"):
        ImageRoots([f"http://{nobody}/images"])


def test_an_s3_bucket_or_folder_that_is_not_there_is_a_dataset_error(s3_server, bucket):
    fsspec.filesystem("s3").pipe(f"{bucket('there')}/images/a.jpg", b"a")
    assert ImageRoots(["s3://there/images"]).read("a.jpg") == b"a"
    for gone in ("s3://there/pictures", "s3://nowhere/images"):
        with pytest.raises(DatasetError, match=f"image root {gone} does not exist"):
            ImageRoots([gone])


def test_an_object_or_a_bucket_that_is_gone_is_missing(s3_server, reason, bucket):
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
def own_s3(s3_server, monkeypatch, run_server) -> Iterator[tuple[subprocess.Popen, str]]:
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
def test_images_of_an_s3_server_that_went_down_are_unreadable(root, own_s3, tmp_path, start, archive, bucket):
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


def test_images_of_a_web_server_that_went_down_are_unreadable(tmp_path, start, run_server):
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
