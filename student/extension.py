"""A whole model as the start of another: its language model, encoder and projector, under tasks of the recipe's own.

    extend(OlaVLM.from_pretrained("llava"), tasks, num_task_tokens=8)

So a stock LLaVA, or any finetuned model without tasks, is distilled into like base checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from olavlm.student.errors import RecipeError
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.tokens import TaskSpec

_KEPT = (
    "image_token_id",
    "select_layer",
    "template",
    "geometry",
    "image_size",
    "image_mean",
    "image_std",
    "image_interpolation",
    "max_sequence_length",
)


def extend(base: OlaVLM, tasks: Sequence[TaskSpec], **config: Any) -> OlaVLM:
    """A model on the parts of `base`, which it shares with it; task tokens and predictors start anew.

    Args:
        tasks: what is distilled, in the order of insertion.
        config: fields of `OlaVLMConfig` in place of the base's.

    Raises:
        RecipeError: the base has tasks already, or another setting that cannot be used.
    """
    if base.tasks:
        names = ", ".join(task.name for task in base.tasks)
        raise RecipeError(f"the model to start from has tasks already ({names}); start from one without, or from pt's")
    kept = {name: getattr(base.config, name) for name in _KEPT}
    model = OlaVLM(
        OlaVLMConfig(
            text_config=base.llm.config,
            vision_config=base.vision.tower.config,
            tasks=list(tasks),
            **kept | config,
        ),
        llm=base.llm,
        vision=base.vision,
    )
    model.projector.load_state_dict(base.projector.state_dict())
    model.head_is_plain, model.tokenizer = base.head_is_plain, base.tokenizer
    return model
