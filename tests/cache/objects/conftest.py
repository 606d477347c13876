"""A real S3 server's stores, a relay that counts requests and can damage them, and writers that can be killed."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import secrets
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from olavlm.cache import files


class Writers:
    """Starts writers of `SmallStore`s; a process that has imported everything, and forks."""

    HELD, LOST = 3, 4  # exit statuses, of `s3_writer.py`

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("s3_writer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def commit(self, store, shard: int, *, bad: bool, die: str | None = None, writers: int = 1) -> list[int]:
        """Exit statuses of `writers` processes that all commit one shard, with `bad` its second row quarantined."""
        task = store.task(shard, retry_failed=True)
        job = {
            "store": str(store.path),
            "task": asdict(task),
            "features": store.features[task.start : task.stop].tolist(),
            "bad": {task.start + 1: "missing"} if bad else {},
            "die": die,
            "writers": writers,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def writers(s3_server):
    writers = Writers()
    yield writers
    writers.end()


@dataclass
class Request:
    """One request as the client sent it; a test may change `path` and `headers` before it is passed on."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def key(self) -> str:
        """Of the object, in its store; empty for a listing."""
        return urllib.parse.unquote(self.path.partition("?")[0]).partition("/")[2].partition("/")[2].partition("/")[2]

    @property
    def range(self) -> int | None:
        """Bytes asked for, None for all."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return int(match[2]) - int(match[1]) + 1 if match else None

    def __repr__(self) -> str:
        asked = self.key or "list " + self.path.partition("?")[2]
        return f"{self.method} {asked} {self.headers.get('Range', '')}".strip()


class Relay:
    """An HTTP server on loopback that passes everything on to another one.

    `log` is what was asked. `meddle(request)` is called before each request; it may change it, return `LOSE` or `CUT`,
    or a whole answer (status, body) instead of the server's.
    """

    LOSE, CUT = "the server does it and nobody hears", "half of the answer"

    def __init__(self, endpoint: str) -> None:
        self.log: list[Request] = []
        self.meddle: Callable[[Request], object] = lambda request: None
        self._host = endpoint.removeprefix("http://")
        relay = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else a keep-alive client waits 40 ms for each body

            def relay(self) -> None:
                relay.pass_on(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def pass_on(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        request = Request(handler.command, handler.path, dict(handler.headers))
        self.log.append(request)
        how = self.meddle(request)
        if isinstance(how, tuple):
            status, data, headers = how[0], how[1], []
        else:
            server = http.client.HTTPConnection(self._host)
            server.request(request.method, request.path, body, request.headers)
            answer = server.getresponse()
            status, data, headers = answer.status, answer.read(), answer.getheaders()
            server.close()
        if how == self.LOSE:
            handler.close_connection = True
            return
        handler.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                handler.send_header(name, value)
        length = {n.lower(): v for n, v in headers}.get("content-length", 0)  # of what a HEAD is about
        handler.send_header("Content-Length", str(length if request.method == "HEAD" else len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if how == self.CUT else data)
        handler.close_connection |= how == self.CUT

    def asked_by(self, act: Callable[[], object]) -> list[Request]:
        mark = len(self.log)
        act()
        return self.log[mark:]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def the_relay(s3_server):
    relay = Relay(s3_server)
    yield relay
    relay.close()


@pytest.fixture
def relay(the_relay, monkeypatch):
    """A `Relay` that s3fs talks to in this test, and asks twice if need be."""
    import fsspec
    import s3fs

    the_relay.log.clear()
    the_relay.meddle = lambda request: None
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": the_relay.endpoint})
    return the_relay


class Bucket:
    """A new bucket, with the objects as another client sees them."""

    def __init__(self, client, name: str) -> None:
        self.client, self.name = client, name
        client.create_bucket(Bucket=name)

    def url(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}"

    def all(self, store) -> dict[str, bytes]:
        """Every object of a store, by its path in it."""
        prefix = str(store.path).removeprefix(f"s3://{self.name}/") + "/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        with ThreadPoolExecutor(8) as pool:
            got = pool.map(lambda key: self.client.get_object(Bucket=self.name, Key=key)["Body"].read(), keys)
            return {key.removeprefix(prefix): body for key, body in zip(keys, got, strict=True)}

    def put(self, file, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=str(file).removeprefix(f"s3://{self.name}/"), Body=content)

    def upload(self, folder: Path, prefix: str) -> None:
        """A folder as any copying tool would."""
        found = [f for f in folder.rglob("*") if f.is_file()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda f: self.put(f"{prefix}/{f.relative_to(folder).as_posix()}", f.read_bytes()), found))


@pytest.fixture(scope="module")
def client(s3_server):
    import boto3

    return boto3.client("s3")


@pytest.fixture
def bucket(client):
    """One a test: to list a part of it, the server looks at all of it."""
    return Bucket(client, f"objects-{secrets.token_hex(4)}")


@pytest.fixture
def s3(bucket, small, small_store):
    """s3(name="store", **options) -> SmallStore in the bucket of this test.

    With `filled` its shards are committed on the disk and copied there, which is quicker; `bad` as for `fill`.
    """

    def make(name: str = "store", filled: bool = False, bad: dict[int, str] | None = None, **options):
        if filled:
            bucket.upload(small(f"of-{name}", **options).fill(bad).path, name)
        return small_store(files.location(bucket.url(name)), **options)

    return make


@pytest.fixture(params=["s3", "memory"])
def store_at(request, small_store):
    """As `s3`, there and in memory."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    import fsspec

    memory = fsspec.filesystem("memory")
    yield lambda name="store", **options: small_store(files.location(f"memory://objects/{name}"), **options)
    with contextlib.suppress(FileNotFoundError):
        memory.rm("/objects", recursive=True)
