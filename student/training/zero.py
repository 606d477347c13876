"""A model under DeepSpeed's ZeRO, where accelerate was launched with its DeepSpeed settings.

Written by DeepSpeed's documentation and never run on a GPU; `parallel.Sharded` does the same job, and is tested. What
differs from it: under bf16 the engine casts every part of the model to bfloat16 (with float32 copies in the optimizer),
and a run is resumed on the number of processes that it was saved by.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator

from olavlm.student.config import TrainConfig
from olavlm.student.errors import RecipeError
from olavlm.student.model import OlaVLM

from .parallel import Parallel, make_optimizer

TAG = "zero"
"""Folder of the engine's own files in a checkpoint."""


class Zero(Parallel):
    """A model whose gradients and optimizer state lie in parts (ZeRO 1 and 2); its weights are whole on each process.

    Raises:
        RecipeError: no accelerator; or ZeRO 3, whose gathering of weights would wait for ever for a process whose batch
            is text alone.
    """

    def __init__(self, model: OlaVLM, accelerator: Accelerator, settings: TrainConfig) -> None:
        self.model, self.accelerator = model, accelerator
        plugin = accelerator.state.deepspeed_plugin
        if plugin is None:
            raise RecipeError("accelerate runs DeepSpeed on no CPU; launch with the configuration ddp or fsdp")
        if plugin.zero_stage > 2:
            raise RecipeError(f"zero_stage is {plugin.zero_stage}: use 1 or 2, or shard the weights too with fsdp")
        plugin.deepspeed_config.update(engine_settings(settings))
        self.module, _ = accelerator.prepare(model, make_optimizer(model, settings, accelerator.device))
        self.optimizer = self.module.optimizer

    @property
    def loss_factor(self) -> int:
        return self.accelerator.num_processes  # the engine takes the mean over them

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(is_boundary=last)
        self.module.backward(loss * self.loss_factor)

    def update(self, max_norm: float | None = None) -> float | None:
        self.module.step()  # the engine clips by its own settings, and knows the norm afterwards
        if max_norm is None:
            return None
        norm = self.module.get_global_grad_norm()
        return math.nan if norm is None else float(norm)  # of a step that it skipped, for gradients that overflowed

    def trained(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found = {name: self._on_main(safe_get_full_fp32_param(p)) for name, p in trainable.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def save_optimizer(self, folder: Path) -> None:
        self.module.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load_optimizer(self, folder: Path) -> None:
        self.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)

    def gather(self) -> None:
        """The float32 copies take the place of what trained in bfloat16."""
        trained = self.trained()
        for name, parameter in self.model.named_parameters():
            if name in trained:
                parameter.data = trained[name]


def engine_settings(settings: TrainConfig) -> dict[str, int | float]:
    """What of DeepSpeed's configuration the recipe decides. Losses are divided by the whole batch already, so that
    micro-batches are added up, and none of them is scaled down."""
    return {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm or 0.0,
    }
