"""Which parts of the model each stage trains.

Source: arXiv 2412.09585, tables 2, 4 and 6. The vision encoder is frozen throughout: of vpt the paper says that the
whole model trains, but its public code leaves the encoder out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from olavlm.student.choices import Stage
from olavlm.student.errors import RecipeError
from olavlm.student.lora import lora_parameters
from olavlm.student.model import OlaVLM

ADAPTER = ("projector", "task_tokens", "predictors", "logit_scales")
"""Parts of the model beside its two base models: all that PT trains and all that its checkpoint holds."""

TRAINED: dict[Stage, tuple[str, ...]] = {
    "pt": ADAPTER,
    "vpt": ("llm", "projector"),
    "ift": ("llm", "projector"),
}
_PARTS = ("vision", "projector", "task_tokens", "llm", "predictors", "logit_scales")


@dataclass(frozen=True)
class PartRow:
    """A row of the table that a run prints at its start."""

    part: str
    parameters: int
    trainable: int

    @classmethod
    def of(cls, part: str, parameters: list[nn.Parameter]) -> PartRow:
        counts = [(p.numel(), p.requires_grad) for p in parameters]
        return cls(part, sum(count for count, _ in counts), sum(count for count, trains in counts if trains))


def trains_llm(stage: Stage) -> bool:
    """Whether a stage trains the language model: the stages in which LoRA can take its place."""
    return "llm" in TRAINED[stage]


def apply_stage(model: OlaVLM, stage: Stage, *, freeze_tokens: bool = True, distil: bool = False) -> list[PartRow]:
    """Sets what trains and the train or evaluation mode of each part; returns the table.

    Of a language model with LoRA updates those alone train; they are a row of their own.

    Everything but the vision encoder is in training mode, a frozen LLM too: gradient checkpointing works only there.

    Args:
        stage: pt, vpt or ift.
        freeze_tokens: False also trains the task tokens in vpt and ift. PT always trains them.
        distil: True also trains predictors and logit scales in vpt and ift (embedding losses in every stage).

    Raises:
        RecipeError: an unknown stage.
    """
    if stage not in TRAINED:
        raise RecipeError(f"stage {stage!r} is unknown; choose one of: {', '.join(TRAINED)}")
    trained = set(TRAINED[stage])
    if not freeze_tokens:
        trained.add("task_tokens")
    if distil:
        trained |= {"predictors", "logit_scales"}
    model.train()
    rows = []
    for part in _PARTS:
        module = getattr(model, part).requires_grad_(part in trained)
        updates = lora_parameters(module) if part == "llm" else {}
        own = [parameter for name, parameter in module.named_parameters() if name not in updates]
        for parameter in own if updates else ():
            parameter.requires_grad_(False)
        rows.append(PartRow.of(part, own))
        if updates:
            rows.append(PartRow.of("lora", list(updates.values())))
    return rows
