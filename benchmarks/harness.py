"""The command line that folders of benchmarks share: measures what was named, prints it, and keeps it if asked to."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter

from .figures import Figures, to_json
from .readme import rendered

Measure = Callable[[Path], list[Figures]]
"""One benchmark: works in the empty folder that it is given, which is removed afterwards."""


def arguments(
    module: str, description: str, names: Iterable[str], sizes: Iterable[str], folder: Path, default: str = "full"
):
    """The parser of `python -m {module}`, whose results and README.md lie in `folder`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"{', '.join(names)}; default: all")
    parser.add_argument(
        "--size", choices=list(sizes), default=default, help=f"how much is measured (default: {default})"
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write, in a folder that is removed again")
    parser.add_argument("--name", help="keep the figures as results/NAME.json and render README.md")
    parser.add_argument("--results", type=Path, default=folder, help="folder of results/ and README.md, for --name")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, names: Iterable[str]) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if unknown := [name for name in args.benchmarks if name not in names]:
        parser.error(f"no benchmark is called {unknown[0]}; choose of {', '.join(names)}")
    if not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a folder")
    return args


def measure(args: argparse.Namespace, benchmarks: Mapping[str, Measure], machine: dict) -> None:
    """Run what `args` names of `benchmarks`, on the `machine` described."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a run that is stopped leaves nothing behind either
    run = {"size": args.size, "machine": machine, "seconds": 0.0, "figures": {}}
    began = perf_counter()
    for name, work in benchmarks.items():
        if args.benchmarks and name not in args.benchmarks:
            continue
        print(f"### {name}\n", flush=True)
        folder = Path(tempfile.mkdtemp(prefix=".benchmark.", dir=args.dir)).absolute()
        try:
            figures = work(folder)
        finally:
            shutil.rmtree(folder)
        run["figures"][name] = to_json(figures)
        print("\n\n".join(f.markdown() for f in figures) + "\n", flush=True)
    run["seconds"] = round(perf_counter() - began, 1)
    print(f"{run['seconds']:.0f} s", file=sys.stderr)
    if args.name:
        results = args.results / "results"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{args.name}.json").write_text(json.dumps(run, indent=1) + "\n")
        (args.results / "README.md").write_text(rendered(args.results))
