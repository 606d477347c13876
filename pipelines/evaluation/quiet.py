"""What libraries say goes to a file, so that the terminal is the command's own."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO


class WithoutBars(io.TextIOBase):
    """Writes to a file what is written to it, but for progress bars, which begin with a carriage return."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        if text.strip() and not text.startswith("\r"):
            self.file.write(text if text.endswith("\n") else f"{text}\n")
            self.file.flush()
        return len(text)

    def flush(self) -> None:
        self.file.flush()

    def writable(self) -> bool:
        return True


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Standard output and error, and what lmms-eval and transformers log, go to the end of a file until this ends."""
    with log.open("a", encoding="utf-8") as file:
        stream = WithoutBars(file)
        with redirect_stdout(stream), redirect_stderr(stream):
            import lmms_eval.evaluator  # noqa: F401 - sets up loguru when it is imported, so it must be first
            from loguru import logger
            from transformers.utils import logging as transformers_logging

            logger.remove()
            logger.add(stream, level="INFO", colorize=False)
            handler = logging.StreamHandler(stream)
            transformers_logging.disable_default_handler()
            transformers_logging.add_handler(handler)
            try:
                yield
            finally:
                logger.remove()
                transformers_logging.remove_handler(handler)
                transformers_logging.enable_default_handler()
