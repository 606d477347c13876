"""One stage of training, from a recipe to a run folder.

    accelerate launch --num_processes 8 -m olavlm.pipelines.train pt --config llama3-8b-clip-l ...
    python -m olavlm.pipelines.train pt --config tiny --model.llm tiny/llm ...

A step (`step.py`) takes the global batch of the sampler, cut into `accumulation` micro-batches a process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from olavlm.cache import Dataset, ImageRoots

from .checkpoint import (
    is_adapter,
    latest_step,
    load_step,
    read_adapter,
    save_adapter,
    save_step,
    write_json,
)
from .config import Recipe, Stage
from .conversation import load_tokenizer
from .data import Collator, batches, check_images, check_samples, choose_samples
from .encoder_features import EncoderFeatures, check_encoder_features
from .encoder_name import EncoderName
from .errors import RecipeError, TrainingError
from .lora import add_lora, lora_parameters, merge_lora, save_lora
from .metrics import JsonLines, TensorBoard, Tracker
from .model import OlaVLM
from .sampler import GlobalBatchSampler
from .signals import stop_requests
from .stages import PartRow, apply_stage, trains_llm
from .step import OptimizerStep
from .targets import check_targets, open_targets, tokens_without_losses
from .task import DistillTask
from .tokens import TaskSpec

STAGE_FILE = "stage.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


OnStep = Callable[[int, int, dict[str, float]], None]
"""Called on the main process after each step with its number, the number of steps and the metrics."""


def train(recipe: Recipe, stage: Stage, versions: dict[str, str], on_step: OnStep = lambda *_: None) -> Path:
    """Run one stage; returns the run folder. Resumes what an earlier call with the same recipe left unfinished.

    Raises:
        StudentError, CacheError: what the user can mend, before any model is loaded where that is possible.
        TrainingError: a loss that is not finite, an embedding loss of exactly zero, or a stop by SIGINT or SIGTERM
            (after a checkpoint).
    """
    distil = stage in recipe.losses.stages and bool(recipe.tasks)
    dataset, roots = open_data(recipe)
    check_samples(dataset, recipe.model.template)
    reads_encoder = recipe.data.encoder_features is not None
    if reads_encoder:
        check_encoder_features(recipe, dataset, stage)
    if not reads_encoder or (distil and recipe.targets.source == "online"):
        check_images(dataset, roots)
    if distil:
        check_targets(recipe, dataset, stage)

    # Without `cpu`, accelerate would take several processes on a machine without an accelerator for one each.
    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision, cpu=not torch.accelerator.is_available())
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1")), "processes do not see each other"
    source = open_targets(recipe, accelerator.device) if distil else None
    set_seed(recipe.train.seed)
    specs = source.specs if source else tokens_without_losses(recipe) if stage == "pt" and recipe.tasks else []
    model, tokenizer = start_model(recipe, stage, specs, distil)
    features = EncoderFeatures(recipe) if reads_encoder else None
    if features is not None:  # of the models saved, pt's holds no encoder
        features.take_the_place_of(model.vision, keep=stage != "pt" and accelerator.is_main_process)
    if recipe.model.max_length <= model.num_inserted_tokens + 1:
        raise RecipeError(
            f"model.max_length is {recipe.model.max_length}: an image alone takes "
            f"{model.num_inserted_tokens + 1} tokens here, and nothing would be learnt; make it longer"
        )
    if recipe.lora.rank is not None and trains_llm(stage):
        add_lora(model.llm, recipe.lora)
    table = apply_stage(model, stage, freeze_tokens=recipe.train.freeze_tokens, distil=distil)
    if recipe.train.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.train.lr,
        weight_decay=recipe.train.weight_decay,
    )
    run = Path(recipe.train.output_dir)
    global_batch = recipe.train.batch_size * recipe.train.accumulation * accelerator.num_processes
    identity = run_identity(recipe, stage, global_batch)
    resumed_from, first_step = latest_step(run, identity)
    if resumed_from is not None:
        load_step(resumed_from, model, optimizer)
    if accelerator.is_main_process:
        describe_run(run, recipe, stage, table, versions, accelerator.num_processes)
    sampler = GlobalBatchSampler(
        np.asarray(dataset.has_image()), global_batch, recipe.train.seed, recipe.data.group_by_modality
    )
    collator = Collator.of(recipe, model, tokenizer, dataset, roots, source, features)
    schedule = Schedule(recipe, len(sampler))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    trackers = open_trackers(recipe, run, first_step) if accelerator.is_main_process else []
    if first_step:
        accelerator.print(f"resumed from step {first_step}")

    task = DistillTask(model.tasks if distil else [], recipe.losses.contrastive, recipe.losses.contrastive_weight)
    optimizer_step = OptimizerStep(recipe, accelerator, wrapped, optimizer, source, task)
    steps = range(first_step, schedule.total_steps)
    loading = batches(
        collator,
        sampler,
        steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=recipe.train.accumulation,
        workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with stop_requests() as stop:
        for step in steps:
            waited = time.perf_counter()
            micro_batches = next(loading)
            data_wait = time.perf_counter() - waited
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step)
            values = optimizer_step(step, micro_batches)
            values |= {
                "lr": optimizer.param_groups[0]["lr"],
                "epoch": (step + 1) / len(sampler),
                "data_wait_ms": 1000 * data_wait,
                "step_ms": 1000 * (time.perf_counter() - waited),
            }
            for tracker in trackers:
                tracker.log(step + 1, values)
            if accelerator.is_main_process:
                on_step(step + 1, schedule.total_steps, values)
            last = step + 1 == schedule.total_steps
            stopping = bool(accelerator.reduce(torch.tensor(float(bool(stop)), device=accelerator.device)) > 0)
            if last or stopping or (step + 1) % recipe.train.save_every == 0:
                if accelerator.is_main_process:
                    save_step(run, step + 1, model, optimizer.optimizer, identity, recipe.train.keep)
                accelerator.wait_for_everyone()
            if stopping and not last:
                raise TrainingError(
                    f"stopped by {stop[0] if stop else 'another process'} after step {step + 1}, which is saved; run "
                    "the same command again to finish"
                )
    for tracker in trackers:
        tracker.close()
    if accelerator.is_main_process:
        save_result(run, recipe, stage, model, tokenizer)
        mark_finished(run, schedule.total_steps)
    accelerator.wait_for_everyone()  # the next stage, on another process, reads the result
    accelerator.print(f"{stage} finished: {run}")
    accelerator.free_memory()
    return run


def leave_processes() -> None:
    """Leave the group of processes that `train` joined, after the last stage: it cannot be joined twice."""
    PartialState().destroy_process_group()


class Schedule:
    """Length of the run, and the learning rate of each step: linear warm-up, then a cosine to 0."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        by_epochs = math.ceil(recipe.train.epochs * steps_per_epoch)
        self.total_steps = recipe.train.max_steps or by_epochs
        self.horizon = by_epochs  # not of max_steps: a run resumed has the rates of one that never stopped
        self.warmup_steps = math.ceil(recipe.train.warmup * self.horizon)
        self.peak = recipe.train.lr

    def lr(self, step: int) -> float:
        """Of a step, from 0. The first is not wasted at 0, the last is above it. Beyond the epochs it starts anew."""
        step %= self.horizon
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.horizon - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))


def open_data(recipe: Recipe) -> tuple[Dataset, ImageRoots]:
    """The recipe's samples, `data.fraction` applied, and image roots."""
    dataset, roots = Dataset(recipe.files), ImageRoots(recipe.image_roots)
    chosen = choose_samples(len(dataset), recipe.data.fraction, recipe.train.seed)
    return (dataset if len(chosen) == len(dataset) else dataset.take(chosen)), roots


def start_model(
    recipe: Recipe, stage: Stage, specs: list[TaskSpec], distil: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
    """The model that the stage starts from: base checkpoints in pt, `init.from` after it."""
    m = recipe.model
    settings = build_settings(recipe, stage)
    if recipe.init.from_ is None:
        if stage != "pt":
            raise RecipeError(f"init.from is not set; {stage} starts from the run folder of an earlier stage")
        tokenizer = load_tokenizer(m.llm, m.chat_template)
        return OlaVLM.build(m.llm, m.encoder, tokenizer, specs, **settings), tokenizer
    if is_adapter(recipe.init.from_):
        adapter = read_adapter(Path(recipe.init.from_))
        check_start(recipe, {**adapter.config, "llm": adapter.llm, "encoder": adapter.encoder}, adapter.tasks)
        if distil:
            adapter.tasks = specs
        return adapter.build(with_predictors=distil, llm=m.llm, encoder=m.encoder, **settings)
    if distil:
        raise RecipeError(f"losses.stages has {stage}, and {recipe.init.from_} holds no predictors to go on with")
    model = OlaVLM.from_pretrained(recipe.init.from_, dtype=DTYPES[m.dtype], attn_implementation=m.attention)
    check_start(recipe, {name: getattr(model.config, name) for name in _INHERITED}, list(model.tasks))
    model.config.geometry, model.config.max_sequence_length = settings["geometry"], m.max_length
    return model, model.tokenizer or load_tokenizer(recipe.init.from_)  # which says why there is none


_INHERITED = ("template", "num_task_tokens", "select_layer")  # what a later stage cannot change


def check_start(recipe: Recipe, start: dict[str, Any], tasks: list[TaskSpec]) -> None:
    """RecipeError if the recipe says otherwise than `init.from` what the model is: it would be trained as another."""
    said = {f"model.{name}": (getattr(recipe.model, name), start[name]) for name in _INHERITED}
    said["tasks, in model.order"] = recipe.task_order, [task.name for task in tasks]
    for name in ("llm", "encoder"):
        there = start.get(name)
        if there is not None and (Path(there).is_dir() or not Path(there).is_absolute()):  # it has not been moved
            said[f"model.{name}"] = _absolute(getattr(recipe.model, name)), there
    for key, (here, there) in said.items():
        if here != there:
            raise RecipeError(f"{key} is {here}, and {recipe.init.from_} was trained with {there}; use the same")


def run_identity(recipe: Recipe, stage: Stage, global_batch: int) -> str:
    """Of what a run's numbers follow from; a run is resumed under the same one alone."""
    return f"{stage}-{recipe.hash()}-{global_batch}-{start_digest(recipe.init.from_)}"


def start_digest(path: str | None) -> str:
    """Names the weights that a run starts from, by the ends of their files: no resume on top of other ones."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")) if path else ():
        with file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            for offset in (0, max(0, size - 2**20)):
                f.seek(offset)
                digest.update(f.read(2**20))
            digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:16]


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
        "gen_query": m.gen_query,
        "key_blocks": m.key_blocks,
        "include_answer": m.include_answer,
    }


def describe_run(
    run: Path, recipe: Recipe, stage: Stage, table: list[PartRow], versions: dict[str, str], num_processes: int
) -> None:
    """Print and keep what trains, and keep the resolved recipe and the versions."""
    print(f"{'part':<14}{'parameters':>16}{'trainable':>16}")
    for row in table:
        print(f"{row.part:<14}{row.parameters:>16,}{row.trainable:>16,}")
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    write_json(run / "versions.json", versions)
    write_json(run / STAGE_FILE, {"stage": stage, "processes": num_processes, "parts": [asdict(r) for r in table]})


def mark_finished(run: Path, step: int) -> None:
    """Note in `stage.json` that the run folder holds the whole result of so many steps."""
    write_json(run / STAGE_FILE, {**json.loads((run / STAGE_FILE).read_text()), "finished": step})


def open_trackers(recipe: Recipe, run: Path, first_step: int) -> list[Tracker]:
    trackers: list[Tracker] = [JsonLines(run / "metrics.jsonl", first_step)]
    if recipe.train.tensorboard:
        trackers.append(TensorBoard(run / "tensorboard", first_step))
    return trackers


def save_result(run: Path, recipe: Recipe, stage: Stage, model: OlaVLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the next stage, or a user, takes from the run folder. LoRA updates become part of the model's weights."""
    if lora_parameters(model.llm):
        save_lora(model.llm, run / "lora")
        merge_lora(model.llm)
    if stage != "pt":
        model.vision.restore_tower()
        model.save_pretrained(run, tokenizer=tokenizer, with_predictors=False)
        return
    config = {k: v for k, v in build_settings(recipe, stage).items() if k not in ("dtype", "attn_implementation")}
    m = recipe.model
    save_adapter(
        run,
        model,
        tokenizer,
        llm=_absolute(m.llm),
        encoder=_absolute(m.encoder),
        config=config,
        recipe_hash=recipe.hash(),
    )


def _absolute(model: str) -> str:
    """With local paths in full, so that the adapter finds them from anywhere; a hub id as it is."""
    return EncoderName.parse(model).absolute()
