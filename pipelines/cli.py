"""What every command shares: exit status, one-line errors, progress.

Exit status 2 is wrong usage, 1 a failed or incomplete job, 0 all else. An error that the user can mend is one line on
standard error; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import TypeVar

from tqdm import tqdm

from olavlm.cache import CacheError
from olavlm.student.errors import RecipeError, StudentError
from olavlm.teachers import TeacherError

MAKE_ROOM = "make room where this command writes, then run it again"
Number = TypeVar("Number", int, float)
MAKE_SMALLER = (
    "take smaller batches (in training train.batch_size, with more train.accumulation), train.gradient_checkpointing, "
    "or more memory"
)
VERSIONED = ("olavlm", "torch", "transformers", "numpy", "pillow", "zarr", "ray", "accelerate")


class UsageError(Exception):
    """A combination of arguments that cannot be: exit status 2."""


class JobFailed(Exception):
    """A job that ended incomplete for the reason given: exit status 1."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived. Not an Exception, of which libraries swallow some."""


def command(name: str) -> Callable[[Callable[[list[str] | None], int]], Callable[[list[str] | None], int]]:
    """Make a function of the arguments a console script that keeps this module's promises."""

    def wrap(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            before = {}
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # of a name that the terminal cannot show
            if threading.current_thread() is threading.main_thread():  # a long job takes over with `stop_requests`
                handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _stop}
                before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
            try:
                return main(argv)
            except (UsageError, RecipeError) as e:
                return _fail(name, e, 2)
            except (CacheError, TeacherError, StudentError, JobFailed) as e:
                return _fail(name, e, 1)
            except OSError as e:
                if isinstance(e, BrokenPipeError):
                    os._exit(0)  # the reader of our output left; there is nobody to tell
                what = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e
                return _fail(name, f"{what}; {MAKE_ROOM}" if e.errno in (errno.ENOSPC, errno.EDQUOT) else what, 1)
            except Exception as e:
                if f"(os error {errno.ENOSPC})" in str(e):  # those of safetensors and tokenizers are no OSErrors
                    return _fail(name, f"{e}; {MAKE_ROOM}", 1)
                if is_out_of_memory(e):
                    said = next(iter(str(e).strip().splitlines()), type(e).__name__)
                    return _fail(name, f"out of memory ({said}); {MAKE_SMALLER}", 1)
                raise
            except KeyboardInterrupt as e:
                return _fail(name, f"stopped by {str(e) or 'SIGINT'}", 1)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        return run

    return wrap


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that a device, or the host, has no memory left."""
    texts = ("can't allocate memory", "not enough memory", "Unable to allocate", "CUDA out of memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch, which not every command imports
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))
    )


def _fail(name: str, error: object, status: int) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


def _stop(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


@contextmanager
def ending_at_once(name: str) -> Iterator[None]:
    """Within, SIGINT and SIGTERM end the process where it stands, with the line and status they always have.

    For work that keeps what is done by itself, beside threads of libraries: an exception would wait for those, and for
    a server that they ask.
    """

    def end(number: int, frame: object) -> None:
        print(end="\n" if sys.__stderr__.isatty() else "", file=sys.__stderr__)  # below a progress bar
        print(f"{name}: error: stopped by {signal.Signals(number).name}", file=sys.__stderr__, flush=True)
        os._exit(1)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A bar with rate and ETA on a terminal, a plain line every `seconds` otherwise; on standard error.

    A `silent` one, of a process beside the main one, only counts.
    """

    def __init__(self, total: int, unit: str, title: str, *, seconds: float = 15.0, silent: bool = False) -> None:
        self.total, self.unit, self.title = total, unit, title
        self.seconds = float("inf") if silent else seconds
        self.done, self.began = 0, time.monotonic()
        self._printed = self.began
        self._stream = sys.stderr  # also while a library's output is redirected
        shown = self._stream.isatty() and not silent
        options = {"smoothing": 0.05, "miniters": 0, "file": self._stream}
        self._bar = tqdm(total=total, unit=unit, desc=title, **options) if shown else None

    def begin(self) -> None:
        """Now the work begins: what went before, such as the loading of models, is no part of the rate."""
        self.began = time.monotonic()
        if self._bar is not None:
            self._bar.reset()

    def update(self, n: int, note: str = "") -> None:
        """So many more are done (0 only shows that time goes by); `note` is what else there is to say now."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._printed >= self.seconds:
            self._printed = time.monotonic()
            rate = self.done / (self._printed - self.began)
            eta = f"ETA {tqdm.format_interval((self.total - self.done) / rate)}" if rate else "ETA unknown"
            pace = f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.2f} {self.unit}/s, {eta}"
            print(", ".join(filter(None, (pace, note))), file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def positive(text: str) -> int:
    """A whole number above 0, as the type of an argument."""
    return _number(text, int, lambda value: value > 0, "a positive number")


def natural(text: str) -> int:
    """A whole number from 0 up, as the type of an argument."""
    return _number(text, int, lambda value: value >= 0, "a whole number from 0 up")


def positive_real(text: str) -> float:
    """A finite number above 0, as the type of an argument."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a positive number")


def fraction(text: str) -> float:
    """A number between 0 and 1, as the type of an argument."""
    return _number(text, float, lambda value: 0 < value < 1, "between 0 and 1")


def _number(text: str, kind: Callable[[str], Number], holds: Callable[[Number], bool], what: str) -> Number:
    with suppress(ValueError):
        if holds(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


def seed(text: str) -> int:
    """A seed of PyTorch's and NumPy's generators, as the type of an argument."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def add_device_argument(p: argparse.ArgumentParser) -> None:
    """Adds `--device`, which `olavlm.teachers.base.resolve_device` understands."""
    p.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, cpu, cuda and cuda:N")
    return text


def quiet_models() -> None:
    """Keep transformers from drawing a bar for every file it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}
