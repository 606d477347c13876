"""Makes our checkpoints a model of lmms-eval: `python -m lmms_eval --model olavlm --model_args pretrained=RUN ...`.

The entry point `lmms_eval.models` in pyproject.toml names `manifest`. It is called whenever lmms-eval starts, for any
model, so that nothing else is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval is to know: the model's name, and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("olavlm", chat_class_path="olavlm.pipelines.evaluation.lmms_model.OlaVLMModel")
