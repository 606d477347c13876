"""The stages of a recipe one after the other, each from the result of the one before.

    DIR/pt  DIR/vpt  DIR/ift      run folders, each resumable; a stage that is finished is not run again

All stages run in the processes that the first was started in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.errors import RecipeError
from olavlm.student.processes import Process

from .checkpoint import latest_step
from .loop import OnStep, Schedule
from .trainer import STAGE_FILE, open_data, run_identity, train


def train_chain(recipes: Mapping[Stage, Recipe], versions: dict[str, str], on_step: OnStep = lambda *_: None) -> Path:
    """Run the stages of `load_chain`; returns the last one's run folder.

    Raises:
        RecipeError: stages that cannot share their processes.
        StudentError, CacheError: as `train`; stages ahead of the one that failed are finished, and skipped next time.
    """
    check_chain(recipes)
    process = Process.launched()
    last = Path()
    for number, (stage, recipe) in enumerate(recipes.items(), 1):
        last = Path(recipe.train.output_dir)
        if is_finished(recipe, stage):
            process.say(f"stage {number}/{len(recipes)}: {stage} is finished: {last}")
            continue
        process.say(f"stage {number}/{len(recipes)}: {stage}")
        train(recipe, stage, versions, on_step, more=number < len(recipes))
    return last


def check_chain(recipes: Mapping[Stage, Recipe]) -> None:
    """RecipeError for stages that cannot follow each other in the same processes."""
    precisions = {stage: recipe.train.mixed_precision for stage, recipe in recipes.items()}
    if len(set(precisions.values())) > 1:
        raise RecipeError(
            f"train.mixed_precision is {precisions}: stages of one command share it; set one, or run them one by one"
        )
    folders = [recipe.train.output_dir for recipe in recipes.values()]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"train.output_dir is {folders[0]} for several stages; put {{stage}} into it")


def is_finished(recipe: Recipe, stage: Stage) -> bool:
    """Whether the run folder holds the result of all the recipe's steps, and of no more.

    Raises:
        TrainingError: the folder holds a run of another recipe.
    """
    run = Path(recipe.train.output_dir)
    if not (run / STAGE_FILE).is_file():
        return False
    try:
        finished = int(json.loads((run / STAGE_FILE).read_bytes()).get("finished", 0))
    except (ValueError, TypeError, AttributeError):
        return False  # damaged: the stage goes on from its last checkpoint, and writes it anew
    global_batch = recipe.train.batch_size * recipe.train.accumulation * Process.launched().count
    dataset, _ = open_data(recipe)
    latest_step(run, run_identity(recipe, stage, global_batch, dataset))  # or it is another recipe's
    return finished == Schedule(recipe, math.ceil(len(dataset) / global_batch)).total_steps
