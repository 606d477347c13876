"""What was written is what is read, for any shape, storage, shard size, failures, order of rows and growth."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, note, settings
from hypothesis import strategies as st

from olavlm.cache import BadImage, FeatureStore, MissingFeatures, pending
from olavlm.cache.codec import CODECS
from olavlm.cache.shard import COMPRESSIONS

EXAMPLES = int(os.environ.get("OLAVLM_TEST_EXAMPLES", 50))  # of each property; more of them in a long run
ANY = settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
KINDS = (
    "normal",
    "normal",
    "normal",
    "zeros",
    "some zeros",
    "tiny",
    "subnormal",
    "large",
    "huge",
    "nan",
    "inf",
    "missing",
)


@pytest.fixture(scope="module", autouse=True)
def without_fsync():
    """What it is good for takes a power cut to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@st.composite
def stores(draw) -> dict:
    """How a store is made, and what its rows are."""
    dtype = draw(st.sampled_from(sorted(CODECS)))
    dim = draw(st.integers(1, 6)) * 2 - (dtype != "int4" and draw(st.booleans()))
    return {
        "shape": (draw(st.integers(1, 5)), dim),
        "dtype": dtype,
        "compress": draw(st.sampled_from(COMPRESSIONS)),
        "shard_rows": draw(st.integers(1, 9)),
        "kinds": draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def row_of(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray | None:
    row = rng.standard_normal(shape).astype(np.float32)
    if kind == "missing":
        return None
    if kind in ("nan", "inf"):
        row.flat[rng.integers(row.size)] = {"nan": np.nan, "inf": -np.inf}[kind]
    elif kind == "zeros":
        row[:] = 0
    elif kind == "some zeros":
        row[rng.random(row.shape) < 0.5] = 0
        row[rng.integers(len(row))] = 0
    return row * np.float32({"tiny": 1e-20, "subnormal": 1e-42, "large": 3e4, "huge": 5e37}.get(kind, 1))


class Written:
    """A store made as `stores` says, and what a reader must get of it: `parts[row]` as stored, None if quarantined."""

    def __init__(self, make, folder: Path, options: dict) -> None:
        storage = {name: options[name] for name in ("shape", "dtype", "compress", "shard_rows")}
        self.store = make(folder, rows=len(options["kinds"]), **storage)
        self.rng, self.codec = np.random.default_rng(options["seed"]), self.store.codec
        self.store.features, self.parts, self.bad = {}, {}, {}
        self.add(options["kinds"], 0)

    def add(self, kinds: list[str], first: int) -> None:
        for row, kind in enumerate(kinds, first):
            features = row_of(kind, self.store.card_shape, self.rng)
            if features is None:
                self.bad[row] = "missing"
            self.store.features[row] = features
            self.parts[row] = None if features is None else self.codec.encode(features)[0]

    def grow(self, kinds: list[str]) -> None:
        """As many images more, in a plan segment of their own."""
        images = [f"photos/{i:05d}.jpg" for i in range(self.store.builder.plan().num_images + len(kinds))]
        plan, added = self.store.builder.extend_plan(pa.array(images, pa.large_string()))
        assert added == len(kinds)
        self.add(kinds, plan.segments[-1].start)

    def expected(self, row: int) -> np.ndarray:
        parts = self.parts[row]
        return np.full(self.store.card_shape, np.nan, np.float32) if parts is None else self.codec.decode(parts)


@contextmanager
def written(make, options: dict, names: str = "a"):
    note(f"{options}")
    with tempfile.TemporaryDirectory() as folder:
        yield [Written(make, Path(folder) / name, options) for name in names]


@pytest.fixture(scope="session")
def make(small_store):
    class Made(small_store):
        @property
        def card_shape(self) -> tuple[int, int]:
            return self.card["tokens"], self.card["dim"]

    return Made


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    nan = np.isnan(a)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and (nan == np.isnan(b)).all() and bits(a[~nan]) == bits(b[~nan])


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


@given(options=stores(), more=st.lists(st.sampled_from(KINDS), max_size=8), data=st.data())
@ANY
def test_what_was_written_is_what_is_read(make, options, more, data):
    with written(make, options) as (this,):
        store, codec = this.store, this.codec
        if more:
            this.grow(more)
        limit = data.draw(st.integers(0, len(this.parts)), label="limit")
        for task in pending(store.group, limit):
            store.commit(task, this.bad)
        depth, rows = store.group, list(this.parts)
        committed = rows[:limit]
        wanted = data.draw(st.lists(st.sampled_from(committed or [0]), max_size=40), label="rows") if committed else []

        values, valid = depth.read(wanted)
        stored, _ = depth.read_stored(wanted)
        decoded = codec.decode(stored)
        assert values.shape == (len(wanted), *options["shape"])
        assert same(values, decoded)
        plain = {name: zarr.open_array(store.path / "depth" / name, mode="r") for name in store.arrays}
        for i, row in enumerate(wanted):
            parts, expected = this.parts[row], this.expected(row)
            assert valid[i] == (parts is not None)
            assert same(values[i], expected)
            by_zarr = {name: array[row] for name, array in plain.items()}
            assert same(codec.decode(by_zarr), expected)
            if parts is None:
                reason = this.bad.get(row, depth.failure(row).reason)
                assert reason in ("missing", "non-finite", "overflow")
                with pytest.raises(BadImage, match=reason):
                    depth[row]
            else:
                assert depth.failure(row) is None
                assert same(depth[row], expected)
                assert same(depth[depth.plan.image_of(row)], expected)
                for name in parts:
                    assert parts[name].tobytes() == stored[name][i].tobytes() == by_zarr[name].tobytes()

        assert depth.missing_rows().tolist() == rows[limit:]
        for row in rows[limit:]:
            for look in (depth.__getitem__, depth.failure):
                with pytest.raises(MissingFeatures):
                    look(row)
            with pytest.raises(MissingFeatures):
                depth.read([*wanted, row])
            assert np.isnan(plain[store.arrays[-1]][row]).all()
        coverage = depth.coverage(np.array(committed, np.int64))
        assert coverage.complete
        assert coverage.quarantined == sum(this.parts[row] is None for row in committed)


@given(options=stores(), data=st.data())
@ANY
def test_the_order_of_commits_does_not_matter(make, options, data):
    with written(make, options, "ab") as (one, other):
        tasks = pending(one.store.group)
        for task in tasks:
            one.store.commit(task, one.bad)
        for task in data.draw(st.permutations(tasks), label="order"):
            other.store.commit(task, other.bad)
        assert one.store.shards() == other.store.shards()
        assert one.store.records() == other.store.records()


@given(options=stores(), data=st.data())
@ANY
def test_a_store_that_is_filled_little_by_little_has_the_same_bytes(make, options, data):
    """With any limits on the way, and with rows that failed and were tried again."""
    with written(make, options, "ab") as (one, other):
        one.store.fill(one.bad)
        count = len(options["kinds"])
        for limit in data.draw(st.lists(st.integers(1, count), max_size=4), label="limits"):
            failing = data.draw(st.dictionaries(st.integers(0, count - 1), st.just("unreadable"), max_size=5))
            other.store.fill({**failing, **other.bad}, limit=limit)
        other.store.fill(other.bad, retry_failed=True)
        other.store.fill(other.bad)
        assert one.store.shards() == other.store.shards()
        ours, others = one.store.records(), other.store.records()
        assert {s: {**r, "revision": 0} for s, r in ours.items()} == {
            s: {**r, "revision": 0} for s, r in others.items()
        }
        assert repr(one.store.group.failures()) == repr(other.store.group.failures())


@given(options=stores(), data=st.data())
@ANY
def test_readers_in_any_order_get_the_same(make, options, data):
    """What one batch left behind in a reader (open files, checked indexes) changes no other batch."""
    with written(make, options) as (this,):
        this.store.fill(this.bad)
        depth = this.store.group
        rows = st.lists(st.integers(0, len(options["kinds"]) - 1), max_size=10)
        for batch in data.draw(st.lists(rows, max_size=6), label="batches"):
            if data.draw(st.booleans()):
                depth.reload()
            values, valid = depth.read(batch)
            for i, row in enumerate(batch):
                assert same(values[i], this.expected(row))
                assert valid[i] == (this.parts[row] is not None)
        everything = np.arange(len(options["kinds"]))
        assert (
            FeatureStore(this.store.path)["depth"].read(everything)[0].tobytes() == depth.read(everything)[0].tobytes()
        )
