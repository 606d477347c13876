"""One stage of training, from a recipe to a run folder.

    accelerate launch --num_processes 8 -m olavlm.pipelines.train pt --config llama3-8b-clip-l ...
    python -m olavlm.pipelines.train pt --config tiny --model.llm tiny/llm ...

A step (`step.py`) takes the global batch of the sampler, cut into `accumulation` micro-batches a process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from olavlm.cache import Dataset, ImageRoots
from olavlm.cache.images import without_credentials
from olavlm.student.adapter import save_adapter, whole_model
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.data.batches import batches
from olavlm.student.data.collator import Collator
from olavlm.student.data.encoder_features import check_encoder_features
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.data.order import make_sampler
from olavlm.student.data.samples import check_images, check_samples, choose_samples
from olavlm.student.data.targets import TargetSource, check_targets, open_targets
from olavlm.student.errors import TrainingError
from olavlm.student.lora import lora_parameters, merge_lora, save_lora
from olavlm.student.model import OlaVLM
from olavlm.student.processes import Process
from olavlm.student.run_files import write_json
from olavlm.student.stages import PartRow
from olavlm.student.task import DistillTask

from .checkpoint import check_agreed, check_files, latest_step, load_trained, save_step, writing
from .data_watch import DataWatch
from .identity import Identity, features_digest, start_digest
from .loop import OnStep, Schedule, StepLoop
from .metrics import check_trackers, open_trackers
from .parallel import Parallel, launched_with, parallelize
from .pictures import HeldOutPictures, held_out
from .start import base_location, build_settings, prepare_model
from .step import OptimizerStep

STAGE_FILE = "stage.json"
OF_TEACHERS = ("name", "model", "revision", "recipe", "fingerprint")
"""What is kept there of the cards of features."""


def train(
    recipe: Recipe, stage: Stage, versions: dict[str, str], on_step: OnStep = lambda *_: None, *, more: bool = False
) -> Path:
    """Run one stage; returns the run folder. Resumes what an earlier call with the same recipe left unfinished.

    `more`: another stage is to follow in these processes, so that a signal in the last step stops them too.

    Raises:
        StudentError, CacheError: what the user can mend, before any model is loaded where that is possible.
        TrainingError: a loss that is not finite, an embedding loss of exactly zero, a run folder that holds more steps
            than the recipe, a loader that died, images that are gone, a checkpoint that could not be written, or a stop
            by SIGINT or SIGTERM (after a checkpoint, or the result).
    """
    training = set_up(recipe, stage, versions, on_step)
    stopped_by = training.run()
    if stopped_by and more:
        raise TrainingError(f"stopped by {stopped_by} after {stage}; run the same command again to go on with the next")
    return training.folder


@dataclass
class Training:
    """A stage that is ready for its first step, or its next one, in this process of several."""

    recipe: Recipe
    stage: Stage
    folder: Path
    """Of the run."""
    model: OlaVLM
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    parallel: Parallel
    loop: StepLoop
    loading: AbstractContextManager[Iterator[list[MicroBatch]]]
    optimizer_step: OptimizerStep
    after_step: Callable[[int, dict[str, float]], None]

    def run(self) -> str | None:
        """Take the steps that are left, and keep the result; the signal that came during the last step, if any."""
        stopped_by = self.loop.run(self.loading, self.optimizer_step, self.after_step)
        self.parallel.gather()
        if self.accelerator.is_main_process:
            with writing(f"the result in {self.folder}", self.folder):
                save_result(self.folder, self.recipe, self.stage, self.model, self.tokenizer)
            mark_finished(self.folder, self.loop.schedule.total_steps)
        self.accelerator.wait_for_everyone()  # the next stage, on another process, reads the result
        self.accelerator.print(f"{self.stage} finished: {self.folder}")
        self.accelerator.free_memory()
        return stopped_by


def set_up(
    recipe: Recipe,
    stage: Stage,
    versions: dict[str, str],
    on_step: OnStep = lambda *_: None,
    *,
    source: TargetSource | None = None,
) -> Training:
    """All of a stage ahead of its steps: what is wrong is refused, the model is there, and what was done is resumed.

    Args:
        source: of the teachers' features, in place of the recipe's.

    Raises:
        StudentError, CacheError: as `train`.
    """
    check_trackers(recipe.train.trackers)
    dataset, roots = open_data(recipe)
    drawn = check_inputs(recipe, stage, dataset, roots)
    accelerator = Process.launched().join(recipe.train.mixed_precision)
    if source is None and reads_features(recipe, stage):
        source = open_targets(recipe, accelerator.device)
    set_seed(recipe.train.seed)
    model, tokenizer, features, table = prepare_model(recipe, stage, source, saves=accelerator.is_main_process)

    run = Path(recipe.train.output_dir)
    global_batch = recipe.train.batch_size * recipe.train.accumulation * accelerator.num_processes
    identity = run_identity(recipe, stage, global_batch, dataset)
    if source is not None:
        identity = {**identity, "features": features_digest(source.cards)}
    sampler = make_sampler(
        recipe, dataset, source, global_batch, image_tokens=model.inserted.added, packed=model.packed
    )
    schedule = Schedule(recipe, len(sampler))
    resumed_from, first_step = latest_step(run, identity)
    check_agreed(first_step, run, accelerator)
    schedule.check_not_passed(first_step, run, "train.max_steps")
    if resumed_from is not None:
        check_files(resumed_from)
        load_trained(resumed_from, model)
    if accelerator.is_main_process:
        cards = {} if source is None else source.cards
        describe_run(run, recipe, stage, table, versions, accelerator.num_processes, model.packed, cards)
    collator = Collator.of(recipe, model, tokenizer, dataset, roots, source, features)
    parallel = parallelize(model, accelerator, recipe.train)
    if resumed_from is not None:
        parallel.load_optimizer(resumed_from)
    trackers = []
    if accelerator.is_main_process:
        settings = {"stage": stage, **without_credentials(recipe.to_dict())}
        trackers = open_trackers(recipe.train.trackers, run, first_step, settings)
    pictures = None
    if drawn is not None:
        pictures = HeldOutPictures(recipe, drawn, collator, source, parallel, accelerator, run)
    if first_step:
        accelerator.print(f"resumed from step {first_step}")

    losses, tasks = recipe.losses, model.tasks if recipe.distils(stage) else []
    task = DistillTask(tasks, losses.contrastive, losses.contrastive_weight, losses.kernels)
    watch = DataWatch(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def after_step(step: int, values: dict[str, float]) -> None:
        if accelerator.is_main_process:
            on_step(step, schedule.total_steps, values)
            if (warning := watch.see(values)) is not None:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        if pictures is not None:
            pictures(step, trackers)

    loop = StepLoop(
        schedule,
        first_step,
        accelerator,
        parallel.optimizer,
        trackers,
        save=lambda step: save_step(run, step, parallel, identity, recipe.train.keep),
        save_every=recipe.train.save_every,
    )
    optimizer_step = OptimizerStep(recipe, accelerator, parallel, source, task)
    loading = batches(
        collator,
        sampler,
        loop.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=recipe.train.accumulation,
        workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return Training(
        recipe, stage, run, model, tokenizer, accelerator, parallel, loop, loading, optimizer_step, after_step
    )


def reads_features(recipe: Recipe, stage: Stage) -> bool:
    """Whether the stage distils teachers' features, or is fed them."""
    return recipe.distils(stage) or recipe.fuses


def check_inputs(recipe: Recipe, stage: Stage, dataset: Dataset, roots: ImageRoots) -> Dataset | None:
    """Refuse what cannot be trained on before any model is loaded; gives the samples that are held out to be drawn.

    Raises:
        StudentError, CacheError: a sample, image root or store that cannot be used, and why.
    """
    check_samples(dataset, recipe.model.template)
    reads_encoder = recipe.data.encoder_features is not None
    if reads_encoder:
        check_encoder_features(recipe, dataset, stage)
    if not reads_encoder or (reads_features(recipe, stage) and recipe.targets.source == "online"):
        check_images(dataset, roots)
    if reads_features(recipe, stage):
        check_targets(recipe, dataset, stage)
    return held_out(recipe, stage)


def open_data(recipe: Recipe) -> tuple[Dataset, ImageRoots]:
    """The recipe's samples, `data.fraction` applied, and image roots."""
    dataset, roots = Dataset(recipe.files), ImageRoots(recipe.image_roots)
    chosen = choose_samples(len(dataset), recipe.data.fraction, recipe.train.seed)
    return (dataset if len(chosen) == len(dataset) else dataset.take(chosen)), roots


def run_identity(recipe: Recipe, stage: Stage, global_batch: int, dataset: Dataset) -> Identity:
    """The identity of everything but the features, which are known once their teachers are."""
    return {
        "stage": stage,
        "recipe": recipe.identity(),
        "global_batch": global_batch,
        "start": start_digest(recipe.init.from_),
        "samples": dataset.digest(),
    }


def describe_run(
    run: Path,
    recipe: Recipe,
    stage: Stage,
    table: list[PartRow],
    versions: dict[str, str],
    num_processes: int,
    packed: bool,
    cards: Mapping[str, Mapping[str, Any]],
) -> None:
    """Print and keep what trains, and keep the resolved recipe, the versions, how it is computed and, by their cards,
    whose features it distils or is fed."""
    print(f"{'part':<14}{'parameters':>16}{'trainable':>16}")
    for row in table:
        print(f"{row.part:<14}{row.parameters:>16,}{row.trainable:>16,}")
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(without_credentials(recipe.to_dict()), sort_keys=False))
    write_json(run / "versions.json", versions)
    launch = {"processes": num_processes, "sharded": launched_with("FSDP"), "packed": packed}
    teachers = {name: {field: card.get(field) for field in OF_TEACHERS} for name, card in cards.items()}
    write_json(run / STAGE_FILE, {"stage": stage, **launch, "teachers": teachers, "parts": [asdict(r) for r in table]})


def mark_finished(run: Path, step: int) -> None:
    """Note in `stage.json` that the run folder holds the whole result of so many steps."""
    write_json(run / STAGE_FILE, {**json.loads((run / STAGE_FILE).read_text()), "finished": step})


def save_result(run: Path, recipe: Recipe, stage: Stage, model: OlaVLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the next stage, or a user, takes from the run folder. LoRA updates become part of the model's weights."""
    if lora_parameters(model.llm):
        save_lora(model.llm, run / "lora")
        merge_lora(model.llm)
    if stage != "pt":
        model.vision.restore_tower()
        model.save_pretrained(run, tokenizer=tokenizer, with_predictors=False)
        return
    config = {k: v for k, v in build_settings(recipe, stage).items() if k != "attn_implementation"}
    config |= {"dtype": recipe.model.dtype, "fused_teachers": model.config.fused_teachers}
    m = recipe.model
    save_adapter(
        run,
        model,
        tokenizer,
        llm=base_location(m.llm),
        encoder=base_location(m.encoder),
        config=config,
        recipe_hash=recipe.hash(),
        whole=whole_model(recipe.init.from_),
    )
