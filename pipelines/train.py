"""olavlm-train: PT, VPT and IFT from a recipe.

    olavlm-train pt  --config llama3-8b-clip-l --data.images LLaVA-Pretrain/images --targets.store features
    olavlm-train ift --config llama3-8b-clip-l --init.from runs/llama3-8b-clip-l/pt

On a laptop, with the tiny checkpoints of `olavlm-tiny tiny`:

    olavlm-train pt --config tiny --targets.store features --train.output_dir runs/pt

Several processes: `accelerate launch --num_processes 8 -m olavlm.pipelines.train pt --config ...`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

from tqdm import tqdm

from olavlm.student.config import STAGES, Recipe, describe, load_recipe, shipped_recipes
from olavlm.student.targets import check_targets
from olavlm.student.trainer import open_data, train

from .cli import command, quiet_models, versions


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-train",
        usage="olavlm-train pt|vpt|ift --config RECIPE.yaml [--section.field value ...] [--dry-run]",
        description="Train one stage. A run that stopped is resumed.",
        epilog="shipped recipes: " + ", ".join(shipped_recipes()) + "\n\nrecipe keys:\n" + describe() + "\n\n"
        "example: olavlm-train pt --config llama3-8b-clip-l --targets.store features --train.output_dir runs/pt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("stage", choices=STAGES, help="pre-training, visual pre-training (optional), instruction finetuning")
    p.add_argument("--config", required=True, metavar="RECIPE.yaml", help="a file, or the name of a shipped recipe")
    p.add_argument(
        "--dry-run", action="store_true", help="check recipe, data and targets, print the plan, load no model"
    )
    return p


@command("olavlm-train")
def main(argv: list[str] | None = None) -> int:
    args, overrides = arguments().parse_known_args(argv)
    recipe = load_recipe(args.config, overrides, args.stage)
    if args.dry_run:
        return dry_run(recipe, args.stage)
    quiet_models()
    train(recipe, args.stage, versions(), StepDisplay())
    return 0


class StepDisplay:
    """A bar with rate and ETA on a terminal, otherwise one dense line a step."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int, total: int, values: dict[str, float]) -> None:
        shown = {
            "loss": f"{values['loss/total']:.4f}",
            "text": f"{values['loss/text']:.4f}",
            "lr": f"{values['lr']:.2e}",
            "data": f"{values['data_wait_ms']:.0f} ms",
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
            return
        if self._first is None:  # the first step carries the start-up and is no measure
            self._first = step, time.perf_counter()
        done = step - self._first[0]
        rate = (time.perf_counter() - self._first[1]) / done if done else values["step_ms"] / 1000
        parts = [f"step {step}/{total}", *(f"{k} {v}" for k, v in shown.items()), f"{values['step_ms']:.0f} ms"]
        print(" | ".join([*parts, f"ETA {rate * (total - step):.0f} s"]), flush=True)


def dry_run(recipe: Recipe, stage: str) -> int:
    """What a run would do, from everything but the models."""
    dataset, _ = open_data(recipe)
    with_images = int(dataset.has_image().true_count)
    print(f"{len(dataset)} samples, {with_images} with an image, {len(dataset.images())} distinct images")
    per_process = recipe.train.batch_size * recipe.train.accumulation
    steps = recipe.train.max_steps or math.ceil(recipe.train.epochs * math.ceil(len(dataset) / per_process))
    print(f"{stage} with one process: global batch {per_process}, {steps} steps")
    if stage in recipe.losses.stages and recipe.tasks:
        check_targets(recipe, dataset, stage)
        where = recipe.targets.store if recipe.targets.source == "cache" else "teachers in the loop"
        for name in recipe.task_order:
            print(
                f"{name}: layers {recipe.tasks[name].layers}, weight {recipe.tasks[name].weight}, targets from {where}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
