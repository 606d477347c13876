"""python -m olavlm.pipelines.downstream --task ...: `olavlm-probe score` by itself."""

from __future__ import annotations

import argparse
import sys

from olavlm.pipelines.cli import command, quiet_models

from .command import add_arguments, run


@command("olavlm-probe score")
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="olavlm-probe score",
        description="Score decoded features on DA-2K, COCO's classes, or by FID.",
        epilog="example: olavlm-probe score --task da2k --source features --annotations DA-2K/annotations.json "
        "--images DA-2K --output da2k-targets.json",
    )
    add_arguments(p)
    args = p.parse_args(argv)
    quiet_models()
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
