"""What an object store's server, or the way to it, may do."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from olavlm.cache import FeatureStore, StoreBuilder, StoreError, files, pending

ROWS = 4  # a shard


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

        def ignore_condition(request) -> None:
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
        store.assert_reads(4)
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

        def lose_first(request) -> object:
            if request.method == "PUT" and request.key in asked:
                asked[request.key] += 1
                return relay.LOSE if asked[request.key] == 1 else None

        relay.meddle = lose_first
        store = s3().fill()
        assert set(asked.values()) == {2}
        assert store.contents() == small().fill().contents()
        assert [store.group.record(shard).revision for shard in range(3)] == [0, 0, 0]
        assert store.leases() == []

    def test_two_creates_that_met_are_tried_again(self, s3, small, relay):
        """S3 answers 409 to a conditional PUT that arrives while another is being decided."""
        conflict = b"<Error><Code>ConditionalRequestConflict</Code><Message>Try again.</Message></Error>"
        met = {}

        def meet(request) -> object:
            if request.method == "PUT" and "If-None-Match" in request.headers:
                met[request.key] = met.get(request.key, 0) + 1
                return (409, conflict) if met[request.key] == 1 else None

        relay.meddle = meet
        store = s3().fill()
        assert min(met.values()) == 2
        assert {"zarr.json", "plan/00000.parquet", "depth/commits/000002.0.json"} < met.keys()
        assert store.contents() == small().fill().contents()

    def test_half_an_answer_is_never_a_row(self, s3, relay):
        store = s3(filled=True, shape=(16, 64))
        warm, cuts = store.group, []
        warm[4]

        def cut(request) -> object:
            if request.range and len(cuts) < allowed:
                cuts.append(request)
                return relay.CUT

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
