"""Stores on object storage: the same bytes as on a disk, few requests, one writer a shard, nothing wrong read.

Against a real S3 server on loopback (the fixture `s3_server`), most of it through a relay that counts requests and can
damage them. `python tests/cache/test_objects.py` is the writer that the fault tests kill, see `main`.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import json
import multiprocessing
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from olavlm.cache import (
    CorruptFeatures,
    FeatureStore,
    LeaseHeld,
    LeaseLost,
    MissingExtra,
    MissingFeatures,
    PlanError,
    ShardTask,
    ShardWriter,
    StoreBuilder,
    StoreError,
    files,
    lease,
    pending,
)
from olavlm.cache.records import shards_on_record

FRESH = ["lease", "recover", "stage", "compare", "fsync", "place", "record", "release"]
REPLACE = [*FRESH[:5], "withdraw", *FRESH[5:]]
ROWS = 4  # a shard
HELD, LOST = 3, 4  # exit statuses of a writer
MINUTE = 60


# A writer in a process of its own


def main() -> None:
    """Commit what standard input asks for, a JSON line a job, and answer with a line of exit statuses.

    A job is committed by `writers` processes at once, of which one that gets the lease goes on when the others have
    ended; with `die` it is killed ahead of that step. They are forked from here, where no client has been made yet:
    an event loop would not survive it, and a fresh Python takes seconds to import everything.
    """
    import s3fs  # noqa: F401
    import upath  # noqa: F401
    from botocore.loaders import JSONFileLoader
    from botocore.session import get_session

    load = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda self, path: load(path)  # S3's model: parsed once, not by every fork
    get_session().create_client("s3")
    for line in sys.stdin:
        assert threading.active_count() == 1
        job = json.loads(line)
        (go_read, go_write), (alive_read, alive_write) = os.pipe(), os.pipe()
        children = []
        for _ in range(job["writers"]):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(go_write)
                os._exit(write(job, go_read, alive_read, alive_write))
        for descriptor in (go_read, go_write, alive_read, alive_write):
            os.close(descriptor)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


def write(job: dict, go: int, others: int, me: int) -> int:
    """One process of a job; its exit status."""
    from conftest import SmallStore

    def on_step(step: str) -> None:
        if step == job["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "stage":
            os.close(me)
            os.read(others, 1)  # ends when the last of them has ended

    try:
        task = ShardTask(**job["task"])
        group = FeatureStore(job["store"])[task.key]
        features = dict(enumerate(np.array(job["features"], np.float32), task.start))
        writer = ShardWriter(group.folder, group.layout, group.fingerprint, on_step)
        os.read(go, 1)  # ends when all have been started
        with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
            SmallStore.append(None, shard, task, {int(row): reason for row, reason in job["bad"].items()}, features)
            shard.commit()
        return 0
    except LeaseHeld:
        return HELD
    except LeaseLost:
        return LOST
    except BaseException:
        traceback.print_exc()
        return 1


class Writers:
    """Starts writers of `SmallStore`s; a process that has imported everything, and forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def commit(self, store, shard: int, *, bad: bool, die: str | None = None, writers: int = 1) -> list[int]:
        """Exit statuses of `writers` processes that all commit one shard."""
        task = store.task(shard, retry_failed=True)
        job = {
            "store": str(store.path),
            "task": asdict(task),
            "features": store.features[task.start : task.stop].tolist(),
            "bad": bad_rows(shard) if bad else {},
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


# A relay in front of the server


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


LOSE, CUT = "the server does it and nobody hears", "half of the answer"


class Relay:
    """An HTTP server on loopback that passes everything on to another one.

    `log` is what was asked. `meddle(request)` is called before each request; it may change it, return `LOSE` or `CUT`,
    or a whole answer (status, body) instead of the server's.
    """

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
        if how == LOSE:
            handler.close_connection = True
            return
        handler.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                handler.send_header(name, value)
        length = {n.lower(): v for n, v in headers}.get("content-length", 0)  # of what a HEAD is about
        handler.send_header("Content-Length", str(length if request.method == "HEAD" else len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if how == CUT else data)
        handler.close_connection |= how == CUT

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


# Stores


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


def bad_rows(shard: int) -> dict[int, str]:
    """The second row of the shard."""
    return {shard * ROWS + 1: "missing"}


def all_bad(store) -> dict[int, str]:
    return {row: "missing" for row in range(1, len(store.features), ROWS)}


def contents(store) -> dict[str, bytes]:
    """What two stores of the same features must agree on, by path: all but the records, whose run differs."""
    found = {}
    for path in files.sizes_below(store.path):
        if "/commits/" not in path and path != "depth/index":
            found[path] = files.read(store.path / path)
    return found


def records(store) -> dict[int, dict]:
    """Those that count, without host and timings."""
    group = store.group
    return {n: group.record(n).comparable() for n in shards_on_record(group.folder / "commits")}


def leases(store) -> list[str]:
    return files.names(store.path / "depth" / "leases")


def assert_zarr_reads(store, committed: int) -> None:
    """As the store itself does, and nothing that is not committed."""
    stored, valid = store.group.read_stored(range(committed))
    group = zarr.open_group(str(store.path), mode="r")["depth"]
    assert group.attrs["card"] == store.card
    for name, values in stored.items():
        there = group[name][:]
        np.testing.assert_array_equal(there[:committed][valid], values[valid])
        assert not np.nan_to_num(there[committed:]).any()  # the fill value


def assert_reads(group, row: int, expected: np.ndarray | None) -> None:
    """A row reads as `expected`, None for one that is not committed."""
    if expected is None:
        with pytest.raises(MissingFeatures):
            group[row]
    else:
        np.testing.assert_array_equal(group[row], expected)


@pytest.mark.parametrize(("dtype", "compress"), [("float16", "none"), ("int8", "none"), ("int4", "zstd")])
def test_the_whole_life_is_the_same_as_on_a_disk(store_at, small, dtype, compress):
    stores = [make(dtype=dtype, compress=compress) for make in (small, store_at)]
    for store in stores:
        store.fill({5: "missing", 9: "truncated"}, limit=9)
        assert str(store.group.coverage()) == "9 of 10 images: 8 valid, 1 quarantined (1 missing), 1 missing"
        if store.path.as_posix().startswith("s3:"):
            assert_zarr_reads(store, committed=9)
        store.fill({5: "missing", 9: "truncated"})
        store.builder.index()
    local, store = stores
    assert contents(store) == contents(local)
    assert {"zarr.json", "plan/00000.parquet", "depth/zarr.json", "depth/features/c/2/0/0"} < contents(store).keys()
    assert ("depth/scales/c/2/0" in contents(store)) == store.codec.has_scales
    assert records(store) == records(local)

    opened = FeatureStore(str(store.path))
    group = opened["depth"]
    assert (opened.teachers, group.shape, opened.plan.num_rows) == (["depth"], (10, 3, 4), 10)
    rows = [9, 0, 3, 5, 8, 3]
    for _ in range(2):  # cold and warm
        values, valid = group.read(rows)
        assert valid.tolist() == [False, True, True, False, True, True]
        np.testing.assert_array_equal(values[valid], store.expected[rows][valid])
        assert np.isnan(values[~valid]).all()
    np.testing.assert_array_equal(group["photos/00003.jpg"], store.expected[3])
    assert [(row, e.reason, e.detail) for row, e in group.failures()] == [
        (5, "missing", "detail of 5"),
        (9, "truncated", "detail of 9"),
    ]
    assert group.failure(5).image == "photos/00005.jpg"
    assert str(group.coverage()) == str(local.group.coverage())
    assert group.info() == local.group.info()

    for each in stores:  # replace what failed
        each.fill(retry_failed=True)
        each.builder.index()
    assert store.group.coverage().valid == 10
    assert contents(store) == contents(local)
    np.testing.assert_array_equal(store.group.read(range(10))[0], store.expected)
    assert pending(store.group, retry_failed=True) == []


@pytest.mark.parametrize("name", ["", "/a folder/ünïcode"])
def test_a_store_may_be_a_whole_bucket_or_have_any_name(bucket, small_store, name):
    url = f"s3://{bucket.name}{name}"
    store = small_store(files.location(f"{url}/"), rows=5).fill()
    np.testing.assert_array_equal(FeatureStore(url)["depth"].read(range(5))[0], store.features)
    store.builder.drop("depth")
    assert FeatureStore(url).teachers == []


def image_paths(count: int, first: int = 0) -> pa.LargeStringArray:
    return pa.array([f"photos/{i:05d}.jpg" for i in range(first, first + count)], pa.large_string())


def test_it_grows_is_replaced_and_dropped(store_at, small):
    stores = [make() for make in (small, store_at)]
    for store in stores:
        store.fill()
        assert store.builder.extend_plan(image_paths(12))[1] == 2
        assert [t.start for t in pending(store.group)] == [4096]
        assert store.group.coverage().missing == 2
    local, store = stores
    assert contents(store) == contents(local)
    assert_reads(store.group, 9, store.features[9])
    assert_reads(store.group, 4097, None)
    with pytest.raises(PlanError, match="12 of its 12 images are not in the dataset"):
        store.builder.extend_plan(image_paths(3, first=50))

    other = {**store.card, "recipe": "last", "fingerprint": "0" * 64}
    with pytest.raises(StoreError, match="recipe is null there and"):
        store.builder.ensure_teacher("depth", other, dtype="int8", shard_rows=ROWS)
    assert_reads(store.group, 9, store.features[9])
    for each in stores:
        each.builder.ensure_teacher("depth", other, dtype="int8", shard_rows=ROWS, replace=True)
    assert contents(store) == contents(local)
    assert store.group.coverage().missing == 12
    for each in stores:
        plan, added = each.builder.extend_plan(image_paths(3, first=50), replace=True)
        assert (plan.num_images, added, FeatureStore(each.path).teachers) == (3, 3, [])
        each.builder.ensure_teacher("depth", each.card, dtype="float32", shard_rows=ROWS)
        each.builder.drop("depth")
    assert contents(store) == contents(local)
    assert FeatureStore(store.path).teachers == []


def test_a_row_that_a_replacement_carries_over_outlives_its_writer(store_at):
    store = store_at(dtype="int8").fill({5: "missing"})
    expected = store.group.read(range(4, 8))[0]

    def replace(on_step=None) -> None:
        with store.writer(on_step).begin(1, (4, 8), store.group.plan.segments[0].hash) as shard:
            for row in range(4, 8):
                parts, sha256 = shard.carry_over(row) or (None, None)
                shard.append_stored(parts, image_sha256=sha256, reason="missing")
            shard.commit()

    def fail(step: str) -> None:
        if step == "place":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(fail)
    assert store.group.record(1) is None
    assert len(files.names(store.group.folder / "staging")) == 3
    replace()
    np.testing.assert_array_equal(store.group.read(range(4, 8))[0], expected)
    assert files.names(store.group.folder / "staging") == []


def test_a_store_copied_to_s3_by_any_tool_is_a_store(small, bucket):
    local = small(dtype="int8").fill({5: "missing"})
    local.builder.index()
    bucket.upload(local.path, "copied/store")
    group = FeatureStore(bucket.url("copied/store"))["depth"]
    assert str(group.coverage()) == str(local.group.coverage())
    np.testing.assert_array_equal(group.read(range(10))[0], local.group.read(range(10))[0])
    assert pending(group) == []


class TestRequests:
    """What the server is asked, by its relay."""

    @pytest.mark.parametrize(("dtype", "arrays"), [("float16", 1), ("int8", 2)])
    def test_a_row(self, s3, relay, dtype, arrays):
        store = s3(filled=True, dtype=dtype, shape=(16, 64))
        group = store.group
        row_bytes = [array.row_bytes + 4 for array in group.layout.arrays.values()]
        cold = relay.asked_by(lambda: group[4])
        print(cold)
        # Of all records those of this shard are listed, one is read; then of each file its size, its index and the row.
        assert "commits%2F000001." in cold[0].path
        assert [r.method for r in cold].count("HEAD") == arrays
        assert [r.key for r in cold if r.method == "GET"][:2] == ["", "depth/commits/000001.0.json"]
        ranges = [r.range for r in cold if r.method == "GET"][2:]
        assert sorted(ranges) == sorted(row_bytes + [array.index_bytes for array in group.layout.arrays.values()])
        assert len(cold) == 2 + 3 * arrays

        warm = relay.asked_by(lambda: group[5])  # of the same shard; both arrays at once, which arrive in any order
        assert sorted((r.method, r.range) for r in warm) == sorted(("GET", n) for n in row_bytes)
        np.testing.assert_array_equal(group.read([5, 4])[0], store.expected[[5, 4]])

    def test_a_batch_is_asked_for_at_once(self, s3, relay):
        store = s3(filled=True, rows=8)
        group, rows = store.group, [7, 0, 3, 5, 1, 6, 4, 2]
        group.read([0, 4])  # both shards are known now
        mark, all_here = len(relay.log), threading.Barrier(len(rows), timeout=5)
        relay.meddle = lambda request: all_here.wait() and None  # nobody is answered until all have asked
        np.testing.assert_array_equal(group.read(rows)[0], store.features[rows])
        assert [r.range for r in relay.log[mark:]] == [group.layout.row_bytes + 4] * len(rows)

    def test_opening_and_coverage_are_a_few_whatever_the_number_of_shards(self, s3, relay):
        def in_pages(request: Request) -> None:
            """As a store of millions of rows would be listed."""
            if "list-type" in request.path:
                request.path += "&max-keys=25"

        asked, opened = {}, {}
        for shards in (3, 60):
            store = s3(str(shards), filled=True, bad={1: "missing"}, rows=shards, shape=(1, 4), shard_rows=1)
            store.builder.index()
            relay.meddle = in_pages
            mark = len(relay.log)
            group = store.group
            opened[shards] = relay.log[mark:]
            coverage = group.coverage()
            assert (coverage.valid, coverage.quarantined) == (shards - 1, 1)
            asked[shards] = relay.log[mark:]
            relay.meddle = lambda request: None
        print("opened", opened[60], "and then", asked[60][len(opened[60]) :], sep="\n")
        assert len(opened[3]) == len(opened[60]) <= 10
        assert len(asked[3]) <= 14
        assert len(asked[60]) == len(asked[3]) + 2 * 2  # pages of records and of shard files
        assert not [r for r in asked[60] if ".json" in r.key and "commits" in r.key]


class TestFaults:
    def test_a_writer_killed_at_any_step(self, s3, small, writers):
        options = {"rows": ROWS * len(FRESH)}
        store = s3(**options)
        whole = small(**options)
        whole.fill(all_bad(whole))
        for shard, step in enumerate(FRESH):
            assert writers.commit(store, shard, bad=True, die=step) == [-signal.SIGKILL]
            committed = step == "release"
            group, first = store.group, shard * ROWS
            assert_reads(group, first, store.features[first] if committed else None)
            assert str(group.coverage()) == (
                "4 of 32 images: 3 valid, 1 quarantined (1 missing), 28 missing" if committed
                else "0 of 32 images: 0 valid, 0 quarantined, 32 missing"
            )  # fmt: skip
            placed = files.exists(store.shard_file(shard))
            assert placed == (step in ("record", "release")), step  # the control: it came this far
        assert leases(store) == [f"{shard:06d}.0" for shard in range(1, len(FRESH))]
        store.fill(all_bad(store))
        store.writer().sweep(len(FRESH) - 1)  # its own is the one lease that was still to be released
        assert leases(store) == []
        assert contents(store) == contents(whole)
        assert records(store) == records(whole)

    def test_a_writer_killed_while_it_replaces(self, s3, small, writers):
        options = {"rows": ROWS * len(REPLACE)}
        whole = small(**options)
        whole.fill(all_bad(whole))
        store = s3(filled=True, bad=all_bad(whole), **options)
        store.builder.index()
        for shard, step in enumerate(REPLACE):
            assert writers.commit(store, shard, bad=False, die=step) == [-signal.SIGKILL]
            group, first, at = store.group, shard * ROWS, REPLACE.index(step)
            if step in ("place", "record"):
                assert_reads(group, first, None)
                assert group.record(shard) is None
            else:
                values, valid = group.read(range(first, first + ROWS))
                assert valid.tolist() == [True, at == len(REPLACE) - 1, True, True]
                np.testing.assert_array_equal(values[valid], store.features[first : first + ROWS][valid])
        assert group.coverage().missing == 2 * ROWS
        assert leases(store) == [f"{shard:06d}.0" for shard in range(1, len(REPLACE))]
        for each in (store, whole):
            each.fill(retry_failed=True)
        store.writer().sweep(len(REPLACE) - 1)
        assert leases(store) == []
        assert contents(store) == contents(whole)
        assert records(store) == records(whole)

    def test_a_writer_killed_in_the_middle_of_a_withdrawal(self, s3, bucket):
        """An object store has no rename: the record is there, and so is its withdrawal."""
        store = s3().fill({5: "missing"})
        store.builder.index()
        opened = store.group
        file = store.record_file(1)
        bucket.put(file.with_suffix(".withdrawn"), files.read(file))
        group = store.group
        assert group.record(1) is None
        assert_reads(group, 4, None)
        assert group.coverage().missing == opened.coverage().missing == ROWS
        assert [t.shard for t in pending(group)] == [1]
        store.fill()
        assert store.group.record(1).revision == 1
        np.testing.assert_array_equal(store.group.read(range(10))[0], store.features)

    def test_of_many_that_race_for_a_shard_one_commits(self, s3, small, writers):
        store, whole = s3(rows=ROWS), small(rows=ROWS)
        assert sorted(writers.commit(store, 0, bad=True, writers=4)) == [0, *[HELD] * 3]
        assert contents(store) == contents(whole.fill(all_bad(whole)))
        assert records(store) == records(whole)

    def test_of_many_creates_of_one_name_one_succeeds(self, s3):
        store = s3()

        def create(content: bytes) -> bytes | None:
            try:
                files.publish(file, content)
            except FileExistsError:
                return None
            return content

        with ThreadPoolExecutor(8) as pool:
            for trial in range(5):
                file = store.path / f"race-{trial}"
                won = [c for c in pool.map(create, [b"%d" % i for i in range(8)]) if c is not None]
                assert won == [files.read(file)]

    @pytest.mark.parametrize("steps", [FRESH[3:-1], REPLACE[3:-1]], ids=["fresh", "replacing"])
    def test_a_stuck_writer_that_wakes_when_another_is_done_changes_nothing(self, s3, bucket, monkeypatch, steps):
        replacing, rows = "withdraw" in steps, ROWS * len(steps)
        store = s3(filled=replacing, bad=dict.fromkeys(range(1, rows, ROWS), "missing"), rows=rows)
        store.builder.index()
        after = []
        for shard, step in enumerate(steps):
            task = store.task(shard, retry_failed=True)

            def stuck(at: str, step=step, task=task) -> None:
                if at == step:
                    mine = store.lease_file(task.shard)
                    bucket.put(mine, files.read(mine).replace(b'"host": "', b'"host": "not-'))
                    with monkeypatch.context() as patch:
                        patch.setattr(lease, "LEASE_SECONDS", -MINUTE)  # silent for too long
                        store.commit(task)  # the other writer, from lease to release
                    after.append(bucket.all(store))

            with pytest.raises(LeaseLost):
                store.commit(task, on_step=stuck, features=store.features + 1)
            assert bucket.all(store) == after[-1], step
            np.testing.assert_array_equal(store.group[task.start], store.features[task.start])
        assert leases(store) == []

    def test_a_record_published_too_late_is_taken_back(self, s3, bucket, monkeypatch):
        """A writer stalls after its last look at the lease; the other has placed its file and not yet its record."""
        store = s3(rows=ROWS)
        task = store.task(0)

        def other(at: str) -> None:
            if at == "record":
                raise KeyboardInterrupt

        def stuck(at: str) -> None:
            if at == "record":
                mine = store.lease_file(0)
                bucket.put(mine, files.read(mine).replace(b'"host": "', b'"host": "not-'))
                with monkeypatch.context() as patch:
                    patch.setattr(lease, "LEASE_SECONDS", -MINUTE)
                    with pytest.raises(KeyboardInterrupt):
                        store.commit(task, on_step=other)
                monkeypatch.setattr(shard.lease, "check", lambda: None)  # the look that came just before

        with store.writer(stuck).begin(0, (0, ROWS), task.segment) as shard:
            store.append(shard, task, features=store.features + 1)
            with pytest.raises(LeaseLost):
                shard.commit()
        assert files.exists(store.shard_file(0))
        assert store.group.record(0) is None
        store.fill()
        np.testing.assert_array_equal(store.group[0], store.features[0])


class TestDamage:
    HOW = ("flipped", "short", "empty", "swapped", "removed", "cut")

    def damage(self, bucket, store, shard: int, array: str) -> None:
        file, how = store.shard_file(shard, array), self.HOW[shard]
        content = bytearray(files.read(file))
        if how == "removed":
            files.remove(file)
            return
        if how == "flipped":
            content[1] ^= 4
        elif how == "swapped":
            content = files.read(store.shard_file(len(self.HOW), array))
        else:
            del content[{"short": 2, "empty": 0, "cut": -1}[how] :]
        bucket.put(file, bytes(content))

    def test_is_an_error_for_who_has_read_before_and_who_has_not(self, s3, bucket):
        shards = range(len(self.HOW))
        store = s3(filled=True, rows=ROWS * (len(self.HOW) + 1), dtype="int8")
        store.builder.index()
        warm, batched = store.group, store.group
        for group in (warm, batched):
            group.read(range(len(store.features)))
        for shard in shards:
            self.damage(bucket, store, shard, store.arrays[shard % 2])
        cold, last = store.group, ROWS * len(self.HOW)
        for shard, how in enumerate(self.HOW):
            row = shard * ROWS
            for group in (warm, cold) if how != "cut" else (cold,):  # who has seen the index needs no more of it
                with pytest.raises(CorruptFeatures, match=rf"row {row} |{shard:06d}\.0\.json"):
                    group[row]
            if how != "cut":
                with pytest.raises(CorruptFeatures):
                    batched.read([last, row])
        for group in (warm, cold, batched):
            np.testing.assert_array_equal(group.read([last, last + 1])[0], store.expected[last : last + 2])
        unseen = [shard for shard in shards if self.HOW[shard] in ("flipped", "swapped")]  # of the right size
        assert store.group.coverage().missing == ROWS * (len(shards) - len(unseen))
        assert [t.shard for t in pending(store.group)] == [s for s in shards if s not in unseen]
        store.fill()
        rows = [row for row in range(len(store.features)) if row // ROWS not in unseen]
        np.testing.assert_array_equal(store.group.read(rows)[0], store.expected[rows])

    def test_of_what_describes_them(self, s3, bucket):
        store = s3(filled=True, rows=8)
        store.builder.index()
        for path, error in {
            "depth/commits/000000.0.json": CorruptFeatures,
            "plan/00000.parquet": PlanError,
            "depth/zarr.json": StoreError,
            "depth/features/zarr.json": StoreError,
        }.items():
            whole = files.read(store.path / path)
            middle = len(whole) // 2
            bucket.put(store.path / path, whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
            with pytest.raises(error):
                store.group[0]
            bucket.put(store.path / path, whole)
        bucket.put(store.path / "depth" / "index", b"not an index")  # which is made anew from the records
        assert store.group.coverage().valid == 8
        assert_reads(store.group, 0, store.features[0])


class TestServer:
    """What a server, or the way to it, may do."""

    def test_every_create_is_a_conditional_put(self, s3, relay):
        store = s3().fill({5: "missing"})
        store.fill(retry_failed=True)
        puts = [r for r in relay.log if r.method == "PUT"]
        made = {r.key for r in puts}
        assert {"zarr.json", "plan/00000.parquet", "depth/features/zarr.json", "depth/leases/000001.0"} < made
        assert {"depth/commits/000001.0.json", "depth/commits/000001.0.withdrawn"} < made
        assert {r.headers.get("If-None-Match") for r in puts} == {"*"}

    def test_a_server_that_ignores_the_condition_is_for_reading_only(self, s3, relay, bucket):
        store = s3(filled=True)
        before = bucket.all(store)

        def ignore_condition(request: Request) -> None:
            request.headers.pop("If-None-Match", None)

        relay.meddle = ignore_condition
        for url in (str(store.path), bucket.url("not-yet-a-store")):
            with pytest.raises(StoreError, match=r"can be read but not written.*conditional PUT"):
                StoreBuilder(url)
        np.testing.assert_array_equal(store.group.read(range(10))[0], store.features)
        assert bucket.all(store) == before
        relay.meddle = lambda request: None
        StoreBuilder(store.path)  # the control: the same relay, and the condition

    def test_who_may_only_read_can(self, s3, relay):
        store = s3(filled=True, bad={5: "missing"})
        refusal = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        relay.meddle = lambda request: None if request.method in ("GET", "HEAD") else (403, refusal)
        group = store.group
        assert str(group.coverage()) == "10 of 10 images: 9 valid, 1 quarantined (1 missing)"
        assert_reads(group, 4, store.features[4])
        assert [row for row, _ in group.failures()] == [5]
        with pytest.raises(StoreError, match="cannot be written: Access Denied"):
            StoreBuilder(store.path)

    def test_a_bucket_that_is_not_there(self, s3_server):
        with pytest.raises(StoreError, match="s3://no-such-bucket/store is not a feature store"):
            FeatureStore("s3://no-such-bucket/store")
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/store cannot be written.*bucket does not exist"):
            StoreBuilder("s3://no-such-bucket/store")

    def test_an_answer_that_is_lost(self, s3, small, relay):
        """The client asks again, and what it created itself is in its way."""
        keys = ["leases/000001.0", "features/c/1/0/0", "commits/000001.0.json", "features/zarr.json"]
        asked = {f"depth/{key}": 0 for key in keys}

        def lose_first(request: Request) -> object:
            if request.method == "PUT" and request.key in asked:
                asked[request.key] += 1
                return LOSE if asked[request.key] == 1 else None

        relay.meddle = lose_first
        store = s3().fill()
        assert set(asked.values()) == {2}
        assert contents(store) == contents(small().fill())
        assert [store.group.record(shard).revision for shard in range(3)] == [0, 0, 0]
        assert leases(store) == []

    def test_two_creates_that_met_are_tried_again(self, s3, small, relay):
        """S3 answers 409 to a conditional PUT that arrives while another is being decided."""
        conflict = b"<Error><Code>ConditionalRequestConflict</Code><Message>Try again.</Message></Error>"
        met = {}

        def meet(request: Request) -> object:
            if request.method == "PUT" and "If-None-Match" in request.headers:
                met[request.key] = met.get(request.key, 0) + 1
                return (409, conflict) if met[request.key] == 1 else None

        relay.meddle = meet
        store = s3().fill()
        assert min(met.values()) == 2
        assert {"zarr.json", "plan/00000.parquet", "depth/commits/000002.0.json"} < met.keys()
        assert contents(store) == contents(small().fill())

    def test_half_an_answer_is_never_a_row(self, s3, relay):
        store = s3(filled=True, shape=(16, 64))
        warm, cuts = store.group, []
        warm[4]

        def cut(request: Request) -> object:
            if request.range and len(cuts) < allowed:
                cuts.append(request)
                return CUT

        allowed, relay.meddle = 1, cut
        np.testing.assert_array_equal(warm[5], store.features[5])  # asked for again
        assert len(cuts) == 1
        allowed = 10**6
        for group in (warm, store.group):
            with pytest.raises(OSError, match=r"ClientPayloadError|payload is not completed"):
                group[6]

    def test_a_server_that_dies(self, small_store, monkeypatch):
        import fsspec

        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        endpoint = next(url[0] for line in server.stderr if (url := re.search(r"http://127\.0\.0\.1:\d+", line)))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        fsspec.filesystem("s3").mkdir("mortal")
        store = small_store(files.location("s3://mortal/store"))
        store.fill(limit=8)
        warm, task = store.group, store.task(2)
        warm[4]
        shard = store.writer().begin(2, (task.start, task.stop), task.segment)
        store.append(shard, task)
        server.kill()
        server.wait()
        for act in (lambda: warm[5], lambda: warm.read([1, 4, 7]), lambda: warm[0], lambda: warm[8], warm.coverage,
                    shard.commit, lambda: FeatureStore(store.path), lambda: pending(warm)):  # fmt: skip
            with pytest.raises(OSError, match="EndpointConnectionError"):
                act()
        with pytest.raises(StoreError, match=r"cannot be written.*EndpointConnectionError"):
            StoreBuilder(store.path)
        with pytest.raises(OSError, match="EndpointConnectionError"):
            shard.drop()
        assert not list(Path(shard._temporary).parent.glob(shard._temporary.name))  # nothing staged is left here

    def test_a_large_shard_is_one_conditional_put(self, bucket):
        """Servers that heed the condition of a PUT may ignore that of an upload in parts."""
        file = files.location(bucket.url("large/shard"))
        files.publish(file, bytes(101 * 2**20))
        with pytest.raises(FileExistsError):
            files.publish(file, b"1" + bytes(101 * 2**20 - 1))
        head = bucket.client.head_object(Bucket=bucket.name, Key="large/shard")
        assert (head["ContentLength"], "-" in head["ETag"]) == (101 * 2**20, False)
        assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.name)
        files.remove(file)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_opened_here_is_read_by_loader_processes(s3, method):
    """A client's event loop does not live on in a forked process."""
    store = s3(filled=True, bad={5: "missing"}, dtype="float16", rows=20)
    group = store.group
    group[0]  # the client is made, and one of the shards known
    rows = [[0, 1, 5, 19], [8, 3, 17, 2]]
    pool = ProcessPoolExecutor(1, multiprocessing.get_context(method))
    with pool:
        answers = [pool.submit(group.read, some) for some in rows]
        for some, answer in zip(rows, answers, strict=True):
            values, valid = answer.result(timeout=MINUTE)
            assert valid.tolist() == [row != 5 for row in some]
            np.testing.assert_array_equal(values[valid], store.expected[some][valid])
    np.testing.assert_array_equal(group[18], store.expected[18])


def test_credentials_are_nowhere_in_the_store(s3, bucket, monkeypatch):
    import fsspec

    key, secret = "AKIAUNUSUALKEY", "an+unusual/secret"
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": key, "secret": secret})
    store = s3().fill({5: "missing"})
    store.builder.index()
    store.writer().begin(0, (0, ROWS), store.group.plan.segments[0].hash)  # and its lease
    found = bucket.all(store)
    assert {"zarr.json", "depth/index", "depth/leases/000000.0", "depth/commits/000000.0.json"} < found.keys()
    for name, content in found.items():
        assert key.encode() not in content, name
        assert secret.encode() not in content, name
    group = store.group
    for text in (repr(group), repr(FeatureStore(store.path)), repr(pickle.dumps(group)), json.dumps(group.info())):
        assert key not in text
        assert secret not in text


@pytest.mark.parametrize(
    ("missing", "url", "message"),
    [
        ("s3fs", "s3://bucket/store", r"store s3://bucket/store cannot be opened .*pip install 'olavlm\[s3\]'$"),
        ("gcsfs", "gs://bucket/store", "gcsfs.*install that package$"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_remedy(missing, url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for act in (FeatureStore, StoreBuilder):
        with pytest.raises(MissingExtra, match=message) as error:
            act(url)
        assert "\n" not in str(error.value)


def test_an_unknown_protocol():
    with pytest.raises(StoreError, match="store nosuch://x/y cannot be opened: Protocol not known: nosuch"):
        FeatureStore("nosuch://x/y")


if __name__ == "__main__":
    main()
