"""Training of probes, from their settings to a run folder.

    RUN/recipe.yaml versions.json          the resolved settings, and versions
    RUN/metrics.jsonl                      loss/total, loss/{task}/{layer}/smooth_l1, cosine/{task}/{layer}
    RUN/checkpoints/step-000200/           what a run that stopped is resumed from
    RUN/train_images.parquet               the images that probes have seen
    RUN/probes.safetensors probes.json     the result (`bank.py`)

A micro-batch is one forward of the frozen model without a graph, at which the states of all layers are taken, and then
forward and backward of each probe on its own, so that the graph of one probe is in memory at a time. Nothing joins the
probes: each learns what it would learn alone.

Source: arXiv 2412.09585, probing experiments; hyper-parameters as in the public code.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import Accelerator

from olavlm.cache import Dataset, ImageRoots
from olavlm.student.config import TrainConfig
from olavlm.student.data.batches import batches
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.data.sampler import GlobalBatchSampler
from olavlm.student.data.samples import check_images
from olavlm.student.errors import RecipeError, TrainingError
from olavlm.student.loading import DTYPES
from olavlm.student.losses.fused import smooth_l1_and_cosines
from olavlm.student.model import OlaVLM
from olavlm.student.processes import Process
from olavlm.student.run_files import write_json
from olavlm.student.tokens import TaskSpec
from olavlm.student.training.checkpoint import check_agreed, check_files, latest_step, load_trained, save_step, writing
from olavlm.student.training.identity import features_digest, start_digest
from olavlm.student.training.loop import OnStep, Schedule, StepLoop
from olavlm.student.training.metrics import open_trackers
from olavlm.student.training.parallel import Parallel, launched_with, make_optimizer
from olavlm.student.training.step import NAMED_SAMPLES

from .bank import BYTES_A_PARAMETER, ProbeBank, ProbedTeacher, ProbeRun
from .model import TURNS, chosen_layers, load_probed, probe_collator, token_layout
from .rows import ProbeRows
from .settings import ProbeSettings

TRAIN_IMAGES = "train_images.parquet"


class WholeProbes(Parallel):
    """The probes on each process, and their optimizer. Gradients are exchanged once a step, after the last backward."""

    def __init__(self, bank: ProbeBank, accelerator: Accelerator, settings: TrainConfig) -> None:
        self.model = self.module = bank.to(accelerator.device)
        self.accelerator = accelerator
        self.optimizer = make_optimizer(bank, settings, accelerator.device)

    def finish_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                torch.distributed.all_reduce(parameter.grad)


def train_probes(settings: ProbeSettings, versions: dict[str, str], on_step: OnStep = lambda *_: None) -> Path:
    """Train the probes; returns the run folder. Resumes what an earlier call with the same settings left unfinished.

    Raises:
        StudentError, CacheError: what the user can mend, before the model is loaded where that is possible.
        TrainingError: a loss that is not finite, a run folder that holds more steps than the settings, a loader that
            died, images that are gone, a checkpoint that could not be written, or a stop by SIGINT or SIGTERM (after a
            checkpoint).
    """
    if launched_with("FSDP") or launched_with("DEEPSPEED"):
        raise RecipeError("probes are whole on each process: launch without the settings of FSDP or DeepSpeed")
    dataset, roots = Dataset(settings.data.files).asking(TURNS), ImageRoots(settings.data.images)
    rows = ProbeRows(settings.data, settings.tasks)
    rows.check_covers(dataset)
    check_images(dataset, roots)
    accelerator = Process.launched().join(settings.mixed_precision)
    model, notes = load_probed(settings.model, dtype=DTYPES[settings.dtype], template=settings.template)
    layers = chosen_layers(model, settings.layers)
    layout = token_layout(model)
    tasks = [TaskSpec(spec.name, spec.tokens, spec.dim, layers) for spec in rows.specs]
    rows.feed(model.fused_teachers, dataset)
    start = start_digest(settings.model)
    run = Path(settings.output)
    identity = {
        "recipe": settings.identity(layers),
        "start": start,
        "samples": dataset.digest(),
        "features": features_digest(rows.cards),
    }
    sampler = GlobalBatchSampler(np.ones(len(dataset), bool), settings.batch_size, settings.seed)
    schedule = Schedule(settings, len(sampler))
    resumed_from, first_step = latest_step(run, identity)
    check_agreed(first_step, run, accelerator)
    schedule.check_not_passed(first_step, run, "--max-steps")
    bank = ProbeBank(tasks, layout["width"], settings.seed)
    if resumed_from is not None:
        check_files(resumed_from)
        load_trained(resumed_from, bank)
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        content = {"probe": settings.to_dict() | {"layers": list(layers)}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        write_json(run / "versions.json", versions)
        pq.write_table(pa.table({"image": dataset.images()}), run / TRAIN_IMAGES)
        for line in (*notes, *describe(bank, layout)):
            print(line, flush=True)
    model.to(accelerator.device)
    parallel = WholeProbes(bank, accelerator, settings.train)
    if resumed_from is not None:
        parallel.load_optimizer(resumed_from)
        accelerator.print(f"resumed from step {first_step}")
    loop = StepLoop(
        schedule,
        first_step,
        accelerator,
        parallel.optimizer,
        open_trackers([], run, first_step, {}) if accelerator.is_main_process else [],
        save=lambda step: save_step(run, step, parallel, identity, settings.keep),
        save_every=settings.save_every,
    )
    loading = batches(
        probe_collator(model, dataset, roots, rows),
        sampler,
        loop.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=settings.train.accumulation,
        workers=settings.workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    def after_step(step: int, values: dict[str, float]) -> None:
        if accelerator.is_main_process:
            on_step(step, schedule.total_steps, values)

    loop.run(loading, ProbeStep(model, rows, parallel), after_step)
    if accelerator.is_main_process:
        result = ProbeRun(
            model=str(Path(settings.model).absolute()) if Path(settings.model).exists() else settings.model,
            weights=start,
            template=settings.template,
            dtype=settings.dtype,
            layout=layout,
            tasks=tasks,
            teachers={name: ProbedTeacher(key, rows.cards[name]) for name, key in settings.tasks.items()},
            seed=settings.seed,
            steps=schedule.total_steps,
        )
        with writing(f"the result in {run}", run):
            result.save(run, bank)
    accelerator.wait_for_everyone()
    accelerator.print(f"probes finished: {run}")
    accelerator.free_memory()
    return run


def describe(bank: ProbeBank, layout: dict[str, Any]) -> list[str]:
    """What is trained and what it takes, line by line."""
    tokens = " + ".join(f"{count} {name}" for name, count in layout["task_tokens"])
    lines = [
        f"sequences: {layout['template']}, {layout['geometry']} frame of {layout['image_size']} px, "
        f"{layout['image_tokens']} image tokens" + (f" + {tokens}" if tokens else "")
    ]
    sizes = bank.sizes()
    for task in bank.tasks:
        count = len(task.layers)
        lines.append(f"{task.name}: {count} probes of {sizes[task.name]:,} parameters, {task.tokens} x {task.dim}")
    total = sum(sizes[task.name] * len(task.layers) for task in bank.tasks)
    lines.append(
        f"in all {total:,} parameters: {total * BYTES_A_PARAMETER / 1e9:.2f} GB with gradients and AdamW's state; "
        "--layers or one task at a time takes less, and gives the same probes"
    )
    return lines


class ProbeStep:
    """One optimizer step: a function of the step's micro-batches on this process that gives the whole batch's metrics.

    The loss is the sum over tasks and layers of smooth-L1, each the mean over the whole batch's valid images.
    """

    def __init__(self, model: OlaVLM, rows: ProbeRows, parallel: WholeProbes) -> None:
        self.model, self.rows, self.parallel = model, rows, parallel
        self.terms = [(task.name, layer) for task in parallel.model.tasks for layer in task.layers]

    def __call__(self, step: int, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Raises TrainingError for a loss that is not finite; nothing is updated then."""
        accelerator, bank = self.parallel.accelerator, self.parallel.model
        prepared = [self.rows.on_device(micro, accelerator.device) for micro in micro_batches]
        names = [task.name for task in bank.tasks]
        counts = [sum(int(batch.valid[name].sum()) for batch in prepared) for name in names]
        counts.append(sum(len(micro.bad_images) for micro in micro_batches))
        counts = torch.tensor(counts, dtype=torch.long, device=accelerator.device)
        counted = accelerator.reduce(counts, reduction="sum").tolist()
        valid = dict(zip(names, counted, strict=False))
        sums = torch.zeros(2, len(self.terms), dtype=torch.float64, device=accelerator.device)
        for batch in prepared:
            with accelerator.autocast():
                states, mask = self.model.states(bank.layers, **batch.inputs)
            for place, (task, layer) in enumerate(self.terms):
                with accelerator.autocast():
                    prediction = bank(task, layer, states[layer], mask)
                own = torch.arange(len(prediction), device=prediction.device)
                usable = batch.valid[task]
                smooth_l1, cosines = smooth_l1_and_cosines(
                    [prediction], batch.targets[task], own, usable, usable, overwrite=True
                )
                loss = smooth_l1.sum() / max(1, valid[task])
                loss.backward()
                sums[0, place] += loss.detach()
                sums[1, place] += cosines[0].detach().diagonal().sum() / max(1, valid[task])  # 0 where not usable
        self.parallel.finish_gradients()
        losses, cosines = accelerator.reduce(sums, reduction="sum").tolist()
        values = {"loss/total": math.fsum(losses)}
        values |= {f"loss/{t}/{x}/smooth_l1": loss for (t, x), loss in zip(self.terms, losses, strict=True)}
        values |= {f"cosine/{t}/{x}": cosine for (t, x), cosine in zip(self.terms, cosines, strict=True)}
        self._check(step, values, micro_batches)
        self.parallel.update()
        return values | {f"valid/{name}": valid[name] for name in names} | {"bad_images": counted[-1]}

    @staticmethod
    def _check(step: int, values: dict[str, float], micro_batches: list[MicroBatch]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            ids = [i for micro in micro_batches for i in micro.ids][:NAMED_SAMPLES]
            raise TrainingError(f"step {step + 1}: {bad[0]} is {values[bad[0]]}; images: {', '.join(ids)}")
