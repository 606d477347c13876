"""Micro-batches from loader processes.

The loader is not handed to accelerate: which samples a rank sees is the sampler's decision alone.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from olavlm.cache import DatasetError
from olavlm.student.errors import TrainingError

from .collator import Collator
from .micro_batch import MicroBatch
from .sampler import BatchSampler
from .samples import check_images
from .shared_tensors import shared_memory_remedy


class _Indices(torch.utils.data.Dataset):
    """Hands indices through, so that the collator makes a micro-batch as a whole."""

    def __getitem__(self, index: int) -> int:
        return index


@contextmanager
def batches(
    collator: Collator,
    sampler: BatchSampler,
    steps: range,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Iterator[list[MicroBatch]]]:
    """Within, for each step its micro-batches on this rank, loaded ahead by `workers` processes, which end with it.

    Bad images are masked and stop nothing. But where none of a step's can be read on this rank, and none of those
    either that `check_images` tried at the start of the run, the roots are gone, and the step is not done.

    Raises:
        StudentError, CacheError: what a loader could not load.
        TrainingError: within, a loader died, whatever the trainer was doing then; or the image roots are gone.
    """
    order = (part.tolist() for step in steps for part in sampler.slices(step, rank, world_size, accumulation))
    options: dict[str, Any] = {}
    if workers:
        options["prefetch_factor"] = max(2, accumulation)
        atexit.unregister(_kill_loaders)  # once is enough
        atexit.register(_kill_loaders)
    try:
        loader = iter(
            DataLoader(
                _Indices(),
                batch_sampler=order,
                collate_fn=collator,
                num_workers=workers,
                pin_memory=pin_memory,
                worker_init_fn=_leave_signals_to_the_trainer,
                **options,
            )
        )
        try:
            yield (_checked([next(loader) for _ in range(accumulation)], collator) for _ in steps)
        finally:
            if workers:
                loader._shutdown_workers()
                for process in loader._workers:  # one that waits for a disk is still there
                    process.kill()
    except RuntimeError as e:  # of the library's handler of SIGCHLD, wherever the main thread was
        if not str(e).startswith("DataLoader worker (pid"):
            raise
        raise TrainingError(
            f"a loader process died ({str(e).splitlines()[0]}), perhaps for lack of memory: "
            f"{shared_memory_remedy()}; then run the same command again"
        ) from None


def _checked(loaded: list[Any], collator: Collator) -> list[MicroBatch]:
    for part in loaded:
        if isinstance(part, Exception):
            raise part
    wanted = sum(image is not None for part in loaded for image in part.images)
    if 0 < wanted == sum(len(part.bad_images) for part in loaded) and collator.reads_images:
        try:
            check_images(collator.dataset, collator.roots)
        except DatasetError as e:
            raise TrainingError(f"the images are gone: {e}; then run the same command again") from None
    return loaded


def _kill_loaders() -> None:
    """At exit, before multiprocessing sends its daemons SIGTERM, which loaders ignore, and waits for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the library's handler would raise an error for each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C, or a scheduler, signals the whole process group: loaders go on until the trainer has saved and leaves.

    Of a trainer that is killed they would wait for ever to be rid of what they have loaded, so they die with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # A trainer that was dead already will not die again. Under a fork server, that server is the parent.
        if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)
