"""LoRA for the language model (arXiv 2106.09685), by peft: its weights stay as they are, and low-rank updates train.

add_lora(model.llm, recipe.lora)      # ahead of training
save_lora(model.llm, run / "lora")    # the updates alone, as `peft.PeftModel.from_pretrained` reads them
merge_lora(model.llm)                 # the updates become part of the weights; the model is an ordinary one again
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from olavlm.student.config import LoraConfig
from olavlm.student.errors import RecipeError
from olavlm.student.run_files import save_tensors

if TYPE_CHECKING:
    import peft

ADAPTER_NAME = "default"
"""What peft calls the only adapter."""
WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # of the names in peft's own files


def add_lora(llm: PreTrainedModel, settings: LoraConfig) -> None:
    """Puts an update of rank r beside each target layer, in place; at first it adds nothing.

    Updates are float32 whatever the weights are. What trains is left to `apply_stage`.

    Raises:
        RecipeError: no rank, targets that the model does not have, or no peft.
    """
    try:
        import peft
    except ImportError:
        raise RecipeError(
            "lora.rank is set, and the package peft is not installed; install it with: pip install 'olavlm[lora]'"
        ) from None
    if settings.rank is None:
        raise RecipeError("lora.rank is null; set it to train low-rank updates")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        peft.inject_adapter_in_model(config, llm, adapter_name=ADAPTER_NAME)
    except ValueError as e:
        raise RecipeError(f"lora.targets is {settings.targets}: {str(e).splitlines()[0]}") from None
    for parameter in lora_parameters(llm).values():
        parameter.data = parameter.data.float()


def lora_parameters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the updates, by name; none in a model without."""
    return {name: parameter for name, parameter in llm.named_parameters() if ".lora_" in name}


def save_lora(llm: PreTrainedModel, folder: Path) -> None:
    """Writes the updates and their settings in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        _PEFT_PREFIX + name.replace(f".{ADAPTER_NAME}.", "."): parameter.detach().cpu()
        for name, parameter in lora_parameters(llm).items()
    }
    save_tensors(weights, folder / WEIGHTS)
    config: peft.LoraConfig = llm.peft_config[ADAPTER_NAME]
    config.save_pretrained(str(folder))


@torch.no_grad()
def merge_lora(llm: PreTrainedModel) -> None:
    """Adds the updates to the weights and takes them out of the model, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, module) for name, module in llm.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, layer.get_base_layer())
    del llm.peft_config
