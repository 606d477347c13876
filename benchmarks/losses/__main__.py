"""Measures the distillation losses beside a plain implementation of their formulas, and prints tables.

    python -m benchmarks.losses                                 all of it: the paper's shapes, 25 minutes, 8 GB
    python -m benchmarks.losses speed --size small              one of it, a minute
    python -m benchmarks.losses --device cuda --name my-gpu     also results/my-gpu.json and README.md's tables

Run it from the repository's root.
"""

from __future__ import annotations

from pathlib import Path

from .. import on_device
from . import memory, speed
from .sizes import SIZES

BENCHMARKS = {"speed": speed.measure, "memory": memory.measure, "agree": memory.agree}


def main(argv: list[str] | None = None) -> None:
    on_device.main("benchmarks.losses", __doc__, BENCHMARKS, SIZES, Path(__file__).parent, ("torch", "triton"), argv)


if __name__ == "__main__":
    main()
