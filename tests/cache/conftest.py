"""Small stores of random features, and child processes that can be killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import (
    FeatureStore,
    MissingFeatures,
    ShardTask,
    ShardWriter,
    StoreBuilder,
    TeacherFeatures,
    files,
    pending,
)
from olavlm.cache.codec import CODECS
from olavlm.cache.records import latest_records

NOBODY = 65534


def image_paths(count: int, first: int = 0) -> pa.LargeStringArray:
    return pa.array([f"photos/{i:05d}.jpg" for i in range(first, first + count)], pa.large_string())


def make_card(tokens: int, dim: int, **fields: object) -> dict:
    """A card as a teacher makes it, with a fingerprint over its fields."""
    card = {"name": "depth", "tokens": tokens, "dim": dim, "size": [8, 8], "versions": {"numpy": np.__version__}}
    card.update(fields)
    card["fingerprint"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    return card


class SmallStore:
    """A store with one teacher, `depth`, whose features are known: row r is appended as `features[r]`.

    With a plain dtype they are exact in it; what int8 and int4 make of them is `expected[r]`. Shards are committed by
    `fill` (all that is pending) or `commit` (one); `bad` names quarantined rows and why.
    """

    def __init__(
        self, path: Path, rows: int = 10, shape=(3, 4), dtype: str = "float32", shard_rows: int = 4, compress="none",
        seed=0,
    ):  # fmt: skip
        self.path, self.codec = path, CODECS[dtype]
        self.features = np.random.default_rng(seed).standard_normal((rows, *shape)).astype(np.float32)
        if not self.codec.has_scales:
            self.features = self.features.astype(dtype).astype(np.float32)
        self.builder = StoreBuilder(path)
        if rows:
            self.builder.extend_plan(image_paths(rows))
        self.card = make_card(*shape)
        self.builder.ensure_teacher("depth", self.card, dtype=dtype, shard_rows=shard_rows, compress=compress)

    @property
    def expected(self) -> np.ndarray:
        """What a reader must get, (rows, tokens, dim) float32."""
        return np.stack([self.codec.decode(self.codec.encode(row)[0]) for row in self.features])

    @property
    def group(self) -> TeacherFeatures:
        """Opened anew, as another process would."""
        return FeatureStore(self.path)["depth"]

    def writer(self, on_step: Callable[[str], None] | None = None) -> ShardWriter:
        return self.builder.writer(self.group, on_step)

    def task(self, shard: int, **options) -> ShardTask:
        (task,) = (t for t in pending(self.group, **options) if t.shard == shard)
        return task

    def commit(self, task: ShardTask, bad: dict[int, str] | None = None, on_step=None, features=None):
        with self.writer(on_step).begin(task.shard, (task.start, task.stop), task.segment) as shard:
            self.append(shard, task, bad, features)
            return shard.commit()

    def append(self, shard, task: ShardTask, bad: dict[int, str] | None = None, features=None) -> None:
        features = self.features if features is None else features
        for row in range(task.start, task.stop):
            sha256 = hashlib.sha256(b"image %d" % row).hexdigest()
            if reason := (bad or {}).get(row):
                shard.append(None, image_sha256=None, reason=reason, detail=f"detail of {row}")
            else:
                shard.append(features[row], image_sha256=sha256)

    def fill(self, bad: dict[int, str] | None = None, limit: int | None = None, **options) -> SmallStore:
        for task in pending(self.group, limit, **options):
            self.commit(task, bad)
        return self

    def shard_file(self, shard: int, array: str = "features") -> Path:
        return self.path / "depth" / array / "c" / str(shard) / ("0/0" if array == "features" else "0")

    @property
    def arrays(self) -> list[str]:
        return ["features", "scales"] if self.codec.has_scales else ["features"]

    def record_file(self, shard: int, revision: int = 0) -> Path:
        return self.path / "depth" / "commits" / f"{shard:06d}.{revision}.json"

    def lease_file(self, shard: int, generation: int = 0) -> Path:
        return self.path / "depth" / "leases" / f"{shard:06d}.{generation}"

    def leases(self) -> list[str]:
        """The names of the lease files, of any shard, without private ones that a killed writer left."""
        return [name for name in files.names(self.path / "depth" / "leases") if name[0] != "."]

    def staged(self) -> list[str]:
        return files.names(self.path / "depth" / "staging")

    def contents(self) -> dict[str, bytes]:
        """What two stores of the same features must agree on, by path: all but the records, whose run differs."""
        found = files.sizes_below(self.path)
        return {
            path: files.read(self.path / path) for path in found if "/commits/" not in path and path != "depth/index"
        }

    def assert_reads(self, row: int, committed: bool = True) -> None:
        """To who opens it now; a row that is not committed is missing."""
        if committed:
            np.testing.assert_array_equal(self.group[row], self.features[row])
        else:
            with pytest.raises(MissingFeatures):
                self.group[row]

    def shards(self) -> dict[str, bytes]:
        """Every shard file's bytes, of all arrays, by its path in the teacher's folder."""
        root = self.path / "depth"
        return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.glob("*/c/**/*")) if f.is_file()}

    def records(self) -> dict[int, dict]:
        """What counts, without host and timings."""
        group = self.group
        shards = sorted(latest_records(files.names(group.folder / "commits")))
        return {shard: group.record(shard).comparable() for shard in shards}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """small(name="store", **options) -> SmallStore in a folder of this test.

    The disk is not waited for: what fsync is good for takes a power cut to test.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return lambda name="store", **options: SmallStore(tmp_path / name, **options)


@pytest.fixture(scope="session")
def small_store() -> type[SmallStore]:
    return SmallStore


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("OLAVLM_TEST_SEED", secrets.randbits(32)))
    print(f"seed {seed}: run again with OLAVLM_TEST_SEED={seed}")  # shown by pytest when the test fails
    return np.random.default_rng(seed)


class Child:
    """A forked process that runs `work(child)`; `tell` and `hear` exchange words with it. Exits 0, or 1 if it raised.

    `work` may end the process early with `os._exit`, as a kill would.
    """

    def __init__(self, work: Callable[[Child], object]) -> None:
        (down_read, down_write), (up_read, up_write) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(down_write), os.close(up_read)
            self._read, self._write = os.fdopen(down_read), os.fdopen(up_write, "w")
            try:
                work(self)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(down_read), os.close(up_write)
        self._read, self._write = os.fdopen(up_read), os.fdopen(down_write, "w")

    def tell(self, word: str) -> None:
        self._write.write(word + "\n")
        self._write.flush()

    def hear(self) -> str:
        """The next word of the other side; empty when it is gone."""
        return self._read.readline().strip()

    def wait(self) -> int:
        """Reap it; its exit status. A child that hears gets the word "end"."""
        with contextlib.suppress(BrokenPipeError):
            self.tell("end")
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._read.close()
        with contextlib.suppress(BrokenPipeError):
            self._write.close()
        return status


@pytest.fixture
def start():
    """start(work) -> Child, killed and reaped at the end of the test if it still runs."""
    children: list[Child] = []

    def begin(work: Callable[[Child], object]) -> Child:
        children.append(Child(work))
        return children[-1]

    yield begin
    for child in children:
        try:
            if os.waitpid(child.pid, os.WNOHANG) == (0, 0):
                os.kill(child.pid, 9)
                os.waitpid(child.pid, 0)
        except ChildProcessError:
            pass  # reaped by the test


@pytest.fixture
def killed(start):
    """killed(work, n): run `work()` in a child that dies before its nth change of a name in the file system.

    False if it made fewer; an error of `work` fails the test.
    """

    def run(work: Callable[[], object], number: int) -> bool:
        def until(child: Child) -> None:
            made = 0

            def dying(real: Callable) -> Callable:
                def change(*args, **kwargs):
                    nonlocal made
                    made += 1
                    if made - 1 == number:
                        os._exit(9)
                    return real(*args, **kwargs)

                return change

            for name in ("link", "unlink", "rename", "replace", "mkdir", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            work()

        status = start(until).wait()
        assert status in (0, 9)
        return status == 9

    return run


@pytest.fixture
def unprivileged(start):
    """unprivileged(work): run `work()` in a child that file permissions bind; fails if it raises."""

    def run(work: Callable[[], object]) -> None:
        def without_rights(child: Child) -> None:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            work()

        assert start(without_rights).wait() == 0

    return run


@pytest.fixture
def public_path():
    """A folder whose parents everyone may enter, unlike `tmp_path`'s."""
    folder = Path(tempfile.mkdtemp(prefix="olavlm-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
