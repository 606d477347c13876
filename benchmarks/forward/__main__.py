"""Measures what the forward is spared, and what it is not: padding, packing, predictors of two layers at once.

    python -m benchmarks.forward                        all of it, 20 minutes, 6 GB
    python -m benchmarks.forward padding                one of it, seconds
    python -m benchmarks.forward --name my-machine      also results/my-machine.json and README.md's tables

Run it from the repository's root.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from .. import harness
from ..machine import describe
from . import packing, padding, predictors
from .sizes import SIZES

BENCHMARKS = {"padding": padding.measure, "packing": packing.measure, "predictors": predictors.measure}


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments("benchmarks.forward", __doc__, BENCHMARKS, SIZES, Path(__file__).parent)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = harness.parsed(parser, argv, BENCHMARKS)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # several wait for each other, and on a machine that is not idle for its other work
    machine = describe(args.dir, ("torch", "transformers"))
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    works = {name: partial(measure, SIZES[args.size], device) for name, measure in BENCHMARKS.items()}
    harness.measure(args, works, machine)


if __name__ == "__main__":
    main()
