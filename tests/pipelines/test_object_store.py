"""The commands with their store on S3: a real server on loopback, Ray, and training from it."""

import json
import os
import re
import secrets
import signal
import sys
import threading

import numpy as np
import pytest

from olavlm.cache import CorruptFeatures, FeatureStore, files
from olavlm.cache.records import latest_records
from olavlm.pipelines import extract, store, train
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train as run_training

KEY, SECRET = "AKIAOFTHISTEST", "the/secret+of/this/test"
ROWS = 10  # of the bundled captions


class Bucket:
    """An empty bucket, and its objects as another client sees them."""

    def __init__(self) -> None:
        import boto3

        self.name = f"commands-{secrets.token_hex(4)}"
        self._bucket = boto3.resource("s3").create_bucket(Bucket=self.name)

    def url(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}"

    def all(self, prefix: str = "") -> dict[str, bytes]:
        """Every object, by its path below `prefix`."""
        found = self._bucket.objects.filter(Prefix=prefix)
        return {item.key.removeprefix(prefix).lstrip("/"): item.get()["Body"].read() for item in found}

    def has(self, prefix: str) -> bool:
        return any(True for _ in self._bucket.objects.filter(Prefix=prefix).limit(1))

    def blank(self, prefix: str, part: str) -> None:
        """Write zeros over the objects below `prefix` with `part` in their path."""
        for item in self._bucket.objects.filter(Prefix=prefix):
            if part in item.key:
                item.put(Body=bytes(item.size))

    def upload(self, folder, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self._bucket.upload_file(str(file), f"{prefix}/{file.relative_to(folder).as_posix()}")


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """With credentials in the environment that are to be found nowhere else."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return Bucket()


@pytest.fixture
def words(tiny, pt_json, sample_images):
    """Arguments of an extraction of tiny teachers."""

    def make(store_url, *more, teachers=("depth",)):
        named = [w for t in teachers for w in ("--teacher", f"{t}={tiny[t]}")]
        fixed = ["--data", pt_json, "--images", sample_images, "--batch-size", 4, "--device", "cpu"]
        return [str(w) for w in (*named, *fixed, "--store", store_url, *more)]

    return make


def contents(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what tells of a run: records, their index, and its own record."""
    return {path: body for path, body in found.items() if not re.search(r"^runs/|/commits/|/index$|/leases/", path)}


def records(group) -> dict[int, dict]:
    shards = latest_records(files.names(group.folder / "commits"))
    return {n: {**group.record(n).comparable(), "revision": 0} for n in shards}


def assert_no_credentials(found: dict[str, bytes]) -> None:
    for path, body in found.items():
        assert KEY.encode() not in body, path
        assert SECRET.encode() not in body, path


def test_a_dry_run_says_that_the_free_space_is_unknown_and_writes_nothing(bucket, words, capsys):
    assert extract.main(words(bucket.url("features"), "--dry-run")) == 0
    out = capsys.readouterr().out
    assert f"GB to {bucket.url('features')}, whose free space is unknown" in out
    assert "rows/s a worker, ETA" in out
    assert bucket.all() == {}


def test_extraction_stopped_and_run_again_gives_the_bytes_of_a_local_one(bucket, words, make_store, capsys, request):
    url = bucket.url("features")
    arguments = words(url, "--shard-rows", 4, "--workers", 1, "--dtype", "int8", teachers=("depth", "gen"))

    def stop_after_the_first_shard() -> None:
        """Its commit is made by an actor and said by nobody: the store is asked, until the extraction has ended."""
        while not ended.wait(0.02):
            if bucket.has("features/depth/commits/"):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    ended, before = threading.Event(), signal.signal(signal.SIGTERM, lambda *_: None)  # for one that comes too late
    watch = threading.Thread(target=stop_after_the_first_shard)
    watch.start()
    try:
        assert extract.main(arguments) == 1
    finally:
        ended.set()
        watch.join()
        signal.signal(signal.SIGTERM, before)
    said = "".join(capsys.readouterr())
    assert "stopped by SIGTERM" in said
    assert not [path for path in bucket.all("features") if "/leases/" in path]
    part = FeatureStore(url)["depth"].coverage().valid
    assert part > 0, "the control: something was done"

    request.getfixturevalue("without_ray")
    assert extract.main(arguments) == 0
    said += "".join(capsys.readouterr())
    local = make_store("int8", teachers=("depth", "gen"))
    expected = {str(f.relative_to(local)): f.read_bytes() for f in local.rglob("*") if f.is_file()}
    found = bucket.all("features")
    assert contents(found) == contents(expected)
    for name in ("depth", "gen"):
        here, there = FeatureStore(url)[name], FeatureStore(local)[name]
        assert records(here) == records(there)
        np.testing.assert_array_equal(here.read(range(ROWS))[0], there.read(range(ROWS))[0])
        assert f"{name}/index" in found
    runs = [json.loads(body) for path, body in found.items() if path.startswith("runs/")]
    assert [run["arguments"]["store"] for run in runs] == [url, url]

    assert extract.main(arguments) == 0
    assert "all committed, nothing to do" in capsys.readouterr().out
    assert bucket.all("features") == found

    for command in ("status", "info", "verify"):
        assert store.main([command, url]) == 0
        said += (out := capsys.readouterr().out)
        assert url in out or "sound" in out
    assert store.main(["status", url, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)["teachers"]
    assert [status[name]["valid"] for name in ("depth", "gen")] == [ROWS, ROWS]
    assert store.main(["drop", url, "gen"]) == 0
    assert FeatureStore(url).teachers == ["depth"]
    assert_no_credentials(found | {"what was printed": said.encode()})


def test_training_from_s3_is_training_from_the_disk(bucket, recipe, small_targets, tmp_path):
    bucket.upload(small_targets, "features")
    losses = {}
    for where, location in {"disk": small_targets, "s3": bucket.url("features")}.items():
        folder = run_training(
            recipe(
                **{
                    "targets.store": location,
                    "data.workers": 1,
                    "train.max_steps": 2,
                    "train.output_dir": tmp_path / where,
                }
            ),
            "pt",
            {"test": "1"},
        )
        metrics = read_metrics(folder / "metrics.jsonl")
        losses[where] = [{k: v for k, v in line.items() if k.startswith("loss/")} for line in metrics]
    assert losses["s3"] == losses["disk"]
    assert len(losses["s3"]) == 2
    assert sum(value > 0 for value in losses["s3"][0].values()) == 14
    assert_no_credentials({f.name: f.read_bytes() for f in (tmp_path / "s3").rglob("*") if f.is_file()})


def test_with_a_local_cache_a_second_run_asks_for_no_row(bucket, recipe, small_targets, tmp_path):
    bucket.upload(small_targets, "features")
    losses = []
    for name in ("first", "second"):
        made = recipe(**{
            "targets.store": bucket.url("features"), "targets.local_cache": tmp_path / "kept", "data.workers": 2,
            "targets.local_cache_gb": 0.01, "train.max_steps": 2, "train.output_dir": tmp_path / name,
            "tasks.seg": "null", "tasks.gen": "null",
        })  # fmt: skip
        metrics = read_metrics(run_training(made, "pt", {"test": "1"}) / "metrics.jsonl")
        losses.append([{k: v for k, v in line.items() if k.startswith("loss/")} for line in metrics])
        bucket.blank("features/", "/c/")  # every shard file, of which nothing is asked again but whether it is there
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    with pytest.raises(CorruptFeatures):  # the control
        FeatureStore(bucket.url("features"))["depth"][0]


class TestErrors:
    def test_a_bucket_that_is_not_there(self, s3_server, words, capsys):
        url = "s3://no-such-bucket/features"
        for command, arguments in ((extract.main, words(url)), (store.main, ["status", url])):
            assert command(arguments) == 1
            errors = capsys.readouterr().err
            assert url in errors
            assert len(errors.strip().splitlines()) == 1

    def test_a_server_that_is_not_there(self, monkeypatch, words, capsys):
        import fsspec

        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setitem(
            fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9", "key": KEY, "secret": SECRET}
        )
        for command, arguments in ((extract.main, words("s3://a/b")), (store.main, ["status", "s3://a/b"])):
            assert command(arguments) == 1
            (error,) = capsys.readouterr().err.strip().splitlines()
            assert "EndpointConnectionError" in error
            assert SECRET not in error

    def test_without_s3fs_the_remedy_is_one_line(self, monkeypatch, words, recipe, tmp_path, capsys):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        url = "s3://bucket/features"
        config = tmp_path / "pt.yaml"
        config.write_text(json.dumps(recipe(**{"targets.store": url}).to_dict()))
        for command, arguments in (
            (extract.main, words(url)),
            (store.main, ["status", url]),
            (store.main, ["plan", url, "--data", *words(url)[3:4]]),
            (train.main, ["pt", "--config", str(config)]),
        ):
            assert command(arguments) == 1
            (error,) = capsys.readouterr().err.strip().splitlines()
            assert "pip install 'olavlm[s3]'" in error
