"""Random damage of every kind: a reader gets the right value or an error, never a wrong value, and `verify` finds it.

A long run: OLAVLM_TEST_DAMAGES=2000 python -m pytest tests/cache/test_damage.py -s
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from olavlm.cache import CorruptFeatures, FeatureStore, MissingFeatures, verify
from olavlm.cache.row_reader import RowReader

DAMAGES = int(os.environ.get("OLAVLM_TEST_DAMAGES", 104))  # of each store below
STORAGE = [("float16", "none"), ("int8", "none"), ("int4", "zstd")]
ROWS, SHARD_ROWS, SHAPE = 22, 4, (6, 16)
BAD = {5: "missing", 6: "truncated", **dict.fromkeys(range(12, 16), "empty")}  # one shard has no valid row


class Target:
    """One store to damage, and another of the same shape and card with other features."""

    def __init__(self, store, other, rng: np.random.Generator) -> None:
        self.store, self.other, self.rng = store, other, rng
        self.root = store.path / "depth"
        self.shards = [int(f.name) for f in sorted((self.root / "features" / "c").iterdir())]

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def shard_file(self, array: str | None = None) -> Path:
        return self.store.shard_file(self.pick(self.shards), array or self.pick(self.store.arrays))

    def record_file(self) -> Path:
        return self.pick(sorted((self.root / "commits").glob("*.json")))

    def flip(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        bit = int(self.rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)

    def two(self, files: list[Path]) -> tuple[Path, Path]:
        a, b = self.rng.choice(len(files), 2, replace=False)
        return files[a], files[b]


def flipped_features(t: Target) -> None:
    t.flip(t.shard_file("features"))


def flipped_scales(t: Target) -> None:
    t.flip(t.shard_file(t.store.arrays[-1]))


def flipped_record(t: Target) -> None:
    t.flip(t.record_file())


def truncated_file(t: Target) -> None:
    file = t.shard_file()
    os.truncate(file, int(t.rng.integers(file.stat().st_size)))


def truncated_record(t: Target) -> None:
    file = t.record_file()
    os.truncate(file, int(t.rng.integers(file.stat().st_size)))


def extended_file(t: Target) -> None:
    with t.pick([t.shard_file(), t.record_file()]).open("ab") as file:
        file.write(t.rng.bytes(int(t.rng.integers(1, 100))))


def exchanged(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)


def exchanged_files(t: Target) -> None:
    array = t.pick(t.store.arrays)
    exchanged(*t.two([t.store.shard_file(shard, array) for shard in t.shards]))


def exchanged_records(t: Target) -> None:
    exchanged(*t.two(sorted((t.root / "commits").glob("*.json"))))


def foreign_file(t: Target) -> None:
    """A shard file of another store, of the same layout, card and rows."""
    file = t.shard_file()
    file.write_bytes((t.other.path / file.relative_to(t.store.path)).read_bytes())


def foreign_record(t: Target) -> None:
    file = t.store.record_file(t.pick(t.shards))
    file.write_bytes((t.other.path / file.relative_to(t.store.path)).read_bytes())


def moved_row(t: Target) -> None:
    """One row in the place of another of the same length, with its own checksum: whole, but not where it was."""
    shard = t.pick(t.shards)
    for array in t.store.arrays:
        recorded = t.store.group.record(shard).files[array]
        size = t.store.group.layout.arrays[array].row_bytes
        lengths = [n + 4 for n in recorded.rows_bytes or [c and size for c in recorded.rows_crc32c] if n is not None]
        starts, file = np.cumsum([0, *lengths]), t.store.shard_file(shard, array)
        data = bytearray(file.read_bytes())
        pairs = [(i, j) for i in range(len(lengths)) for j in range(i) if lengths[i] == lengths[j]]
        if not pairs:
            continue  # compressed rows of which no two are as long
        i, j = t.pick(pairs)
        a, b = (slice(starts[k], starts[k] + lengths[k]) for k in (i, j))
        data[a], data[b] = data[b], data[a]
        file.write_bytes(data)
        return
    removed_file(t)


def removed_record(t: Target) -> None:
    t.record_file().unlink()


def removed_file(t: Target) -> None:
    t.shard_file().unlink()


def removed_array(t: Target) -> None:
    shutil.rmtree(t.root / t.pick(t.store.arrays) / "c")


def zeroed_block(t: Target) -> None:
    """As a file system leaves it whose journal knew the size and not the content."""
    file = t.pick([t.shard_file(), t.shard_file(), t.record_file()])
    data = bytearray(file.read_bytes())
    size = int(t.rng.integers(8, 200))
    start = int(t.rng.integers(max(1, len(data) - size)))
    data[start : start + size] = bytes(len(data[start : start + size]))
    file.write_bytes(data)


def overwritten_block(t: Target) -> None:
    file = t.shard_file()
    data = bytearray(file.read_bytes())
    start = int(t.rng.integers(len(data)))
    data[start : start + 50] = t.rng.bytes(len(data[start : start + 50]))
    file.write_bytes(data)


KINDS: list[Callable[[Target], None]] = [
    flipped_features, flipped_scales, flipped_record, truncated_file, truncated_record, extended_file, exchanged_files,
    exchanged_records, foreign_file, foreign_record, moved_row, removed_record, removed_file, removed_array,
    zeroed_block, overwritten_block,
]  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def read_every_row(path: Path, rng: np.random.Generator, expected: np.ndarray, reasons: dict[int, str]) -> set[int]:
    """The rows that raise, read in a random order by a reader that knows nothing yet. Fails if a value is wrong."""
    group, raised = FeatureStore(path)["depth"], set()
    for row in rng.permutation(len(expected)).tolist():
        try:
            (values,), (valid,) = group.read([row])
            reason = None if valid else group.failure(row).reason
        except (CorruptFeatures, MissingFeatures):
            raised.add(row)
            continue
        assert reason == reasons.get(row)
        if reason is None:
            assert values.tobytes() == expected[row].tobytes(), f"row {row} reads as another value"
        else:
            assert np.isnan(values).all()
    return raised


def run_damages(store, other, rng: np.random.Generator, count: int) -> Counter:
    """Damage `store` in `count` ways, one after the other, each undone; how many of each kind there were.

    After each: no row reads as a wrong value, at least one raises, a batch of all rows raises, coverage and failures
    are told without an error, and `verify` has findings, of the very shards that have such rows.
    """
    store.builder.index()  # of the sound store: it must hide nothing
    target, counts = Target(store, other, rng), Counter()
    sound, expected, reasons = contents(target.root), store.expected, BAD
    assert read_every_row(store.path, rng, expected, reasons) == set()
    while counts.total() < count:
        kind = KINDS[counts.total() % len(KINDS)]
        if kind is flipped_scales and len(store.arrays) == 1:
            kind = flipped_features
        kind(target)
        damaged = {name for name, content in sound.items() if contents(target.root).get(name) != content}
        if not damaged:  # a block of zeros in zeros
            continue
        counts[kind.__name__] += 1
        what = f"{kind.__name__} of {sorted(damaged)}, number {counts.total()}"
        raised = read_every_row(store.path, rng, expected, reasons)
        assert raised, f"no row raises after {what}"
        with pytest.raises((CorruptFeatures, MissingFeatures)):
            FeatureStore(store.path)["depth"].read(range(ROWS))
        group = FeatureStore(store.path)["depth"]
        coverage = group.coverage()
        assert coverage.covered + coverage.missing == ROWS
        assert set(group.missing_rows().tolist()) <= raised, what
        group.failures(), group.info()
        shards, findings = {row // SHARD_ROWS for row in raised}, list(verify(group))
        if kind is removed_record:  # where no file is left either there is nothing to find: the rows are missing
            shards &= set(target.shards)
        assert {finding.shard for finding in findings} == shards, what
        for name in damaged:
            (target.root / name).parent.mkdir(parents=True, exist_ok=True)
            (target.root / name).write_bytes(sound[name])
        assert contents(target.root) == sound
    assert read_every_row(store.path, rng, expected, reasons) == set()
    assert list(verify(store.group)) == []
    return counts


def two_stores(small, dtype: str, compress: str):
    options = {"rows": ROWS, "shard_rows": SHARD_ROWS, "shape": SHAPE, "dtype": dtype, "compress": compress}
    return (small(name, **options, seed=seed).fill(BAD) for seed, name in enumerate("ab"))


@pytest.mark.parametrize(("dtype", "compress"), STORAGE)
def test_damage_is_found_and_never_read_as_a_value(small, rng, dtype, compress):
    store, other = two_stores(small, dtype, compress)
    counts = run_damages(store, other, rng, DAMAGES)
    print(f"{dtype} {compress}: {counts.total()} damages: {dict(counts)}")
    assert counts.total() == DAMAGES
    assert len(counts) >= len(KINDS) - 1


def test_a_reader_that_does_not_compare_checksums_is_found_out(small, rng, monkeypatch):
    """The control: the damages are such that a reader which believes the bytes gets wrong values."""

    def believe(self, rows, shards, out):
        for i, (row, shard) in enumerate(zip(rows, shards, strict=True)):
            if shard.valid[row - shard.start]:
                place = shard.chunks["features"].range_of(row % SHARD_ROWS)
                data = self._read_range("features", row // SHARD_ROWS, *place)
                out["features"][i] = np.frombuffer(data[:-4], np.float16).reshape(SHAPE)
        return np.array([bool(shard.valid[row - shard.start]) for row, shard in zip(rows, shards, strict=True)])

    store, other = two_stores(small, "float16", "none")
    monkeypatch.setattr(RowReader, "_read_local", believe)
    with pytest.raises(AssertionError, match=r"reads as another value|no row raises"):
        run_damages(store, other, rng, 10)
