"""What libraries say goes to a file, so that the terminal is the command's own."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from olavlm.pipelines.cli import JobFailed

RECOGNISED = 8
"""Characters."""


class WithoutBars(io.TextIOBase):
    """Writes to a file what is written to it, but for secrets and progress bars, which begin with \\r."""

    def __init__(self, file: TextIO, secrets: Sequence[str] = ()) -> None:
        self.file, self.secrets = file, secrets

    def write(self, text: str) -> int:
        if text.strip() and not text.startswith("\r"):
            shown = hidden(text, self.secrets)
            self.file.write(shown if shown.endswith("\n") else f"{shown}\n")
            self.file.flush()
        return len(text)

    def flush(self) -> None:
        self.file.flush()

    def writable(self) -> bool:
        return True


def hidden(text: str, secrets: Sequence[str]) -> str:
    """The text without secrets, such as a key that a server repeats when it refuses it.

    Nor does it keep the beginning of one, of RECOGNISED characters or more: messages are cut to a length, and a key
    with a line break in it is shown escaped.
    """
    for secret in filter(None, secrets):
        for length in range(len(secret), min(RECOGNISED, len(secret)) - 1, -1):
            text = text.replace(secret[:length], "[secret]")
    return text


@contextmanager
def output_to(log: Path, secrets: Sequence[str] = ()) -> Iterator[None]:
    """Standard output and error, and what lmms-eval and transformers log, go to the end of a file until this ends.

    Of a JobFailed within and of the file the secrets are kept out.
    """
    with log.open("a", encoding="utf-8") as file:
        stream = WithoutBars(file, secrets)
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
                raise JobFailed(hidden(str(e), secrets)) from e
            finally:
                logger.remove()
                transformers_logging.remove_handler(handler)
                transformers_logging.enable_default_handler()
