"""The command line of folders of benchmarks whose works take a size and a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import harness
from .machine import describe


def main(
    module: str,
    description: str,
    benchmarks: Mapping[str, Callable[..., Any]],
    sizes: Mapping[str, Any],
    folder: Path,
    packages: Sequence[str],
    argv: list[str] | None,
) -> None:
    """`python -m {module}`, as `harness.arguments` has it; a benchmark is called with size, device and folder."""
    parser = harness.arguments(module, description, benchmarks, sizes, folder)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = harness.parsed(parser, argv, benchmarks)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # several wait for each other, and on a machine that is not idle for its other work
    machine = describe(args.dir, packages)
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    works = {name: partial(measure, sizes[args.size], device) for name, measure in benchmarks.items()}
    harness.measure(args, works, machine)
