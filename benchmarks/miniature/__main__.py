"""The paper in miniature: a world small enough to hold, and small models that know it.

    python -m benchmarks.miniature                           everything in its quick form, to miniature_run/index.html
    python -m benchmarks.miniature run --form full --dir F   every table, with five seeds; goes on where it was stopped
    python -m benchmarks.miniature world --dir mini/world                   14,400 pictures in the formats of real data
    python -m benchmarks.miniature models --dir mini/models                 small teachers, encoder and language model
    python -m benchmarks.miniature shortcuts                                what a world gives away without being seen
    python -m benchmarks.miniature models --dir mini/toy --size toy         that it runs; learns next to nothing

Run it from the repository's root. Each is a function of its seed; what a folder holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

from olavlm.pipelines.cli import JobFailed, UsageError, command, natural, positive

from ..figures import Count, to_json
from ..machine import describe
from ..readme import rendered
from .models import NAMES
from .run import add_arguments, keep, name_of_results

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "transformers", "numpy", "pillow")


@command("miniature")
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    world = commands.add_parser("world", help="pictures, dialogues and held-out questions")
    world.add_argument("--dir", type=Path, required=True, help="folder of the world")
    world.add_argument("--scenes", type=positive, default=14_400, help="pictures to train on (default: %(default)s)")
    world.add_argument("--held-out", type=positive, default=480, help="pictures to ask about (default: %(default)s)")
    models = commands.add_parser("models", help="teachers, base encoder and language model, trained on the world")
    models.add_argument("--dir", type=Path, required=True, help="folder of the checkpoints")
    models.add_argument("--size", choices=["standard", "toy"], default="standard", help="how long they are trained")
    models.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    models.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    shortcuts = commands.add_parser("shortcuts", help="accuracies that must be near chance")
    shortcuts.add_argument("--learn", type=positive, default=14_400, help="pictures learnt from (default: %(default)s)")
    shortcuts.add_argument("--pictures", type=positive, default=1920, help="others, asked about (default: %(default)s)")
    for one in (models, shortcuts):
        one.add_argument(
            "--name", type=name_of_results, help="keep the figures as results/NAME.json and render README.md"
        )
    add_arguments(commands.add_parser("run", help="the experiments, their results and their page (the default)"))
    for one in (world, models, shortcuts):
        one.add_argument("--seed", type=natural, default=0)
    for one in (world, shortcuts):
        one.add_argument("--processes", type=positive, help="default: one a core")
    args = p.parse_args((sys.argv[1:] if argv is None else argv) or ["run"])
    args.began = perf_counter()
    try:
        {"world": _world, "models": _models, "shortcuts": _shortcuts, "run": _run}[args.command](args)
    except ValueError as error:
        raise JobFailed(error) from None
    print(f"{perf_counter() - args.began:.0f} s", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace) -> None:
    from .run import run

    run(args)


def _world(args: argparse.Namespace) -> None:
    from .write import WorldSettings, write_world

    try:
        settings = WorldSettings(args.scenes, args.held_out, args.seed)
    except ValueError as error:
        raise UsageError(error) from None
    made = write_world(args.dir, settings, args.processes)
    print(f"{args.dir}: {args.scenes} pictures, {args.held_out} held out" + ("" if made else ", there already"))


def _models(args: argparse.Namespace) -> None:
    import torch

    from .models import make_models, scored

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    make_models(args.dir, args.size, args.seed, args.device, args.only)
    _keep(args, args.dir, args.size, "models", scored(args.dir))


def _shortcuts(args: argparse.Namespace) -> None:
    from .shortcuts import measured

    figures = measured(args.seed, args.learn, args.pictures, args.processes)
    print("\n\n".join(f.markdown() for f in figures))
    _keep(args, FOLDER, f"{args.learn} and {args.pictures}", "shortcuts", figures)


def _keep(args: argparse.Namespace, measured_in: Path, size: str, what: str, figures: list[Count]) -> None:
    """Results under their name, if they were given one, and README.md with them.

    Raises:
        JobFailed: under that name there are results of something else.
    """
    if args.name is None:
        return
    file = FOLDER / "results" / f"{args.name}.json"
    if file.is_file() and (there := [*json.loads(file.read_text())["figures"]]) != [what]:
        raise JobFailed(f"--name {args.name}: {file} holds {', '.join(there)}, not {what}; give another name")
    seconds = round(perf_counter() - args.began, 1)
    machine = describe(measured_in, PACKAGES)
    run = {"size": size, "machine": machine, "seconds": seconds, "figures": {what: to_json(figures)}}
    keep(file, run)
    (FOLDER / "README.md").write_text(rendered(FOLDER))


if __name__ == "__main__":
    sys.exit(main())
