"""The same payload through other formats: written, read at random, read in order; what it takes on the disk.

zarr-python and tensorstore read the very files of our store. Every arm of writing starts from float32 rows in memory
and ends with float16 rows that are durable; the floor alone has its bytes ready.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from ..figures import Comparison
from ..rounds import Arm, alternate
from .commit import write_arm
from .formats import ZARR, Format, Reader, bytes_on_disk, installed
from .olavlm_store import KEY, OlavlmStore
from .payload import Payload
from .plain_files import PlainFiles, PlainReader
from .sizes import Size, Work


def measure(size: Size, folder: Path) -> list[Comparison]:
    return [figures for work in size.works for figures in _compare(work, size, folder / work.shape.key)]


def _compare(work: Work, size: Size, folder: Path) -> list[Comparison]:
    folder.mkdir()
    payload, store = Payload(work.shape, work.formats), folder / OlavlmStore.name
    formats, absent = installed()
    for f in formats:
        f.write(folder / f.name, payload)
        _check(f.name, f.open(folder / f.name), payload, size.batch)
    figures = [_written(work, size, folder, payload, formats)]
    with PlainReader(store, work.shape) as plain:
        readers: dict[str, Reader] = {PlainFiles.name: plain}
        for f in formats:
            readers[f.name] = f.open(store / KEY / "features" if f.name in ZARR else folder / f.name)
            _check(f.name, readers[f.name], payload, size.batch)
        checksums = {f.name: f.checksums for f in (PlainFiles, *formats)}
        for how, way in (("random rows", _random), ("rows in order", _in_order)):
            arms = {name: _read_arm(reader, way, work, payload, size.batch) for name, reader in readers.items()}
            figures.append(
                Comparison(
                    title=f"{how}, {work.shape}, batches of {size.batch}",
                    rows=work.formats_read,
                    bytes=work.formats_read * work.shape.row_bytes,
                    floor=PlainFiles.name,
                    seconds=alternate(arms, size.rounds),
                    checksums=checksums,
                )
            )
    for comparison in figures:
        comparison.notes += absent
    return figures


def _written(work: Work, size: Size, folder: Path, payload: Payload, formats: list[Format]) -> Comparison:
    plain = PlainFiles(folder / OlavlmStore.name)
    return Comparison(
        title=f"write, {work.shape}",
        rows=payload.rows,
        bytes=payload.bytes,
        floor=plain.name,
        seconds=alternate({f.name: _write_arm(f, folder / "again", payload) for f in (plain, *formats)}, size.rounds),
        bytes_on_disk={f.name: bytes_on_disk(folder / f.name) / payload.bytes for f in formats},
    )


def _write_arm(f: Format | PlainFiles, place: Path, payload: Payload) -> Arm:
    return write_arm(place, lambda path: lambda: f.write(path, payload))


def _check(name: str, reader: Reader, payload: Payload, batch: int) -> None:
    """Every row in order, and some at random."""
    shape, order = payload.shape, np.random.default_rng(2).permutation(payload.rows).tolist()
    out = np.zeros((batch, shape.tokens, shape.dim), np.float16)
    for start in range(0, payload.rows, batch):
        stop = min(start + batch, payload.rows)
        reader.read_slice(start, stop, out[: stop - start])
        payload.check(range(start, stop), out[: stop - start], name)
    for start in range(0, min(payload.rows, 10 * batch), batch):
        rows = order[start : start + batch]
        reader.read(rows, out[: len(rows)])
        payload.check(rows, out[: len(rows)], name)


Way = Callable[[Reader, list[int], np.ndarray], None]


def _random(reader: Reader, order: list[int], out: np.ndarray) -> None:
    for start in range(0, len(order), len(out)):
        rows = order[start : start + len(out)]
        reader.read(rows, out[: len(rows)])


def _in_order(reader: Reader, order: list[int], out: np.ndarray) -> None:
    """As many rows as `order` has, from the first."""
    for start in range(0, len(order), len(out)):
        stop = min(start + len(out), len(order))
        reader.read_slice(start, stop, out[: stop - start])


def _read_arm(reader: Reader, way: Way, work: Work, payload: Payload, batch: int) -> Arm:
    out = np.zeros((batch, work.shape.tokens, work.shape.dim), np.float16)

    def arm(k: int) -> float:
        order = np.random.default_rng(k).permutation(payload.rows)[: work.formats_read].tolist()
        began = perf_counter()
        way(reader, order, out)
        return perf_counter() - began

    return arm
