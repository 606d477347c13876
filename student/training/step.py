"""One optimizer step: totals and targets of the whole global batch first, then its micro-batches, then the update.

What the losses are divided by, and the targets that serve as negatives, are those of the whole global batch and known
before the first backward, so that any split of it over processes and micro-batches gives the same gradients.
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from olavlm.student.config import Recipe
from olavlm.student.data.encoder_features import on_device
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.data.targets import TargetSource
from olavlm.student.errors import TrainingError
from olavlm.student.losses.scaled_features import ScaledFeatures, joined
from olavlm.student.task import Batch, BatchTotals, DistillTask

from .copy_clock import CopyClock
from .parallel import Parallel

NAMED_SAMPLES = 32  # in the message of a run that stops on a non-finite loss


class OptimizerStep:
    """A function of the step's micro-batches on this process; gives the whole batch's metrics."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        parallel: Parallel,
        source: TargetSource | None,
        task: DistillTask,
    ) -> None:
        self.recipe, self.accelerator, self.parallel = recipe, accelerator, parallel
        self.source, self.task = source, task
        self.copy_clock = CopyClock(accelerator.device)

    def __call__(self, step: int, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """One optimizer step on this process's micro-batches; returns the whole batch's metrics.

        Raises:
            TrainingError: a loss that is not finite, an embedding loss that is zero, or a batch whose images could be
                read and that has nothing to learn from; nothing is updated then.
        """
        accelerator = self.accelerator
        # The same noise, if a model has any, after a resume, and each process's own.
        torch.manual_seed(self.recipe.train.seed + step + (accelerator.process_index << 40))
        pairs = [self._to_device(m) for m in micro_batches]
        micro_batches, prepared = [micro for micro, _ in pairs], [batch for _, batch in pairs]
        totals, counts = self._totals(micro_batches, prepared)
        sums: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(prepared):
            last = number == len(prepared) - 1
            with self.parallel.micro_batch(last), accelerator.autocast():
                losses, report = self.task.compute(self.parallel.module, batch, totals)
                self.parallel.backward(losses["loss/total"], last)
            totals.offset += len(batch["input_ids"])
            for name, value in report.items():
                if name in losses:
                    sums[name] = sums.get(name, 0.0) + value.double()
                else:
                    scales[name] = value
        self.parallel.finish_gradients()
        names = sorted(sums)
        reduced = accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum")
        # The one time that the host waits for the device: what all ranks have is fetched together.
        known = torch.cat([reduced, counts.double(), *(value.double().view(1) for value in scales.values())]).tolist()
        values = dict(zip(names, known, strict=False))
        tokens, bad_images, *valid = map(int, known[len(names) : len(names) + len(counts)])
        valid_rows = dict(zip(totals.valid_rows, valid, strict=True))
        self._check(step, values, valid_rows, micro_batches)
        if tokens == bad_images == 0:
            limit, longest = self.recipe.model.max_length, self.parallel.model.longest_sequence
            why = f"model.max_length {limit}" if longest >= limit else f"{longest} tokens, the LLM's last position,"
            remedy = "make it longer" if longest >= limit else "take an LLM with more"
            raise TrainingError(
                f"step {step + 1}: no token of the batch is supervised, for all its samples are cut at {why} before "
                f"their answers; {remedy}; samples of {self._samples(micro_batches)}"
            )
        norm = self.parallel.update(self.recipe.train.max_grad_norm)
        if norm is not None:
            values["grad_norm"] = norm
        return {
            **values,
            **dict(zip(scales, known[len(names) + len(counts) :], strict=True)),
            "supervised_tokens": tokens,
            **{f"valid/{name}": count for name, count in valid_rows.items()},
            "bad_images": bad_images,
            "h2d_ms": self.copy_clock.take(),
        }

    def _to_device(self, micro: MicroBatch) -> tuple[MicroBatch, Batch]:
        """The micro-batch on the device; and itself, less the samples that turned out to lack features to be fused."""
        device = self.accelerator.device
        features, valid = {}, {}
        if self.source is not None:
            with self.copy_clock.copies():
                loaded = {
                    name: {part: values.to(device, non_blocking=True) for part, values in parts.items()}
                    for name, parts in micro.targets.items()
                }
            features, valid = self.source.finish(loaded, device)
        if self.recipe.fuses:
            has_all = torch.stack(list(valid.values())).all(dim=0).cpu()
            # To answer from an image that the teachers did not see would teach to do without them.
            micro = micro.without(torch.tensor([image is not None for image in micro.images]) & ~has_all)
        with self.copy_clock.copies():
            batch = Batch(
                **{
                    name: tensor.to(device, non_blocking=True)
                    for name in ("input_ids", "labels", "attention_mask", "pixel_values")
                    if (tensor := getattr(micro, name)) is not None
                },
                placement=micro.placement.to(device),
            )
            complete = micro.complete.to(device, non_blocking=True)
            stored = {name: part.to(device, non_blocking=True) for name, part in (micro.encoder_features or {}).items()}
        if stored:
            batch["image_features"] = on_device(stored, device)
        if self.recipe.fuses:
            batch["teacher_features"] = {
                name: (values.float() if isinstance(values, ScaledFeatures) else values).masked_fill(
                    ~valid[name][:, None, None], 0
                )
                for name, values in features.items()
            }
        elif self.source is not None:
            batch["targets"] = features
            batch["valid"] = {name: rows & complete for name, rows in valid.items()}
        return micro, batch

    def _totals(self, micro_batches: list[MicroBatch], prepared: list[Batch]) -> tuple[BatchTotals, torch.Tensor]:
        """Counts and targets of the whole batch, over micro-batches and processes, and the counts on the device.

        These are, long: supervised tokens, bad images, and for each task its valid rows.
        """
        accelerator = self.accelerator
        names = [task.name for task in self.task.tasks]
        counts = [sum(m.supervised_tokens for m in micro_batches), sum(len(m.bad_images) for m in micro_batches)]
        valid = [torch.cat([b["valid"][name] for b in prepared]) for name in names]
        own = [torch.tensor(counts).to(accelerator.device, non_blocking=True), *(rows.sum().view(1) for rows in valid)]
        reduced = accelerator.reduce(torch.cat(own), reduction="sum")
        tokens, _, *of_tasks = reduced
        totals = BatchTotals(supervised_tokens=tokens, valid_rows=dict(zip(names, of_tasks, strict=True)))
        for name, rows in zip(names, valid, strict=True):
            # No gradient flows to targets, so gathering those of the whole batch is exact.
            totals.targets[name] = joined([b["targets"].pop(name) for b in prepared], accelerator.gather)
            totals.targets_valid[name] = accelerator.gather(rows)
        totals.offset = accelerator.process_index * sum(len(b["input_ids"]) for b in prepared)
        return totals, reduced

    def _check(
        self, step: int, values: dict[str, float], valid_rows: dict[str, int], micro_batches: list[MicroBatch]
    ) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"step {step + 1}: {bad[0]} is {values[bad[0]]}; samples of {self._samples(micro_batches)}"
            )
        for name, value in values.items():
            _, _, rest = name.partition("loss/")
            if rest.endswith("/smooth_l1") and value == 0.0 and valid_rows[rest.partition("/")[0]]:
                raise TrainingError(
                    f"step {step + 1}: {name} is exactly zero though the batch has valid targets; an embedding loss "
                    "that trains nothing is a fault, not a success"
                )

    def _samples(self, micro_batches: list[MicroBatch]) -> str:
        """Which they are, for whoever looks for one that is at fault."""
        ids = [i for m in micro_batches for i in m.ids]
        more = f" and {len(ids) - NAMED_SAMPLES} more" if len(ids) > NAMED_SAMPLES else ""
        return f"process {self.accelerator.process_index}: {', '.join(ids[:NAMED_SAMPLES])}{more}"
