"""The paper in miniature: a world small enough to hold, and small models that know it.

    python -m benchmarks.miniature                           everything in its quick form, to miniature_run/index.html
    python -m benchmarks.miniature run --form full --dir F   every table, with five seeds; goes on where it was stopped
    python -m benchmarks.miniature world --dir mini/world                   14,400 pictures in the formats of real data
    python -m benchmarks.miniature models --dir mini/models                 small teachers, encoder and language model
    python -m benchmarks.miniature shortcuts                                what a world gives away without being seen
    python -m benchmarks.miniature models --dir /tmp/m --size toy           that it runs; learns next to nothing

Run it from the repository's root. Each is a function of its seed; what a folder holds already is not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

from .run import add_arguments


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    world = commands.add_parser("world", help="pictures, dialogues and held-out questions")
    world.add_argument("--dir", type=Path, required=True, help="folder of the world")
    world.add_argument("--scenes", type=int, default=14_400, help="pictures to train on (default: %(default)s)")
    world.add_argument("--held-out", type=int, default=480, help="pictures to ask about (default: %(default)s)")
    models = commands.add_parser("models", help="teachers, base encoder and language model, trained on the world")
    models.add_argument("--dir", type=Path, required=True, help="folder of the checkpoints")
    models.add_argument("--size", choices=["quick", "full", "toy"], default="quick", help="how long they are trained")
    models.add_argument("--only", nargs="*", metavar="NAME", help="depth, seg, gen, encoder, llm; default: all")
    models.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    shortcuts = commands.add_parser("shortcuts", help="accuracies that must be near chance")
    shortcuts.add_argument("--pictures", type=int, default=1920, help="learnt from, and asked (default: %(default)s)")
    add_arguments(commands.add_parser("run", help="the experiments, their results and their page (the default)"))
    for command in (world, models, shortcuts):
        command.add_argument("--seed", type=int, default=0)
    for command in (world, shortcuts):
        command.add_argument("--processes", type=int, help="default: one a core")
    args = p.parse_args((sys.argv[1:] if argv is None else argv) or ["run"])
    began = perf_counter()
    try:
        {"world": _world, "models": _models, "shortcuts": _shortcuts, "run": _run}[args.command](args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace) -> None:
    from .run import run

    run(args)


def _world(args: argparse.Namespace) -> None:
    from .write import WorldSettings, write_world

    made = write_world(args.dir, WorldSettings(args.scenes, args.held_out, args.seed), args.processes)
    print(f"{args.dir}: {args.scenes} pictures, {args.held_out} held out" + ("" if made else ", there already"))


def _models(args: argparse.Namespace) -> None:
    from .models import make_models

    make_models(args.dir, args.size, args.seed, args.device, args.only)


def _shortcuts(args: argparse.Namespace) -> None:
    from .questions import TASKS
    from .shortcuts import CHANCE, by_rule, interval, text_alone
    from .world import stream

    pictures = list(stream(args.seed, 0, 2 * args.pictures, args.processes))
    learnt, asked = pictures[: args.pictures], pictures[args.pictures :]
    for i, task in enumerate(TASKS):
        accuracy = text_alone([p.questions[i] for p in learnt], [p.questions[i] for p in asked])
        bound = interval(CHANCE[task], len(asked))
        print(f"{task:<9} words alone               {accuracy:.3f}   chance {CHANCE[task]} ± {bound:.3f}")
    for rule, accuracy in by_rule(asked).items():
        print(f"          {rule:<25} {accuracy:.3f}   chance 0.5 ± {interval(0.5, len(asked)):.3f}")


if __name__ == "__main__":
    sys.exit(main())
