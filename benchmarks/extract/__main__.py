"""Measures extraction beside the teachers' bare forward and the bare disk, and prints tables.

    python -m benchmarks.extract                                 all of it: half an hour on two cores
    python -m benchmarks.extract free decode --size small        two of it, some minutes
    python -m benchmarks.extract --device cuda --name my-gpu     also results/my-gpu.json, README.md and docs/scale.md

Run it from the repository's root. It needs no Ray: workers are measured in this process.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from olavlm.teachers.base import resolve_device

from .. import harness
from ..machine import describe
from . import decode, driver, forward, free, public, same, scale
from .sizes import NAMES, size_of

BENCHMARKS = {
    "forward": forward.measure,
    "free": free.measure,
    "decode": decode.measure,
    "public": public.measure,
    "same": same.measure,
    "driver": driver.measure,
}
PACKAGES = ("torch", "transformers", "pillow", "numpy", "google-crc32c")
FOLDER = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments("benchmarks.extract", __doc__, BENCHMARKS, NAMES, FOLDER)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = harness.parsed(parser, argv, BENCHMARKS)
    device = str(resolve_device(args.device))
    size = size_of(args.size, device)
    torch.set_num_threads(1)  # as a worker has it, for the floors too
    machine = describe(args.dir, PACKAGES)
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    harness.measure(args, {name: partial(work, size) for name, work in BENCHMARKS.items()}, machine)
    if args.name and args.results == FOLDER:
        scale.write()


if __name__ == "__main__":
    main()
