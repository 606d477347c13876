"""Measures what the forward is spared, and what it is not: padding, packing, predictors of two layers at once.

    python -m benchmarks.forward                        all of it, 20 minutes, 6 GB
    python -m benchmarks.forward padding                one of it, seconds
    python -m benchmarks.forward --name my-machine      also results/my-machine.json and README.md's tables

Run it from the repository's root.
"""

from __future__ import annotations

from pathlib import Path

from .. import on_device
from . import packing, padding, predictors
from .sizes import SIZES

BENCHMARKS = {"padding": padding.measure, "packing": packing.measure, "predictors": predictors.measure}


def main(argv: list[str] | None = None) -> None:
    on_device.main(
        "benchmarks.forward", __doc__, BENCHMARKS, SIZES, Path(__file__).parent, ("torch", "transformers"), argv
    )


if __name__ == "__main__":
    main()
