"""A signal ends a job that keeps its work itself, also while threads of a library are at work."""

import subprocess
import sys

import pytest

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
