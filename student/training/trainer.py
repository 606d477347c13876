"""One stage of training, from a recipe to a run folder.

    accelerate launch --num_processes 8 -m olavlm.pipelines.train pt --config llama3-8b-clip-l ...
    python -m olavlm.pipelines.train pt --config tiny --model.llm tiny/llm ...

A step (`step.py`) takes the global batch of the sampler, cut into `accumulation` micro-batches a process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed
from transformers import PreTrainedTokenizerBase

from olavlm.cache import Dataset, ImageRoots
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.data.batches import (
    Collator,
    batches,
    check_images,
    check_samples,
    choose_samples,
    least_length,
    make_sampler,
)
from olavlm.student.data.encoder_features import EncoderFeatures, check_encoder_features
from olavlm.student.data.targets import TargetSource, check_targets, open_targets, tokens_without_losses
from olavlm.student.decoder import checkpoint_activations
from olavlm.student.errors import RecipeError, TrainingError
from olavlm.student.extension import extend
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.loading import DTYPES
from olavlm.student.lora import add_lora, lora_parameters, merge_lora, save_lora
from olavlm.student.model import OlaVLM
from olavlm.student.stages import PartRow, apply_stage, trains_llm
from olavlm.student.task import DistillTask
from olavlm.student.text.chat_template import check_template_file
from olavlm.student.text.conversation import load_tokenizer
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.encoder_name import EncoderName

from .checkpoint import (
    check_files,
    is_adapter,
    latest_step,
    load_trained,
    read_adapter,
    save_adapter,
    save_step,
    whole_model,
    write_json,
    writing,
)
from .data_watch import DataWatch
from .identity import Identity, features_digest, start_digest
from .loop import OnStep, Schedule, StepLoop
from .metrics import check_trackers, open_trackers
from .parallel import launched_with, parallelize
from .pictures import HeldOutPictures, held_out
from .step import OptimizerStep

STAGE_FILE = "stage.json"
OF_TEACHERS = ("name", "model", "revision", "recipe", "fingerprint")
"""What is kept there of the cards of features."""
PATIENCE = timedelta(hours=1)
"""That processes wait for one: an 8B model and its optimizer take longer to write than the ten minutes of NCCL."""


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
    check_trackers(recipe.train.trackers)
    dataset, roots = open_data(recipe)
    drawn = check_inputs(recipe, stage, dataset, roots)
    accelerator = join_processes(recipe)
    source = open_targets(recipe, accelerator.device) if reads_features(recipe, stage) else None
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
        trackers = open_trackers(recipe.train.trackers, run, first_step, {"stage": stage, **recipe.to_dict()})
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
    stopped_by = loop.run(loading, optimizer_step, after_step)
    parallel.gather()
    if accelerator.is_main_process:
        with writing(f"the result in {run}", run):
            save_result(run, recipe, stage, model, tokenizer)
        mark_finished(run, schedule.total_steps)
    accelerator.wait_for_everyone()  # the next stage, on another process, reads the result
    accelerator.print(f"{stage} finished: {run}")
    accelerator.free_memory()
    if stopped_by and more:
        raise TrainingError(f"stopped by {stopped_by} after {stage}; run the same command again to go on with the next")
    return run


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


def join_processes(recipe: Recipe) -> Accelerator:
    """This process among those of the launch, in the recipe's precision."""
    AcceleratorState._reset_state()  # a stage before this one may have had another precision; processes stay joined
    # Without `cpu`, accelerate would take several processes on a machine without an accelerator for one each.
    accelerator = Accelerator(
        mixed_precision=recipe.train.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1")), "processes do not see each other"
    return accelerator


def prepare_model(
    recipe: Recipe, stage: Stage, source: TargetSource | None, *, saves: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase, EncoderFeatures | None, list[PartRow]]:
    """The model that the stage trains, set to train what it trains.

    Args:
        source: the teachers' features, if the stage reads any.
        saves: whether this process will save the model; then the encoder stays with it, where features are read in its
            place.

    Returns:
        Model, tokenizer, the encoder's features if they are read in its place, and the table of what trains.

    Raises:
        StudentError: a model that cannot be had or does not fit the recipe, or sequences too short to learn from.
    """
    distil = recipe.distils(stage)
    specs, fused = [], []
    if recipe.fuses:
        fused = [FusedTeacher.of(name, source.cards[name]) for name in recipe.task_order]
    elif distil:
        specs = source.specs
    elif stage == "pt" and recipe.tasks:
        specs = tokens_without_losses(recipe)
    model, tokenizer = start_model(recipe, stage, specs, fused, distil)
    model.pack(recipe.model.packing)
    features = None
    if recipe.data.encoder_features is not None:
        features = EncoderFeatures(recipe)
        features.take_the_place_of(model.vision, keep=stage != "pt" and saves)  # pt's result holds no encoder
    least = least_length(tokenizer, recipe.model.template, model.inserted)
    if recipe.model.max_length < least:
        raise RecipeError(
            f"model.max_length is {recipe.model.max_length}: a short question about an image takes {least} tokens here "
            "before it is answered, and nothing would be learnt; make it longer"
        )
    if recipe.lora.rank is not None and trains_llm(stage):
        add_lora(model.llm, recipe.lora)
    table = apply_stage(model, stage, freeze_tokens=recipe.train.freeze_tokens, distil=distil)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model.llm)
    return model, tokenizer, features, table


def leave_processes() -> None:
    """Leave the group of processes that `train` joined, after the last stage: it cannot be joined twice."""
    PartialState().destroy_process_group()


def open_data(recipe: Recipe) -> tuple[Dataset, ImageRoots]:
    """The recipe's samples, `data.fraction` applied, and image roots."""
    dataset, roots = Dataset(recipe.files), ImageRoots(recipe.image_roots)
    chosen = choose_samples(len(dataset), recipe.data.fraction, recipe.train.seed)
    return (dataset if len(chosen) == len(dataset) else dataset.take(chosen)), roots


def start_model(
    recipe: Recipe, stage: Stage, specs: list[TaskSpec], fused: list[FusedTeacher], distil: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
    """The model that the stage starts from: base checkpoints in pt, `init.from` after it.

    `specs` are the tasks with tokens or losses, `fused` the teachers of a fusion baseline.
    """
    model, tokenizer = _start_model(recipe, stage, specs, fused, distil)
    if recipe.init.from_ is not None and recipe.model.chat_template is not None:
        check_template_file(tokenizer, recipe.model.chat_template, recipe.init.from_)
    return model, tokenizer


def _start_model(
    recipe: Recipe, stage: Stage, specs: list[TaskSpec], fused: list[FusedTeacher], distil: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
    m = recipe.model
    settings = build_settings(recipe, stage) | {"fused_teachers": [teacher.to_dict() for teacher in fused]}
    if recipe.init.from_ is None:
        if stage != "pt":
            raise RecipeError(f"init.from is not set; {stage} starts from the run folder of an earlier stage")
        tokenizer = load_tokenizer(m.llm, m.chat_template)
        return OlaVLM.build(m.llm, m.encoder, tokenizer, specs, **settings), tokenizer
    if is_adapter(recipe.init.from_):
        adapter = read_adapter(Path(recipe.init.from_))
        bases = {} if adapter.whole else {"llm": adapter.llm, "encoder": adapter.encoder}
        check_start(recipe, {**adapter.config, **bases}, adapter.tasks, fused)
        if distil:
            adapter.tasks = specs
        return adapter.build(with_predictors=distil, llm=m.llm, encoder=m.encoder, **settings)
    if distil and stage != "pt":
        raise RecipeError(
            f"losses.stages has {stage}, and {recipe.init.from_} is no run folder of pt, with predictors to go on with"
        )
    kept = {} if stage == "pt" else {"with_predictors": False}  # which a checkpoint from elsewhere may hold
    model = OlaVLM.from_pretrained(recipe.init.from_, dtype=DTYPES[m.dtype], attn_implementation=m.attention, **kept)
    tokenizer = model.tokenizer or load_tokenizer(recipe.init.from_)  # which says why there is none
    start = {name: getattr(model.config, name) for name in (*_INHERITED, "fused_teachers")}
    if stage == "pt":
        check_start(recipe, {**start, "num_task_tokens": m.num_task_tokens}, specs, fused)
        own = {key: value for key, value in settings.items() if key not in ("dtype", "attn_implementation")}
        return extend(model, specs, **own), tokenizer
    check_start(recipe, start, list(model.tasks), fused)
    model.config.fused_teachers = settings["fused_teachers"]  # the same, as this stage's store knows them
    model.config.geometry, model.config.max_sequence_length = settings["geometry"], m.max_length
    return model, tokenizer


_INHERITED = ("template", "num_task_tokens", "select_layer", "fusion")  # what a later stage cannot change


def check_start(recipe: Recipe, start: dict[str, Any], tasks: list[TaskSpec], fused: list[FusedTeacher]) -> None:
    """RecipeError if the recipe says otherwise than `init.from` what the model is: it would be trained as another."""
    inherited = [name for name in _INHERITED if name != "num_task_tokens" or recipe.task_order or tasks]
    before = [FusedTeacher.from_dict(teacher) for teacher in start["fused_teachers"]]
    said: dict[str, tuple[Any, Any]] = {
        "tasks, in model.order": (recipe.task_order, [x.name for x in (*tasks, *before)])
    }
    said |= {f"model.{name}": (getattr(recipe.model, name), start[name]) for name in inherited}
    for teacher, there in zip(fused, before, strict=False):
        said[f"the fingerprint of {teacher.name}'s features"] = teacher.fingerprint, there.fingerprint
    for name in ("llm", "encoder"):
        there = start.get(name)
        if there is not None and (Path(there).is_dir() or not Path(there).is_absolute()):  # it has not been moved
            said[f"model.{name}"] = _absolute(getattr(recipe.model, name)), there
    for key, (here, there) in said.items():
        if here != there:
            raise RecipeError(f"{key} is {here}, and {recipe.init.from_} was trained with {there}; use the same")


def run_identity(recipe: Recipe, stage: Stage, global_batch: int, dataset: Dataset) -> Identity:
    """The identity of everything but the features, which are known once their teachers are."""
    return {
        "stage": stage,
        "recipe": recipe.identity(),
        "global_batch": global_batch,
        "start": start_digest(recipe.init.from_),
        "samples": dataset.digest(),
    }


def check_agreed(first_step: int, run: Path, accelerator: Accelerator) -> None:
    """TrainingError if processes would go on from different steps: a run folder that not all nodes share."""
    steps = accelerator.gather(torch.tensor([first_step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise TrainingError(
            f"processes found different checkpoints in {run}, of steps {sorted(set(steps))}: put train.output_dir on a "
            "file system that all nodes share"
        )


def build_settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The recipe's model section as arguments of `OlaVLM.build`."""
    m = recipe.model
    return {
        "geometry": recipe.base_geometry(stage),
        "select_layer": m.select_layer,
        "dtype": DTYPES[m.dtype],
        "attn_implementation": m.attention,
        "template": m.template,
        "max_sequence_length": m.max_length,
        "num_task_tokens": m.num_task_tokens,
        "fusion": m.fusion,
        "gen_query": m.gen_query,
        "key_blocks": m.key_blocks,
        "include_answer": m.include_answer,
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
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
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
        llm=_absolute(m.llm),
        encoder=_absolute(m.encoder),
        config=config,
        recipe_hash=recipe.hash(),
        whole=whole_model(recipe.init.from_),
    )


def _absolute(model: str) -> str:
    """With local paths in full, so that the adapter finds them from anywhere; a hub id as it is."""
    return EncoderName.parse(model).absolute()
