"""olavlm-tiny: small checkpoints with random weights in the true architectures, for demos and tests.

    olavlm-tiny tiny        writes tiny/depth tiny/seg tiny/gen tiny/encoder tiny/llm

They are ordinary Hugging Face checkpoint folders and load through exactly the code that loads the real ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from olavlm.teachers.tiny import make_tiny

from .cli import command, quiet_models, seed


@command("olavlm-tiny")
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="olavlm-tiny",
        description="Write tiny checkpoints: DIR/depth DIR/seg DIR/gen DIR/encoder DIR/llm.",
        epilog="example: olavlm-tiny tiny",
    )
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("--seed", type=seed, default=0)
    args = p.parse_args(argv)
    quiet_models()
    for name, folder in make_tiny(args.dir, seed=args.seed).items():
        print(f"{name}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
