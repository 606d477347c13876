"""How a model is spread over the processes of a launch, and its optimizer with it.

`Replicated`: whole on each process, by accelerate's DistributedDataParallel; one process is the same without it.
`Sharded`: parameters, gradients and optimizer state cut over all processes by torch's FSDP2, where accelerate was
launched with its FSDP settings. Accelerate's own wrapping is not used: it runs on no CPU, casts what the forward
returns, and cannot leave out what must stay whole here.

Both take and give parameters and optimizer states as whole tensors, so that a checkpoint of one resumes in the other.
DeepSpeed is in `zero.py`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from olavlm.student.config import TrainConfig
from olavlm.student.decoder import decoder_blocks
from olavlm.student.errors import RecipeError
from olavlm.student.model import OlaVLM

OPTIMIZER = "optimizer.pt"


def parallelize(model: OlaVLM, accelerator: Accelerator, settings: TrainConfig) -> Parallel:
    """Spreads a model, in which what trains is marked, as the processes were launched.

    Raises:
        RecipeError: a launch that cannot train this model.
    """
    if launched_with("FSDP"):
        return Sharded(model, accelerator, settings)
    if launched_with("DEEPSPEED"):
        from .zero import Zero

        return Zero(model, accelerator, settings)
    return Replicated(model, accelerator, settings)


def launched_with(what: str) -> bool:
    """Whether the processes were launched by accelerate with these settings: FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


class Parallel:
    """A model on the processes of a launch, and the optimizer of what trains in it. The subclasses say how it lies."""

    accelerator: Accelerator
    model: nn.Module
    module: nn.Module
    """What is called: the model, or a wrapper with its forward."""
    optimizer: torch.optim.Optimizer

    @property
    def loss_factor(self) -> int:
        """What a loss is multiplied with, so that the gradients of all processes add up."""
        return 1

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch, which is the `last` of its step or not."""
        return nullcontext()

    def finish_forward(self) -> None:
        """Called after a forward that no backward follows."""

    def finish_gradients(self) -> None:
        """Called after the last backward of a step; now all processes have the gradients of the whole batch."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Run the backward pass of a micro-batch."""
        (loss * self.loss_factor).backward()

    def update(self, max_norm: float | None = None) -> float | None:
        """The optimizer's step, by the gradients that there are now; they are gone after it.

        With `max_norm` they are clipped to it first, and their norm before that is returned.
        """
        norm = None if max_norm is None else self.clip_gradients(max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def clip_gradients(self, max_norm: float) -> float:
        """Scales the gradients down to this norm if theirs is larger; returns theirs."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        parts = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
        parts = [part for part in parts if part]
        norm = get_total_norm([_whole(get_total_norm([p.grad for p in part])) for part in parts])
        for part in parts:
            clip_grads_with_norm_(part, max_norm, norm)
        return float(norm)

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that train, by name, whole, on the host of the main process; every process takes part."""
        found = {name: self._on_main(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def save_optimizer(self, folder: Path) -> None:
        """Writes the optimizer's `state_dict`, of whole tensors, from the main process; every process takes part."""
        packed = self.optimizer.state_dict()
        packed["state"] = {i: {k: self._on_main(v) for k, v in state.items()} for i, state in packed["state"].items()}
        if self.accelerator.is_main_process:
            torch.save(packed, folder / OPTIMIZER)

    def load_optimizer(self, folder: Path) -> None:
        """Reads what `save_optimizer` wrote, on any number of processes; tensors are read as they are needed."""
        packed = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parts = {i: {k: _part(v, parameters[i]) for k, v in s.items()} for i, s in packed["state"].items()}
        self.optimizer.load_state_dict({**packed, "state": parts})

    def gather(self) -> None:
        """Makes the model whole again on the host of the main process, to be saved; it trains no more."""

    def _on_main(self, tensor: torch.Tensor) -> torch.Tensor | None:
        tensor = _whole(tensor)
        return tensor.cpu() if self.accelerator.is_main_process else None


class Replicated(Parallel):
    """A model that is whole on each process; DDP takes the mean of their gradients."""

    def __init__(self, model: OlaVLM, accelerator: Accelerator, settings: TrainConfig) -> None:
        self.model, self.accelerator = model, accelerator
        self.module = accelerator.prepare(model)
        self.optimizer = make_optimizer(model, settings, accelerator.device)

    @property
    def loss_factor(self) -> int:
        return self.accelerator.num_processes

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged in a step's last backward alone."""
        return nullcontext() if last or not isinstance(self.module, DistributedDataParallel) else self.module.no_sync()


class Sharded(Parallel):
    """A model in shards. Each decoder block, the embeddings, and the rest are gathered when they are needed.

    The frozen vision encoder and the logit scales stay whole: a process whose batch is text alone does not run the
    encoder, and gathering it would wait for that process for ever; a scalar has no parts.
    """

    def __init__(self, model: OlaVLM, accelerator: Accelerator, settings: TrainConfig) -> None:
        self.model = self.module = model
        self.accelerator = accelerator  # gradients are exchanged in each backward: else they would lie whole everywhere
        plugin = FullyShardedDataParallelPlugin()  # by the environment, as the launcher left it
        if plugin.fsdp_version != 2:
            raise RecipeError(f"fsdp_version is {plugin.fsdp_version}: only version 2 can mix frozen parts and others")
        if plugin.cpu_ram_efficient_loading:
            raise RecipeError("fsdp_cpu_ram_efficient_loading is true: set it to false, every process reads the models")
        for part in (model.vision, model.logit_scales):
            part.to(accelerator.device)
        _shard(model, accelerator, plugin, settings.mixed_precision)
        self.optimizer = make_optimizer(model, settings, accelerator.device)

    def finish_forward(self) -> None:
        for module in self.model.modules():  # the outermost unit stays whole until a backward
            if isinstance(module, FSDPModule):
                module.reshard()

    def finish_gradients(self) -> None:
        for scale in self.model.logit_scales.parameters():
            if scale.grad is not None:
                torch.distributed.all_reduce(scale.grad)

    def gather(self) -> None:
        made: dict[int, nn.Parameter] = {}  # a parameter may be in two places
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in made:
                        whole = self._on_main(parameter.detach())
                        whole = torch.empty(parameter.shape, device="meta") if whole is None else whole
                        made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                    setattr(module, name, made[id(parameter)])


def _shard(model: OlaVLM, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, precision: str) -> None:
    """Cuts the model in place, unit by unit from the inside out."""
    common = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
        "ignored_params": {*model.vision.parameters(), *model.logit_scales.parameters()},
    }
    inner = {**common, "reshard_after_forward": plugin.reshard_after_forward}
    # Blocks compute in bfloat16 under autocast anyway: gathered as such they are half as large on the way.
    half = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in decoder_blocks(model.llm):
        fully_shard(block, mp_policy=policy, **inner)
    embed, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    if head is not None and head.weight is embed.weight:
        fully_shard([embed, head], **inner)
    else:
        for module in (embed, head):
            if module is not None:
                fully_shard(module, **inner)
    # Apart from the model, whose other parameters are float32 whatever the LLM's are: a unit has one type.
    fully_shard(model.llm.get_decoder(), **inner)
    fully_shard(model, **common)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are divided already; and gloo has no mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def make_optimizer(model: OlaVLM, settings: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW of what trains. Scalars are a group of their own: one update does not take whole and cut tensors."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trainable if (p.ndim == 0) is scalar] for scalar in (False, True)]
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        foreach=True if device.type == "cuda" else None,  # of cut tensors it would not by itself
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor of an optimizer state as this process keeps it."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.clone()  # the file may be gone tomorrow
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
