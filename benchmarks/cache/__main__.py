"""Measures the feature store beside plain files and other formats, and prints tables.

    python -m benchmarks.cache                                   all of it: 15 minutes, 3 GB of disk
    python -m benchmarks.cache commit read --size small          two of it, a minute
    python -m benchmarks.cache --name my-machine                 also results/my-machine.json and README.md's tables

Run it from the repository's root. zarr-python comes with the package, the other formats with
`pip install tensorstore datasets`; without them they are left out, and the tables say so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from ..machine import describe
from . import commit, growth, memory, opening, others, read
from .figures import to_json
from .readme import FOLDER, rendered
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


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--size", choices=SIZES, default="full", help="how much is measured (default: full)")
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write, in a folder that is removed again")
    parser.add_argument("--name", help="keep the figures as results/NAME.json and render README.md")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of results/ and README.md, for --name")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    if unknown := [name for name in args.benchmarks if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {unknown[0]}; choose of {', '.join(BENCHMARKS)}")
    if not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a run that is stopped leaves nothing behind either
    run = {"size": args.size, "machine": describe(args.dir, PACKAGES), "seconds": 0.0, "figures": {}}
    began = perf_counter()
    for name, measure in BENCHMARKS.items():
        if args.benchmarks and name not in args.benchmarks:
            continue
        print(f"### {name}\n", flush=True)
        folder = Path(tempfile.mkdtemp(prefix=".benchmark.", dir=args.dir)).absolute()
        try:
            figures = measure(SIZES[args.size], folder)
        finally:
            shutil.rmtree(folder)
        run["figures"][name] = to_json(figures)
        print("\n\n".join(f.markdown() for f in figures) + "\n", flush=True)
    run["seconds"] = round(perf_counter() - began, 1)
    print(f"{run['seconds']:.0f} s", file=sys.stderr)
    if args.name:
        results = args.results / "results"
        results.mkdir(exist_ok=True)
        (results / f"{args.name}.json").write_text(json.dumps(run, indent=1) + "\n")
        (args.results / "README.md").write_text(rendered(args.results))


if __name__ == "__main__":
    main()
