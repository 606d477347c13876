"""Measures the feature store beside plain files and other formats, and prints tables.

    python -m benchmarks.cache                                   all of it: 15 minutes, 3 GB of disk
    python -m benchmarks.cache commit read --size small          two of it, a minute
    python -m benchmarks.cache --name my-machine                 also results/my-machine.json and README.md's tables

Run it from the repository's root. zarr-python comes with the package, the other formats with
`pip install tensorstore datasets`; without them they are left out, and the tables say so.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import harness
from ..machine import describe
from . import commit, growth, memory, opening, others, read
from .sizes import SIZES

BENCHMARKS = {
    "commit": commit.measure,
    "read": read.measure,
    "formats": others.measure,
    "memory": memory.measure,
    "open": opening.measure,
    "growth": growth.measure,
}
PACKAGES = ("numpy", "zarr", "numcodecs", "google-crc32c", "pyarrow", "tensorstore", "datasets")


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments("benchmarks.cache", __doc__, BENCHMARKS, SIZES, Path(__file__).parent)
    args = harness.parsed(parser, argv, BENCHMARKS)
    benchmarks = {name: partial(measure, SIZES[args.size]) for name, measure in BENCHMARKS.items()}
    harness.measure(args, benchmarks, describe(args.dir, PACKAGES))


if __name__ == "__main__":
    main()
