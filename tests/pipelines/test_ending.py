"""How commands end: by signals, also while threads of a library are at work, and on a disk that is full."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from olavlm.pipelines.cli import command

ASKING = """
import os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from olavlm.pipelines.cli import command, ending_at_once
@command("olavlm-some")
def main(argv):
    with ThreadPoolExecutor(1) as threads, ending_at_once("olavlm-some"):
        threads.submit(threading.Event().wait)  # a server that does not answer
        os.kill(os.getpid(), signal.Signals[argv[0]])
        threading.Event().wait(20)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_job_beside_threads(name):
    ended = subprocess.run(
        [sys.executable, "-c", ASKING, name], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == f"olavlm-some: error: stopped by {name}\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), "out/x: No space left on device; make room"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; make room"),
        (Exception("I/O error: No space left on device (os error 28)"), "(os error 28); make room"),  # of safetensors
    ],
)
def test_a_full_disk_is_one_line_with_the_remedy(error, told, capsys):
    @command("olavlm-some")
    def main(argv):
        raise error

    assert main([]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 8 GiB"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line_with_the_remedy(error, capsys):
    @command("olavlm-some")
    def main(argv):
        raise error

    assert main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("olavlm-some: error: out of memory (")
    assert "take smaller batches" in said
    assert said.count("\n") == 1


def test_other_errors_keep_their_traceback():
    @command("olavlm-some")
    def main(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main([])


def test_a_terminal_that_cannot_show_a_name_is_shown_its_escape():
    code = (
        "import sys; from olavlm.pipelines.cli import command\n"
        "@command('olavlm-some')\ndef main(argv):\n    print('\\xfcn\\xef')\n"
        "sys.exit(main([]))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\xfcn\\xef\n", "")
