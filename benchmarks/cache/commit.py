"""Committing shards of features that are in memory, over writing and fsyncing the same bytes as plain files.

It is the store's own share of an extraction whose teacher costs nothing: begin, append every row, commit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from ..figures import Comparison
from ..rounds import Arm, alternate
from .olavlm_store import OlavlmStore
from .payload import Payload
from .plain_files import ByHand, PlainFiles
from .sizes import Size, Work

MUST = 0.6


def measure(size: Size, folder: Path) -> list[Comparison]:
    return [_compare(work, size, folder / work.shape.key) for work in size.works]


def _compare(work: Work, size: Size, folder: Path) -> Comparison:
    payload, store = Payload(work.shape, work.committed), OlavlmStore()
    folder.mkdir()
    complete = folder / "complete"
    store.write(complete, payload)
    plain = PlainFiles(complete)
    reader = store.open(complete)
    for start in range(0, payload.rows, size.batch):
        rows = list(range(start, min(start + size.batch, payload.rows)))
        values, valid = reader.group.read(rows)
        assert valid.all()
        payload.check(rows, values, "the committed store")
    plain.write(folder / "plain")
    plain.check(folder / "plain")
    ByHand().write(folder / "hand", payload)
    plain.check(folder / "hand", without=ByHand.omits(work.shape))
    for written in (complete, folder / "plain", folder / "hand"):
        shutil.rmtree(written)

    arms = {
        plain.name: write_arm(folder / "plain", lambda path: lambda: plain.write(path)),
        ByHand.name: write_arm(folder / "hand", lambda path: lambda: ByHand().write(path, payload)),
        store.name: write_arm(folder / "store", lambda path: store.prepare(path, payload)),
    }
    return Comparison(
        title=f"commit, {work.shape}",
        rows=payload.rows,
        bytes=payload.bytes,
        floor=plain.name,
        seconds=alternate(arms, size.rounds),
        must={store.name: MUST},
    )


def write_arm(path: Path, prepare: Callable[[Path], Callable[[], None]]) -> Arm:
    """Times the function that `prepare(path)` returns; what it has written at `path` is removed."""

    def arm(_: int) -> float:
        work = prepare(path)
        os.sync()  # what earlier arms left to write or to free is not charged to this one
        began = perf_counter()
        work()
        taken = perf_counter() - began
        shutil.rmtree(path)
        return taken

    return arm
