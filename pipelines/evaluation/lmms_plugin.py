"""Our models of lmms-eval: `python -m lmms_eval --model olavlm --model_args pretrained=RUN ...`.

The entry point `lmms_eval.models` in pyproject.toml names `manifests`. It is called whenever lmms-eval starts, for any
model, so that nothing else is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


HERE = "olavlm.pipelines.evaluation"
CLASSES = {
    "olavlm": f"{HERE}.lmms_model.OlaVLMModel",
    "olavlm_transformers": f"{HERE}.lmms_transformers.TransformersModel",
}


def manifests() -> list[ModelManifest]:
    """What lmms-eval is to know: names, and the classes behind them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(name, chat_class_path=path) for name, path in CLASSES.items()]
