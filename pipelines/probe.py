"""olavlm-probe: how well each layer of a frozen model represents depth, segmentation and generation features.

    olavlm-extract --teacher depth --recipe last --data coco_train.json --images coco --store coco-train
    olavlm-extract --teacher seg --teacher gen --data coco_train.json --images coco --store coco-train
    olavlm-probe train --model runs/llama3-8b-clip-l/ift --data coco_train.json --images coco --store coco-train \\
        --tasks depth,seg,gen --output probes/ift
    olavlm-probe eval probes/ift probes/baseline --data coco_val.json --images coco --store coco-val
    olavlm-probe score --task da2k --source probes/ift --annotations DA-2K/annotations.json --images DA-2K

On a laptop, after `make demo`:

    olavlm-probe train --model demo_run/ift --data pipelines/sample/pt.json --images pipelines/sample/images \\
        --store demo_run/features --tasks seg,gen --output probes/demo --batch-size 16 --epochs 20 --workers 0

`train` learns a probe a task and layer (`student/probing/bank.py`), `eval` scores probes on images they have
not seen, `score` what they predict, decoded, on public benchmarks (`downstream/`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from olavlm.cache.images import without_credentials
from olavlm.cache.wording import counted
from olavlm.student.probing.settings import RECIPES, ProbeData, ProbeSettings, default_key
from olavlm.student.processes import Process

from .cli import (
    JobFailed,
    Progress,
    UsageError,
    add_device_argument,
    command,
    fraction,
    natural,
    positive,
    quiet_models,
    seed,
    versions,
)
from .downstream import command as downstream
from .train import StepDisplay

TRAIN_HELP = """\
A probe is a resampler with latent queries that reads the states of one layer and learns a teacher's features by
smooth-L1. Probes of all layers and tasks are trained together on one forward of the frozen model, and each learns what
it would learn alone. At 8B (width 4096) a probe has 8.5M (depth), 15.1M (seg) or 7.9M (gen) parameters and takes 16
bytes each with gradient and optimizer state: 32 layers are 4.3, 7.7 and 4.0 GB, all three tasks 16.1 GB. --layers, or
one task at a time, takes less and gives the same probes. A run that stopped is resumed by the same command."""
EVAL_HELP = """\
Scores are the cosine of the whole prediction with the whole target, averaged over held-out images, with bootstrap
intervals over images. Images that cannot be read or whose target is quarantined are left out, and counted. Writes
scores.json, the plot over layers (layers.svg) and each image's cosines (parquet), and prints a table."""
TRAIN_EXAMPLE = (
    "example: olavlm-probe train --model runs/llama3-8b-clip-l/ift --data coco_train.json --images coco "
    "--store coco-train --tasks depth,seg,gen --output probes/ift\n\n"
    "several processes: accelerate launch --num_processes 8 -m olavlm.pipelines.probe train ..."
)
EVAL_EXAMPLE = (
    "example: olavlm-probe eval probes/ift probes/baseline --data coco_val.json --images coco --store coco-val"
)
SCORE_HELP = """\
Features are decoded by their teacher's own decoder and scored: depth on DA-2K, seg on COCO's panoptic annotations,
gen by FID. --source is a store, the targets themselves and so the upper bound, or a run of probes, layer by layer; a
model's score is the mean over its layers (arXiv 2412.09585, table 8). Images that cannot be scored are named, and the
exit status is 1."""
SCORE_EXAMPLE = (
    "example: olavlm-probe score --task da2k --source probes/ift --annotations DA-2K/annotations.json --images DA-2K "
    "--output da2k.json"
)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-probe",
        description="Measure how well each layer of a frozen model represents what teachers see in an image.",
        epilog=f"{TRAIN_EXAMPLE.splitlines()[0]}\n         {EVAL_EXAMPLE.removeprefix('example: ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="train|eval|score")
    train = _subparser(commands, "train", "train probes on the states of a frozen model", TRAIN_HELP, TRAIN_EXAMPLE)
    train.add_argument("--model", required=True, metavar="RUN",
                       help="run folder of olavlm-train of any stage, or a stock LLaVA "
                       "(LlavaForConditionalGeneration), folder or hub id")  # fmt: skip
    _add_data(train)
    train.add_argument("--tasks", required=True, type=_tasks, metavar="NAME[=KEY],...",
                       help="depth, seg, gen, or any other features of the store: KEY is their name in it, by default "
                       + ", ".join(f"{name}'s is {default_key(name)}" for name in RECIPES)
                       + ", and any other's is NAME")  # fmt: skip
    train.add_argument("--output", required=True, metavar="DIR", help="run folder")
    train.add_argument("--layers", type=_layers, metavar="1,8-20", help="decoder blocks, from 1 (default: all)")
    train.add_argument("--template", metavar="NAME", help="prompt template of a stock LLaVA, where its own is not one")
    train.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the frozen model")
    train.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="autocast of model and probes")
    defaults = ProbeSettings
    train.add_argument("--batch-size", type=int, metavar="N", default=defaults.batch_size,
                       help="images an optimizer step, over all processes (%(default)s)")  # fmt: skip
    train.add_argument("--micro-batch", type=int, metavar="N", default=defaults.micro_batch,
                       help="images a process and forward (%(default)s)")  # fmt: skip
    train.add_argument("--epochs", type=float, metavar="X", default=defaults.epochs,
                       help="passes over the images (%(default)s)")  # fmt: skip
    train.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps")
    train.add_argument("--lr", type=float, metavar="X", default=defaults.lr, help="peak learning rate (%(default)s)")
    train.add_argument("--warmup", type=float, metavar="X", default=defaults.warmup,
                       help="part of the run with rising learning rate, then a cosine (%(default)s)")  # fmt: skip
    train.add_argument(
        "--seed", type=seed, metavar="N", default=defaults.seed, help="random seed of first weights and order"
    )
    train.add_argument("--workers", type=int, metavar="N", default=defaults.workers,
                       help="loader processes (%(default)s)")  # fmt: skip
    train.add_argument("--save-every", type=int, metavar="N", default=defaults.save_every,
                       help="optimizer steps between checkpoints (%(default)s)")  # fmt: skip
    train.add_argument("--keep", type=int, metavar="N", default=defaults.keep, help="checkpoints kept (%(default)s)")
    held_out = _subparser(commands, "eval", "score trained probes on held-out images", EVAL_HELP, EVAL_EXAMPLE)
    held_out.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of olavlm-probe train")
    _add_data(held_out)
    held_out.add_argument("--output", type=Path, metavar="DIR",
                          help="default: eval in the run folder, of several runs in the folder they share")  # fmt: skip
    held_out.add_argument(
        "--model", metavar="RUN", help="where the probed model lies now, if it has moved (of one run)"
    )
    held_out.add_argument("--batch-size", type=positive, metavar="N", default=16, help="images a forward (%(default)s)")
    held_out.add_argument("--workers", type=natural, metavar="N", default=4, help="loader processes (%(default)s)")
    held_out.add_argument(
        "--resamples", type=positive, metavar="N", default=1000, help="resamples of the bootstrap (%(default)s)"
    )
    held_out.add_argument(
        "--seed", type=natural, metavar="N", default=0, help="random seed of the bootstrap (%(default)s)"
    )
    held_out.add_argument(
        "--level", type=fraction, metavar="X", default=0.95, help="confidence level of the intervals (%(default)s)"
    )
    add_device_argument(held_out)
    scored = _subparser(commands, "score", "score decoded predictions on public benchmarks", SCORE_HELP, SCORE_EXAMPLE)
    downstream.add_arguments(scored)
    return p


def _subparser(commands, name: str, summary: str, about: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=about,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", nargs="+", action="extend", required=True, metavar="FILE",
                   help=".json, .jsonl or .parquet; only its distinct images are used")  # fmt: skip
    p.add_argument("--images", nargs="+", action="extend", required=True, metavar="[PREFIX=]DIR|ZIP|URL",
                   help="image roots, as for olavlm-extract")  # fmt: skip
    p.add_argument("--store", required=True, help="feature store of olavlm-extract with the targets of these images")


def _tasks(text: str) -> dict[str, str]:
    tasks: dict[str, str] = {}
    for word in text.split(","):
        name, eq, key = word.strip().partition("=")
        if not name or (eq and not key) or name in tasks:
            raise argparse.ArgumentTypeError(f"{text!r}: give names, such as depth,seg or mine=KEY, each once")
        tasks[name] = key or default_key(name)
    return tasks


def _layers(text: str) -> list[int]:
    layers: list[int] = []
    for word in text.split(","):
        first, dash, last = word.partition("-")
        if not first.isdigit() or not (last.isdigit() if dash else True) or not int(first):
            raise argparse.ArgumentTypeError(f"{text!r}: give layers from 1 and runs of them, such as 1,8-20")
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise argparse.ArgumentTypeError(f"{word!r} is an empty run of layers; the smaller number comes first")
        layers += run
    return sorted(set(layers))


@command("olavlm-probe")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    quiet_models()
    if args.command == "score":
        return downstream.run(args)
    data = ProbeData(args.data, args.images, args.store)
    return (run_train if args.command == "train" else run_eval)(args, data)


def run_train(args: argparse.Namespace, data: ProbeData) -> int:
    """A run folder of probes, printed step by step."""
    # Here and in `run_eval`, so that help and a wrong flag are answered at once: this imports PyTorch and transformers.
    from olavlm.student.probing.training import train_probes

    names = ("model", "tasks", "output", "layers", "template", "dtype", "mixed_precision", "batch_size", "micro_batch",
             "epochs", "max_steps", "lr", "warmup", "seed", "workers", "save_every", "keep")  # fmt: skip
    settings = ProbeSettings(data=data, **{name: getattr(args, name) for name in names})
    train_probes(settings, versions(), StepDisplay())
    Process.leave()
    return 0


def run_eval(args: argparse.Namespace, data: ProbeData) -> int:
    """Files with the scores of all runs, and the table."""
    from olavlm.student.probing.scores import probe_cosines
    from olavlm.teachers.base import resolve_device

    from .probe_results import Scored, text_table, write_results

    folders = list(dict.fromkeys(folder.absolute() for folder in args.runs))
    if args.model is not None and len(folders) > 1:
        raise UsageError(f"--model goes with one RUN; {len(folders)} were given")
    device = resolve_device(args.device)
    shared = Path(os.path.commonpath([f.parent for f in folders] if len(folders) > 1 else folders))
    output: Path = args.output or shared / "eval"
    if output.exists() and not output.is_dir():
        raise JobFailed(f"--output {output} is a file; name a folder")
    runs = []
    for folder in folders:
        name = str(folder.relative_to(shared)) if len(folders) > 1 else folder.name
        display = ImageDisplay(name)
        found = probe_cosines(
            folder,
            data,
            model_path=args.model,
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            on_images=display,
        )
        if found.seen:
            print(
                f"warning: {name}: {found.seen} of {counted(len(found.images), 'image')} were in its training; scores "
                "over them are not held-out scores",
                file=sys.stderr,
            )
        scored = Scored.of(name, folder, found, resamples=args.resamples, seed=args.seed, level=args.level)
        if empty := [task for task, mean in scored.means.items() if not mean.images]:
            raise JobFailed(f"{name}: no image of the data can be read and has a target for {empty[0]}")
        runs.append(scored)
    asked = {"data": args.data, "images": args.images, "store": args.store}
    asked |= {"resamples": args.resamples, "seed": args.seed, "level": args.level}
    write_results(runs, output, without_credentials(asked), versions())
    print(text_table(runs))
    print(f"scores: {output}")
    return 0


class ImageDisplay:
    """A bar, or plain lines, over the images of one run."""

    def __init__(self, name: str) -> None:
        self.name, self.progress = name, None

    def __call__(self, done: int, total: int) -> None:
        """So many more of the images are done."""
        if self.progress is None:
            self.progress = Progress(total, "images", self.name)
        self.progress.update(done)
        if self.progress.done == total:
            self.progress.close()


if __name__ == "__main__":
    sys.exit(main())
