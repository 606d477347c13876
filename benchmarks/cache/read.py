"""Reading rows of a local store in random order into a batch, over `preadv` and crc32c of the same bytes.

Both read the same files, in the same order, into the same kind of buffer, and verify every row's checksum.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np

from ..figures import Comparison
from ..rounds import alternate
from .olavlm_store import OlavlmStore
from .payload import Payload
from .plain_files import PlainFiles, PlainReader, shard_files
from .sizes import Size, Work

MUST = 0.5
_PATIENCE = 60  # seconds for the members of a team to be ready
_FLOAT32 = "olavlm, float32 (a new array)"

Read = Callable[[list[int], np.ndarray], None]
Team = Callable[[Callable[[int], None], Callable[[int], None], int], float]
"""team(ready, work, members): every member calls `ready(member)`, then all call `work(member)` at once; the seconds
from the first start of work to the last end."""


def measure(size: Size, folder: Path) -> list[Comparison]:
    figures = []
    for work in size.works:
        payload, store = Payload(work.shape, work.stored), folder / work.shape.key
        OlavlmStore().write(store, payload)
        with PlainReader(store, work.shape) as plain:
            reader = OlavlmStore().open(store)
            reads = {PlainFiles.name: plain.read, OlavlmStore.name: reader.read}
            _check(reads, payload, size.batch)
            payload.check([5, 1], reader.group.read([5, 1])[0], _FLOAT32)
            case = _Case(work, size)
            with_float32 = {**reads, _FLOAT32: reader.read_float32}
            figures += [
                case.compare("one thread", with_float32, _alone, 1, work.read),
                case.compare("2 threads", reads, _threads, 2, work.read),
                case.compare("2 forked processes", reads, _forks, 2, work.read),
                _cold(case, reads, shard_files(store)),
            ]
    return figures


def _check(reads: dict[str, Read], payload: Payload, batch: int) -> None:
    shape = payload.shape
    rows = np.random.default_rng(1).permutation(payload.rows)[:batch].tolist()
    for arm, read in reads.items():
        out = np.zeros((len(rows), shape.tokens, shape.dim), np.float16)
        read(rows, out)
        payload.check(rows, out, arm)


class _Case:
    """One shape, read in batches of `size.batch`."""

    def __init__(self, work: Work, size: Size) -> None:
        self.work, self.size = work, size
        self.stored_rows = work.stored * work.shape.shard_rows

    def batches(self, count: int, round_: int) -> list[list[int]]:
        """`count` distinct rows in an order of the round's own, the same for every arm."""
        rows = np.random.default_rng(round_).permutation(self.stored_rows)[:count]
        return [rows[i : i + self.size.batch].tolist() for i in range(0, count, self.size.batch)]

    def compare(
        self,
        how: str,
        reads: dict[str, Read],
        team: Team,
        members: int,
        count: int,
        before: Callable[[], None] = lambda: None,
    ) -> Comparison:
        shape = self.work.shape
        buffers = [np.zeros((self.size.batch, shape.tokens, shape.dim), np.float16) for _ in range(members)]

        def arm(read: Read) -> Callable[[int], float]:
            def one_round(k: int) -> float:
                batches = self.batches(count, k)

                def work(member: int) -> None:
                    for batch in batches[member::members]:
                        read(batch, buffers[member][: len(batch)])

                before()
                return team(lambda member: buffers[member].fill(0), work, members)

            return one_round

        return Comparison(
            title=f"random rows, {shape}, batches of {self.size.batch}, {how}",
            rows=count,
            bytes=count * shape.row_bytes,
            floor=PlainFiles.name,
            seconds=alternate({name: arm(read) for name, read in reads.items()}, self.size.rounds),
            must={OlavlmStore.name: MUST},
        )


def _alone(ready: Callable[[int], None], work: Callable[[int], None], members: int) -> float:
    ready(0)
    began = perf_counter()
    work(0)
    return perf_counter() - began


def _threads(ready: Callable[[int], None], work: Callable[[int], None], members: int) -> float:
    barrier = threading.Barrier(members, timeout=_PATIENCE)

    def member(i: int) -> tuple[float, float]:
        ready(i)
        barrier.wait()
        began = perf_counter()
        work(i)
        return began, perf_counter()

    with ThreadPoolExecutor(members) as pool:
        return _span(list(pool.map(member, range(members))))


def _forks(ready: Callable[[int], None], work: Callable[[int], None], members: int) -> float:
    """Forked from this process with its store open, as a loader's processes are."""
    context = multiprocessing.get_context("fork")
    barrier, spans = context.Barrier(members, timeout=_PATIENCE), context.SimpleQueue()

    def member(i: int) -> None:
        try:
            ready(i)
            barrier.wait()
            began = perf_counter()
            work(i)
            spans.put((began, perf_counter()))
        except BaseException as e:
            spans.put(repr(e))
            raise

    processes = [context.Process(target=member, args=(i,)) for i in range(members)]
    for process in processes:
        process.start()
    answers = [spans.get() for _ in processes]
    for process in processes:
        process.join()
    for answer in answers:
        if isinstance(answer, str):
            raise RuntimeError(f"a forked reader failed: {answer}")
    return _span(answers)


def _span(spans: list[tuple[float, float]]) -> float:
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _cold(case: _Case, reads: dict[str, Read], files: list[Path]) -> Comparison:
    def drop() -> None:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # a dirty page is not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    drop()
    resident = _resident(files)
    cold = case.compare("one thread, page cache dropped", reads, _alone, 1, case.work.read_cold, drop)
    if resident is None:
        cold.notes.append("Whether POSIX_FADV_DONTNEED drops pages here could not be seen.")
    elif resident > 0.05:
        cold.notes.append(f"POSIX_FADV_DONTNEED left {resident:.0%} of the pages in the cache: this is not cold.")
    else:
        cold.notes.append(
            "POSIX_FADV_DONTNEED drops the pages here; a cache below this machine (its host's, the disk's) may be warm."
        )
    return cold


def _resident(files: list[Path], samples: int = 16) -> float | None:
    """The share of pages, of a sample of each file, that can be read without the disk; None if that cannot be told."""
    found = []
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # looking at a page brings no other in
            for offset in np.linspace(0, file.stat().st_size - 1, samples).astype(int).tolist():
                try:
                    found.append(os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1)
                except BlockingIOError:
                    found.append(False)
        except OSError:
            return None
        finally:
            os.close(descriptor)
    return sum(found) / len(found)
