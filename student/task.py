"""The training task: a batch to named losses and their total.

Source: arXiv 2412.09585; the contrastive term multiplies similarities by exp(s), as in the public code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import nn

from olavlm.student.choices import Kernels
from olavlm.student.losses.embedding import MAX_SCALE, embedding_loss_sums
from olavlm.student.losses.scaled_features import Features
from olavlm.student.tokens import TaskSpec

CONTRASTIVE_WEIGHT = 0.3


class Batch(TypedDict, total=False):
    """A micro-batch of b samples, as the collator makes it."""

    input_ids: torch.Tensor
    """long (b, L), padded on the right."""
    labels: torch.Tensor
    """long (b, L), -100 where nothing is learnt."""
    attention_mask: torch.Tensor
    """(b, L), 1 for text, 0 for padding."""
    pixel_values: torch.Tensor
    """float (b, 3, S, S); zeros, or anything, for samples without an image."""
    image_features: torch.Tensor
    """In place of `pixel_values`: float (b, tokens, width), what the base encoder gives for them."""
    teacher_features: dict[str, torch.Tensor]
    """Of a fusion baseline, for each teacher: float (b, n, D), finite."""
    targets: dict[str, Features]
    """For each task: (b, n, D); anything, NaN included, where not valid. Not needed where `BatchTotals` has them."""
    valid: dict[str, torch.Tensor]
    """For each task: bool (b,), whether the sample has an image and a target."""


@dataclass
class BatchTotals:
    """Counts of the whole optimizer batch, over ranks and accumulation steps; losses are sums divided by them."""

    supervised_tokens: int
    """Tokens that the text loss counts (`count_supervised`)."""
    valid_rows: Mapping[str, int]
    """For each task: rows with a valid target."""
    targets: Mapping[str, Features] = field(default_factory=dict)
    """For each task: (M, n, D), the targets of the whole batch; a task that is missing has those of the micro-batch."""
    targets_valid: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """For each task in `targets`: bool (M,)."""
    offset: int = 0
    """Row of `targets` that belongs to the first sample of the micro-batch."""


@dataclass(frozen=True)
class DistillTask:
    """Text loss and, for each task and layer, smooth-L1 and contrastive losses.

    total = text + sum over tasks of weight * sum over its layers of (smooth_l1 + contrastive_weight * contrastive)
    """

    tasks: Sequence[TaskSpec]
    use_contrastive: bool = True
    """Off: the term is still reported, and weighs nothing."""
    contrastive_weight: float = CONTRASTIVE_WEIGHT
    kernels: Kernels = "eager"
    """What computes the embedding losses."""

    def compute(
        self, model: nn.Module, batch: Batch, totals: BatchTotals
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Losses of a micro-batch, such that those of all micro-batches and ranks add up to the whole batch's.

        The backward leaves the gradients in the memory of the model's predictions.

        Args:
            model: an `OlaVLM`, or a wrapper with its forward.

        Returns:
            losses: scalars with a graph: `loss/text`, `loss/{task}/{layer}/smooth_l1`,
                `loss/{task}/{layer}/contrastive` (ahead of its weight), `loss/total`.
            report: detached scalars: the losses, and `scale/{task}`, the factor on the task's similarities.
        """
        names = ("input_ids", "attention_mask", "labels", "pixel_values", "image_features", "teacher_features")
        output = model(**{name: batch.get(name) for name in names})
        losses = {"loss/text": output.text_loss_sum / max(1, totals.supervised_tokens)}
        total = losses["loss/text"]
        report = {}
        for task in self.tasks:
            keys = [key for layer in task.layers if (key := f"{task.name}/{layer}") in output.predictions]
            if not keys:
                continue
            predictions, scale = [output.predictions[key] for key in keys], output.logit_scales[task.name]
            of_layers = self._layer_losses(task.name, predictions, output.complete, scale, batch, totals)
            for key, smooth_l1, contrastive in zip(keys, *of_layers, strict=True):
                losses[f"loss/{key}/smooth_l1"] = smooth_l1
                losses[f"loss/{key}/contrastive"] = contrastive
                weight = self.contrastive_weight if self.use_contrastive else 0.0
                total = total + task.weight * (smooth_l1 + weight * contrastive)
            report[f"scale/{task.name}"] = scale.detach().exp().clamp(max=MAX_SCALE)
        losses["loss/total"] = total
        return losses, {name: loss.detach() for name, loss in losses.items()} | report

    def _layer_losses(
        self,
        task: str,
        predictions: Sequence[torch.Tensor],
        complete: torch.Tensor,
        scale: torch.Tensor,
        batch: Batch,
        totals: BatchTotals,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        valid = batch["valid"][task]
        labels = torch.arange(len(valid), device=valid.device)
        if task in totals.targets:
            targets, targets_valid = totals.targets[task], totals.targets_valid[task]
            labels = labels + totals.offset
        else:
            targets, targets_valid = batch["targets"][task], valid
        smooth_l1, contrastive = embedding_loss_sums(
            predictions, targets, labels, valid & complete, targets_valid, scale, kernels=self.kernels, overwrite=True
        )
        count = max(1, totals.valid_rows[task])
        return smooth_l1 / count, contrastive / count
