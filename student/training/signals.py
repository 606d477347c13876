"""SIGINT and SIGTERM as a wish to stop, to be granted between two steps of work."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Inside, SIGINT and SIGTERM are noted in the list, to be looked at between steps."""
    noted: list[str] = []
    previous = {
        number: signal.signal(number, lambda n, frame: noted.append(signal.Signals(n).name))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
