"""What a run would do, from everything but the models: data, steps, targets and their cost, an estimate of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from olavlm.cache import CacheError, Dataset
from olavlm.cache.images import redacted
from olavlm.student.adapter import whole_model
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.data.encoder_features import check_encoder_features
from olavlm.student.data.samples import prompt_turns
from olavlm.student.data.targets import CachedTargets, tokens_without_losses
from olavlm.student.errors import ModelError, RecipeError, TargetsError
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.processes import Process
from olavlm.student.text.conversation import IGNORE_INDEX, encode, load_tokenizer
from olavlm.student.tokens import TaskSpec
from olavlm.student.training.loop import Schedule
from olavlm.student.training.memory import BatchShape, MemoryEstimate, estimate_memory
from olavlm.student.training.metrics import check_trackers
from olavlm.student.training.parallel import launched_with
from olavlm.student.training.trainer import check_inputs, open_data

from .cache_cost import Load, cost_lines

SAMPLES_MEASURED = 500
"""Spread over the dataset, to learn how long texts are."""


def dry_run(recipe: Recipe, stage: Stage) -> None:
    """Check what can be checked without a model, and print the plan of one stage.

    Raises:
        StudentError, CacheError: what would stop the run before it loads a model.
    """
    check_trackers(recipe.train.trackers)
    dataset, roots = open_data(recipe)
    check_inputs(recipe, stage, dataset, roots)
    process = Process.launched()
    processes, say = process.count, process.say
    with_images = int(dataset.has_image().true_count)
    say(f"{stage}: {len(dataset)} samples, {with_images} with an image, {len(dataset.images())} distinct images")
    global_batch = recipe.train.batch_size * recipe.train.accumulation * processes
    steps = Schedule(recipe, math.ceil(len(dataset) / global_batch)).total_steps
    count = "one process" if processes == 1 else f"{processes} processes"
    say(f"{stage} with {count}: global batch {global_batch}, {steps} steps")
    if recipe.data.encoder_features is not None:
        group = check_encoder_features(recipe, dataset, stage)
        _, tokens, width = group.shape
        say(
            f"encoder: not run; {tokens} x {width} {group.layout.dtype} an image from {redacted(str(group.folder))}, "
            f"{group.layout.row_bytes / 1e6:.3f} MB each, {with_images * group.layout.row_bytes / 1e9:.3f} GB an epoch"
        )
    if recipe.distils(stage) or recipe.fuses:
        where = redacted(recipe.targets.store) if recipe.targets.source == "cache" else "teachers in the loop"
        for name in recipe.task_order:
            task = recipe.tasks[name]
            how = f"layers {task.layers}, weight {task.weight}, targets" if not recipe.fuses else "fused, features"
            say(f"{name}: {how} from {where}")
    if process.is_main:
        if (recipe.distils(stage) or recipe.fuses) and with_images:
            share = with_images / len(dataset)
            load = Load(round(steps * global_batch * share), len(dataset.images()), global_batch, share, processes)
            print("\n".join(cost_lines(recipe, dataset, load)), flush=True)
        print("\n".join(memory_lines(recipe, stage, dataset)), flush=True)
    say(f"result: {recipe.train.output_dir}")


def memory_lines(recipe: Recipe, stage: Stage, dataset: Dataset) -> Iterator[str]:
    """The estimate of memory as text, or why there is none."""
    distil = recipe.distils(stage)
    try:
        specs, fused = ([], fused_shapes(recipe)) if recipe.fuses else (task_shapes(recipe, distil), [])
        start = recipe.init.from_
        if start is not None and Path(start).is_dir() and (whole := whole_model(start)):
            tokenizer = load_tokenizer(whole)
        else:
            tokenizer = load_tokenizer(recipe.model.llm, recipe.model.chat_template)
        shape = batch_shape(recipe, dataset, tokenizer)
        common = {
            "vocabulary": 1 + max(tokenizer.get_vocab().values()),
            "distil": distil,
            "fused": fused,
            "processes": Process.launched().count,
            "sharded": launched_with("FSDP"),
        }
        estimates = {
            on: estimate_memory(recipe, stage, specs, shape, gradient_checkpointing=on, **common)
            for on in (False, True)
        }
    except (ModelError, TargetsError, CacheError) as e:
        yield f"memory: no estimate: {e}"
        return
    yield (
        f"memory of a device, estimated for {shape.samples} samples of {shape.text_tokens} tokens of text and an image:"
    )
    yield from _table(
        estimates[recipe.train.gradient_checkpointing], estimates[not recipe.train.gradient_checkpointing]
    )
    if recipe.targets.source == "online" and (distil or recipe.fuses):
        yield "  and the teachers in the loop, which are not counted"


def _table(own: MemoryEstimate, other: MemoryEstimate) -> Iterator[str]:
    without = own.activations < other.activations
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "targets", "total"):
        title = f"  of which {name}" if name in ("logits", "targets") else name
        line = f"  {title:<20}{_size(getattr(own, name)):>10}"
        if name in ("activations", "total"):
            line += f"  ({_size(getattr(other, name))} with{'out' if without else ''} gradient checkpointing)"
        yield line


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def task_shapes(recipe: Recipe, distil: bool) -> list[TaskSpec]:
    """The tasks with the shapes of the store's features; none where there is no store and nothing is distilled.

    TargetsError or CacheError with distillation and no store: what teachers in the loop give is known once they are
    loaded. Without it the few task tokens are all that is left out.
    """
    if not recipe.tasks:
        return []
    if recipe.targets.store is None and distil:
        raise TargetsError("the shapes of the targets are not known without a store")
    try:
        return CachedTargets(recipe).specs if distil else tokens_without_losses(recipe)
    except (CacheError, RecipeError):
        if distil:
            raise
        return []


def fused_shapes(recipe: Recipe) -> list[FusedTeacher]:
    """The teachers of a fusion baseline, by the store's cards; TargetsError or CacheError without."""
    if recipe.targets.store is None:
        raise TargetsError("the shapes of the teachers' features are not known without a store")
    cards = CachedTargets(recipe).cards
    return [FusedTeacher.of(name, cards[name]) for name in recipe.task_order]


def batch_shape(recipe: Recipe, dataset: Dataset, tokenizer: object) -> BatchShape:
    """The longest text of some samples, and how much of a text is supervised on average."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLES_MEASURED, len(dataset))).round().astype(int))
    samples = [dataset[int(i)] for i in chosen]
    limit = recipe.model.max_length
    texts = [encode(tokenizer, prompt_turns(s), recipe.model.template, limit, s.id) for s in samples]
    supervised = [sum(label != IGNORE_INDEX for label in text["labels"]) for text in texts]
    return BatchShape(
        samples=recipe.train.batch_size,
        text_tokens=max(len(text["input_ids"]) for text in texts),
        supervised_tokens=math.ceil(sum(supervised) / len(supervised)),
        global_batch=recipe.train.batch_size * recipe.train.accumulation * Process.launched().count,
    )
