"""The commands: extract, train, generate, cache tools, report, demo and tiny checkpoints."""

import os
import signal
import sys
from pathlib import Path


def _leave(number: int, frame: object) -> None:
    """At once: an exception would come up, or be swallowed, in the middle of some library's import."""
    os.write(2, f"olavlm: error: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(1)


# A command imports for seconds before its main function listens to signals (see `cli.command`), and this module first.
# `-m` is what Python calls a module until it has found it. Imported by anything else, signals are left alone.
if sys.argv[0] == "-m" or Path(sys.argv[0]).name.startswith("olavlm-"):
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)
