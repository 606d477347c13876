"""What libraries say goes to a file, so that the terminal is the command's own."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from olavlm.pipelines.cli import JobFailed


class WithoutBars(io.TextIOBase):
    """Writes to a file what is written to it, but for a secret and progress bars, which begin with a carriage return."""

    def __init__(self, file: TextIO, secret: str | None = None) -> None:
        self.file, self.secret = file, secret

    def write(self, text: str) -> int:
        if text.strip() and not text.startswith("\r"):
            shown = hidden(text, self.secret)
            self.file.write(shown if shown.endswith("\n") else f"{shown}\n")
            self.file.flush()
        return len(text)

    def flush(self) -> None:
        self.file.flush()

    def writable(self) -> bool:
        return True


def hidden(text: str, secret: str | None) -> str:
    """The text without a secret, such as a key that a server repeats when it refuses it."""
    return text.replace(secret, "[secret]") if secret else text


@contextmanager
def output_to(log: Path, secret: str | None = None) -> Iterator[None]:
    """Standard output and error, and what lmms-eval and transformers log, go to the end of a file until this ends.

    Of a JobFailed within and of the file the secret is kept out.
    """
    with log.open("a", encoding="utf-8") as file:
        stream = WithoutBars(file, secret)
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
            except JobFailed as e:
                raise JobFailed(hidden(str(e), secret)) from e
            finally:
                logger.remove()
                transformers_logging.remove_handler(handler)
                transformers_logging.enable_default_handler()
