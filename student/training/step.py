"""One optimizer step: totals and targets of the whole global batch first, then its micro-batches, then the update.

What the losses are divided by, and the targets that serve as negatives, are those of the whole global batch and known
before the first backward, so that any split of it over processes and micro-batches gives the same gradients.
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from olavlm.student.config import Recipe
from olavlm.student.data.batches import MicroBatch
from olavlm.student.data.encoder_features import on_device
from olavlm.student.data.targets import TargetSource
from olavlm.student.errors import TrainingError
from olavlm.student.losses.scaled_features import ScaledFeatures, joined
from olavlm.student.task import Batch, BatchTotals, DistillTask

from .parallel import Replicated

NAMED_SAMPLES = 32  # in the message of a run that stops on a non-finite loss


class OptimizerStep:
    """A function of the step's micro-batches on this process; gives the whole batch's metrics."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        parallel: Replicated,
        source: TargetSource | None,
        task: DistillTask,
    ) -> None:
        self.recipe, self.accelerator, self.parallel = recipe, accelerator, parallel
        self.source, self.task = source, task

    def __call__(self, step: int, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """One optimizer step on this process's micro-batches; returns the whole batch's metrics.

        Raises:
            TrainingError: a loss that is not finite, or an embedding loss that is zero; nothing is updated then.
        """
        accelerator = self.accelerator
        torch.manual_seed(self.recipe.train.seed + step)  # the same noise, if a model has any, after a resume
        pairs = [self._to_device(m) for m in micro_batches]
        micro_batches, prepared = [micro for micro, _ in pairs], [batch for _, batch in pairs]
        totals = self._totals(micro_batches, prepared)
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
        reduced = accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").tolist()
        values = dict(zip(names, reduced, strict=True))
        self._check(step, values, totals, micro_batches)
        if self.recipe.train.max_grad_norm is not None:
            values["grad_norm"] = self.parallel.clip_gradients(self.recipe.train.max_grad_norm)
        self.parallel.update()
        return {
            **values,
            **{name: float(value) for name, value in scales.items()},
            "supervised_tokens": totals.supervised_tokens,
            **{f"valid/{name}": count for name, count in totals.valid_rows.items()},
            "bad_images": self._bad_images,
        }

    def _to_device(self, micro: MicroBatch) -> tuple[MicroBatch, Batch]:
        """The micro-batch on the device; and itself, less the samples that turned out to lack features to be fused."""
        device = self.accelerator.device
        features, valid = {}, {}
        if self.source is not None:
            features, valid = self.source.finish(micro.targets, device)
        if self.recipe.fuses:
            has_all = torch.stack(list(valid.values())).all(dim=0).cpu()
            # To answer from an image that the teachers did not see would teach to do without them.
            micro = micro.without(torch.tensor([image is not None for image in micro.images]) & ~has_all)
        batch = Batch(
            **{
                name: tensor.to(device, non_blocking=True)
                for name in ("input_ids", "labels", "attention_mask", "pixel_values")
                if (tensor := getattr(micro, name)) is not None
            }
        )
        if micro.encoder_features is not None:
            batch["image_features"] = on_device(micro.encoder_features, device)
        if self.recipe.fuses:
            batch["teacher_features"] = {
                name: (values.float() if isinstance(values, ScaledFeatures) else values).masked_fill(
                    ~valid[name][:, None, None], 0
                )
                for name, values in features.items()
            }
        elif self.source is not None:
            complete = micro.complete.to(device)
            batch["targets"] = features
            batch["valid"] = {name: rows & complete for name, rows in valid.items()}
        return micro, batch

    def _totals(self, micro_batches: list[MicroBatch], prepared: list[Batch]) -> BatchTotals:
        """Counts and targets of the whole batch, over micro-batches and processes."""
        accelerator = self.accelerator
        names = [task.name for task in self.task.tasks]
        counts = [sum(m.supervised_tokens for m in micro_batches), sum(len(m.bad_images) for m in micro_batches)]
        counts += [sum(int(b["valid"][name].sum()) for b in prepared) for name in names]
        device = accelerator.device
        reduced = accelerator.reduce(torch.tensor(counts, dtype=torch.long, device=device), reduction="sum").tolist()
        tokens, self._bad_images, *valid = map(int, reduced)
        totals = BatchTotals(supervised_tokens=tokens, valid_rows=dict(zip(names, valid, strict=True)))
        for name in names:
            # No gradient flows to targets, so gathering those of the whole batch is exact.
            totals.targets[name] = joined([b["targets"].pop(name) for b in prepared], accelerator.gather)
            totals.targets_valid[name] = accelerator.gather(torch.cat([b["valid"][name] for b in prepared]))
        totals.offset = accelerator.process_index * sum(len(b["input_ids"]) for b in prepared)
        return totals

    def _check(self, step: int, values: dict[str, float], totals: BatchTotals, micro_batches: list[MicroBatch]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            ids = [i for m in micro_batches for i in m.ids]
            more = f" and {len(ids) - NAMED_SAMPLES} more" if len(ids) > NAMED_SAMPLES else ""
            raise TrainingError(
                f"step {step + 1}: {bad[0]} is {values[bad[0]]}; samples of process {self.accelerator.process_index}: "
                f"{', '.join(ids[:NAMED_SAMPLES])}{more}"
            )
        for name, value in values.items():
            _, _, rest = name.partition("loss/")
            if rest.endswith("/smooth_l1") and value == 0.0 and totals.valid_rows[rest.partition("/")[0]]:
                raise TrainingError(
                    f"step {step + 1}: {name} is exactly zero though the batch has valid targets; an embedding loss "
                    "that trains nothing is a fault, not a success"
                )
