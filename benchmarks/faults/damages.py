"""Random damages to finished stores: each must be found by reading and by `verify`, and none read as a wrong value.

The control is plain zarr-python on the same files: it knows each row's own checksum and nothing of the records.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zarr

from olavlm.cache import BadImage, CorruptFeatures, MissingFeatures, StoreBuilder
from olavlm.cache.codec import CODECS
from olavlm.cache.verify import verify

from .disks import flip
from .scene import KEY, KINDS, Request, Scene, open_group, record_file

SHAPE, SHARD_ROWS, SHARDS = (8, 64), 8, 5
BAD = {3: "missing", 19: "truncated", 35: "empty"}  # shards 0, 2 and 4 have one size, 1 and 3 another
BLOCK = 4096


class Victim:
    """A finished store, and another of the same card and plan with other features."""

    def __init__(self, folder: Path, kind: tuple[str, str], seed: int) -> None:
        self.scene, self.other = (self._scene(folder / str(i), kind, seed + i) for i in range(2))
        self.path = self.scene.final
        StoreBuilder(self.path).index()
        self.arrays = list(open_group(self.path).layout.arrays)
        self._before: dict[Path, bytes] = {}

    @staticmethod
    def _scene(folder: Path, kind: tuple[str, str], seed: int) -> Scene:
        features = np.random.default_rng(seed).standard_normal((SHARDS * SHARD_ROWS, *SHAPE)).astype(np.float32)
        return Scene(folder.name, *kind, SHAPE, SHARD_ROWS, features, [], Request(len(features), BAD), folder)

    def shards(self, rng: np.random.Generator, count: int = 1) -> list[int]:
        return rng.permutation(SHARDS)[:count].tolist()

    def file(self, array: str, shard: int, store: Path | None = None) -> Path:
        return open_group(self.path).layout.arrays[array].file((store or self.path) / KEY, shard)

    def touch(self, file: Path) -> Path:
        """Remember it, to be put back."""
        self._before.setdefault(file, file.read_bytes())
        return file

    def heal(self) -> bool:
        """Put everything back; whether anything was another."""
        was = self._before
        changed = any(not f.exists() or f.read_bytes() != content for f, content in was.items())
        for file, content in was.items():
            file.write_bytes(content)
        self._before = {}
        return changed


Damage = Callable[[Victim, np.random.Generator], None]
Target = Callable[[Victim, np.random.Generator], Path]


def _of_array(array: str) -> Target:
    return lambda victim, rng: victim.file(array, *victim.shards(rng))


def _record(victim: Victim, rng: np.random.Generator) -> Path:
    return record_file(victim.path, *victim.shards(rng))


def _on(target: Target, act: Callable[[Path, np.random.Generator], object]) -> Damage:
    return lambda victim, rng: act(victim.touch(target(victim, rng)), rng)


def _cut(file: Path, rng: np.random.Generator) -> None:
    os.truncate(file, int(rng.integers(file.stat().st_size)))


def _extend(file: Path, rng: np.random.Generator) -> None:
    with file.open("ab") as f:
        f.write(rng.bytes(int(rng.integers(1, 200))))


def _remove(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


def _zero(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    start = BLOCK * int(rng.integers(-(-len(data) // BLOCK)))
    data[start : start + BLOCK] = bytes(len(data[start : start + BLOCK]))
    file.write_bytes(data)


def _swap(*arrays: str) -> Damage:
    def damage(victim: Victim, rng: np.random.Generator) -> None:
        pair = victim.shards(rng, 2)
        for array in arrays or victim.arrays:
            _exchange(*(victim.touch(victim.file(array, shard)) for shard in pair))

    return damage


def _swap_records(victim: Victim, rng: np.random.Generator) -> None:
    _exchange(*(victim.touch(record_file(victim.path, shard)) for shard in victim.shards(rng, 2)))


def _exchange(one: Path, two: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def _foreign_files(victim: Victim, rng: np.random.Generator) -> None:
    (shard,) = victim.shards(rng)
    for array in victim.arrays:
        foreign = victim.file(array, shard, victim.other.final)
        victim.touch(victim.file(array, shard)).write_bytes(foreign.read_bytes())


def _foreign_record(victim: Victim, rng: np.random.Generator) -> None:
    (shard,) = victim.shards(rng)
    victim.touch(record_file(victim.path, shard)).write_bytes(record_file(victim.other.final, shard).read_bytes())


DAMAGES: dict[str, Damage] = {
    how.format(what): _on(target, act)
    for how, act in {
        "a bit of a {} file flipped": flip,
        "a {} file cut short": _cut,
        "bytes appended to a {} file": _extend,
        "a {} file removed": _remove,
    }.items()
    for what, target in {"features": _of_array("features"), "scales": _of_array("scales"), "record": _record}.items()
} | {
    "4 KB of a features file zeroed": _on(_of_array("features"), _zero),
    "4 KB of a record file zeroed": _on(_record, _zero),
    "features files of two shards swapped": _swap("features"),
    "scales files of two shards swapped": _swap("scales"),
    "all files of two shards swapped": _swap(),
    "record files of two shards swapped": _swap_records,
    "all files of a shard those of another store": _foreign_files,
    "a record file that of another store": _foreign_record,
}


@dataclass
class Count:
    """How many damages of a kind were made, found by reading and by `verify`, and what was read wrongly."""

    tried: int = 0
    found_by_reading: int = 0
    found_by_verify: int = 0
    wrong_values: int = 0
    wrong_by_zarr: int = 0
    """Damages of which plain zarr-python read a wrong value without an error."""


def run_damages(folder: Path, seed: int, number: int, progress: Callable[[str], None]) -> dict[str, dict]:
    """Make `number` damages, one after the other, each kind as often; each is undone before the next."""
    victims = [Victim(folder / "damages" / "-".join(kind), kind, seed + 10 * i) for i, kind in enumerate(KINDS)]
    counts = {name: Count() for name in DAMAGES}
    for i in range(number):
        rng = np.random.default_rng([seed, 2, i])
        name = list(DAMAGES)[i % len(DAMAGES)]
        usable = [v for v in victims if "scales" in v.arrays or "scales" not in name]
        victim = usable[rng.integers(len(usable))]
        while not _strike(victim, DAMAGES[name], rng, counts[name]):
            pass
        if i % 100 == 99:
            progress(f"{i + 1} of {number} damages")
    for victim in victims:
        assert _read(victim) == (0, 0), "a damage was not undone"
        assert not list(verify(open_group(victim.path))), "a damage was not undone"
    return {name: asdict(count) for name, count in counts.items()}


def _strike(victim: Victim, damage: Damage, rng: np.random.Generator, count: Count) -> bool:
    damage(victim, rng)
    raised, wrong = _read(victim)
    found = any(True for _ in verify(open_group(victim.path)))
    by_zarr = _read_by_zarr(victim)
    if not victim.heal():
        return False  # nothing was changed, such as zeros by zeros
    count.tried += 1
    count.found_by_reading += raised > 0
    count.found_by_verify += found
    count.wrong_values += wrong
    count.wrong_by_zarr += by_zarr
    return True


def _read(victim: Victim) -> tuple[int, int]:
    """Rows that a fresh reader refuses, and rows that it reads as something else."""
    group, raised, wrong = open_group(victim.path), 0, 0
    for row, value in enumerate(victim.scene.values):
        try:
            wrong += not np.array_equal(group[row], value) or row in BAD
        except (MissingFeatures, CorruptFeatures):
            raised += 1
        except BadImage as e:
            wrong += e.reason != BAD.get(row)
    return raised, wrong


def _read_by_zarr(victim: Victim) -> bool:
    """Whether plain zarr-python reads a number that was not written, without an error."""
    arrays = {name: zarr.open_array(victim.path / KEY / name, mode="r") for name in victim.arrays}
    codec = CODECS[victim.scene.dtype]
    for shard in range(SHARDS):
        rows = slice(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        with contextlib.suppress(Exception):
            values = codec.decode({name: array[rows] for name, array in arrays.items()})
            if (np.isfinite(values) & (values != victim.scene.values[rows])).any():
                return True
    return False
