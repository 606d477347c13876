"""olavlm-train: PT, VPT and IFT from a recipe, one by one or all in a row.

    olavlm-train pt  --config llama3-8b-clip-l --targets.store features
    olavlm-train ift --config llama3-8b-clip-l --init.from runs/llama3-8b-clip-l/pt
    olavlm-train all --config table5/n4 --train.output_dir runs/n4
    olavlm-train recipes

On a laptop, with the tiny checkpoints of `olavlm-tiny tiny`:

    olavlm-train all --config tiny --targets.store features --train.output_dir runs/tiny

Several processes (docs/distributed.md), with `ddp`, `fsdp`, or another of `olavlm-train accelerate`:

    accelerate launch --config_file $(olavlm-train accelerate ddp) --num_processes 8 \\
        -m olavlm.pipelines.train pt --config llama3-8b-clip-l
"""

from __future__ import annotations

import argparse
import sys
import time

from tqdm import tqdm

from olavlm.student.config import STAGES, describe
from olavlm.student.processes import Process
from olavlm.student.recipes import load_chain, load_recipe, shipped_recipes, table_rows

from .cli import command, quiet_models, versions
from .launch_configs import config_file, list_configs
from .recipe_list import list_recipes


def arguments() -> argparse.ArgumentParser:
    """The command line of `olavlm-train`."""
    whole = [name for name in shipped_recipes() if name not in table_rows()]
    p = argparse.ArgumentParser(
        prog="olavlm-train",
        usage="olavlm-train pt|vpt|ift|all --config RECIPE.yaml [--section.field value ...] [--dry-run]\n"
        "       olavlm-train recipes | accelerate [NAME]",
        description="Train one stage, or all in a row. A run that stopped is resumed.",
        epilog=f"shipped recipes: {', '.join(whole)}, and the rows of the paper's tables, such as table5/n4\n\n"
        f"recipe keys (for one stage of all: --stages.ift.train.lr 1e-5):\n{describe()}\n\n"
        "example: olavlm-train pt --config llama3-8b-clip-l --targets.store features --train.output_dir runs/pt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "stage",
        choices=(*STAGES, "all", "recipes", "accelerate"),
        help="pre-training, visual pre-training (optional), instruction finetuning; all: the stages of train.stages, "
        "each in a folder of its own below train.output_dir; recipes: list the shipped recipes; "
        "accelerate: list the shipped configurations of accelerate launch, or print where the one of this NAME lies",
    )
    p.add_argument("--config", metavar="RECIPE.yaml", help="a file, or the name of a shipped recipe")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, data and targets, print the plan and an estimate of memory, load no model",
    )
    return p


@command("olavlm-train")
def main(argv: list[str] | None = None) -> int:
    """Run one stage, or `all` of a recipe; 1 if it cannot be trained."""
    parser = arguments()
    args, overrides = parser.parse_known_args(argv)
    if args.stage == "recipes":
        if overrides or args.config:
            parser.error("recipes takes no further argument")
        print(list_recipes())
        return 0
    if args.stage == "accelerate":
        if len(overrides) > 1 or args.config:
            parser.error("accelerate takes the name of one configuration, or nothing")
        print(config_file(overrides[0]) if overrides else list_configs())
        return 0
    if args.config is None:
        parser.error("--config is required")
    if args.stage == "all":
        recipes = load_chain(args.config, overrides)
    else:
        recipes = {args.stage: load_recipe(args.config, overrides, args.stage)}
    # Only now, so that help and a wrong flag are answered at once: this imports PyTorch and transformers.
    from olavlm.student.training.chain import check_chain, train_chain
    from olavlm.student.training.trainer import train

    from .dry_run import dry_run

    if args.dry_run:
        check_chain(recipes)
        for stage, recipe in recipes.items():
            dry_run(recipe, stage)
        return 0
    quiet_models()
    if args.stage == "all":
        train_chain(recipes, versions(), StepDisplay())
    else:
        train(recipes[args.stage], args.stage, versions(), StepDisplay())
    Process.leave()
    return 0


class StepDisplay:
    """A bar with rate and ETA on a terminal, otherwise one dense line a step."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int, total: int, values: dict[str, float]) -> None:
        shown = {
            "loss": f"{values['loss/total']:.4f}",
            **({"text": f"{values['loss/text']:.4f}"} if "loss/text" in values else {}),
            "lr": f"{values['lr']:.2e}",
            "data": f"{values['data_wait_ms']:.0f} ms ({values['data_wait_ms'] / values['step_ms']:.0%})",
        }
        if values["bad_images"]:
            shown["unreadable images"] = str(int(values["bad_images"]))
        if sys.stdout.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, initial=step - 1, unit="step")
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
            if step == total:
                self._bar.close()
                self._bar = None
            return
        if self._first is None:  # the first step carries the start-up and is no measure
            self._first = step, time.perf_counter()
        done = step - self._first[0]
        rate = (time.perf_counter() - self._first[1]) / done if done else values["step_ms"] / 1000
        parts = [f"step {step}/{total}", *(f"{k} {v}" for k, v in shown.items()), f"{values['step_ms']:.0f} ms"]
        if step == total:
            self._first = None  # the next stage starts anew
        print(" | ".join([*parts, f"ETA {rate * (total - step):.0f} s"]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
