"""Measures the distillation losses beside a plain implementation of their formulas, and prints tables.

    python -m benchmarks.losses                                 all of it: the paper's shapes, 25 minutes, 8 GB
    python -m benchmarks.losses speed --size small              one of it, a minute
    python -m benchmarks.losses --device cuda --name my-gpu     also results/my-gpu.json and README.md's tables

Run it from the repository's root.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from .. import harness
from ..machine import describe
from . import memory, speed
from .sizes import SIZES

BENCHMARKS = {"speed": speed.measure, "memory": memory.measure, "agree": memory.agree}


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments("benchmarks.losses", __doc__, BENCHMARKS, SIZES, Path(__file__).parent)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = harness.parsed(parser, argv, BENCHMARKS)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # several wait for each other, and on a machine that is not idle for its other work
    machine = describe(args.dir, ("torch", "triton"))
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    works = {name: partial(measure, SIZES[args.size], device) for name, measure in BENCHMARKS.items()}
    harness.measure(args, works, machine)


if __name__ == "__main__":
    main()
