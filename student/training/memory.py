"""How much memory a stage needs on each device, before anything is loaded: from configs alone.

The model is built of tensors without content (PyTorch's fake tensors), and one micro-batch goes forward and backward
through it while the sizes of all that is alive are added up. It is an estimate: of what the allocator wastes, of the
device's own context (about 0.5 GB), of communication buffers other than DDP's, and of teachers in the loop it knows
nothing, and the attention kernel of another device keeps other things.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from transformers import AutoConfig, AutoModelForCausalLM

from olavlm.student.adapter import whole_model
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.data.collator import longest_sequence
from olavlm.student.decoder import checkpoint_activations
from olavlm.student.errors import ModelError
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.loading import DTYPES, load_errors
from olavlm.student.lora import add_lora
from olavlm.student.losses.embedding import embedding_loss_sums
from olavlm.student.losses.text import chunk_rows
from olavlm.student.model import OlaVLM, OlaVLMConfig
from olavlm.student.placement import Placement, place
from olavlm.student.stages import apply_stage, trains_llm
from olavlm.student.text.conversation import IGNORE_INDEX
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.encoders import VisionEncoder, load_encoder_config, load_image_transform
from olavlm.student.vision.image_transform import ImageTransform

from .live_bytes import LiveBytes


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch that is expected."""

    samples: int
    text_tokens: int
    """Of the longest sample, `<image>` included, what it inserts excluded."""
    supervised_tokens: int
    """Of a sample, on average."""
    global_batch: int
    """Samples of an optimizer step: the targets of all are on every device."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: int
    gradients: int
    """Twice the gradients themselves where several processes exchange them in buckets."""
    optimizer: int
    activations: int
    """The most that a micro-batch keeps alive beside the three above, logits and targets included."""
    logits: int
    """Part of the activations: vocabulary logits that there are at once, their float32 copy and their gradient."""
    targets: int
    """Part of the activations: teacher features of the global batch; for fusion, those of the device's share of it."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    recipe: Recipe,
    stage: Stage,
    specs: Sequence[TaskSpec],
    batch: BatchShape,
    *,
    vocabulary: int,
    distil: bool,
    fused: Sequence[FusedTeacher] = (),
    processes: int = 1,
    sharded: bool = False,
    gradient_checkpointing: bool | None = None,
) -> MemoryEstimate:
    """The memory of a stage on each device.

    Args:
        specs: the tasks, with their shapes; without layers where there are no losses.
        vocabulary: ids of the tokenizer; the LLM has at least as many rows.
        distil: whether the stage has embedding losses.
        fused: teachers of a fusion baseline.
        processes: devices that share the work.
        sharded: whether they share weights, gradients and optimizer state too (FSDP, ZeRO-3).
        gradient_checkpointing: instead of the recipe's.

    Raises:
        ModelError: a config that cannot be read.
        RecipeError: settings that make no model.
    """
    config, transform = _config(recipe, specs, fused, distil)
    checkpointing = recipe.train.gradient_checkpointing if gradient_checkpointing is None else gradient_checkpointing
    model = empty_model(recipe, stage, config, vocabulary=vocabulary, distil=distil)
    if recipe.data.encoder_features is not None:
        model.vision.set_tower_aside(keep=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, gradients = _bytes(model.parameters()), _bytes(trained)
    if checkpointing:
        checkpoint_activations(model.llm)
    try:
        placement = _placement(model, batch, recipe)
        with FakeTensorMode() as fake:
            _make_fake(model)
            activations = _step_peak(model, recipe, batch, transform, placement.each(fake.from_tensor))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as e:
        raise ModelError(f"{recipe.model.llm}: what it computes depends on what its tensors hold ({e})") from None
    share = processes if sharded else 1
    buckets = 2 if processes > 1 and not sharded else 1
    vocab_size = max(vocabulary, config.text_config.get_text_config().vocab_size)
    rows = min(batch.samples * batch.supervised_tokens, chunk_rows(vocab_size))
    logit_bytes = torch.finfo(_compute_dtype(recipe)).bits // 8
    return MemoryEstimate(
        weights=weights // share,
        gradients=buckets * gradients // share,
        optimizer=2 * gradients // share,  # AdamW's two moments, in the parameters' dtype
        activations=activations,
        logits=rows * vocab_size * 2 * (logit_bytes + 4),
        targets=_feature_bytes(specs, batch.global_batch)
        if distil
        else _feature_bytes(fused, _own_rows(recipe, batch)),
    )


def empty_model(recipe: Recipe, stage: Stage, config: OlaVLMConfig, *, vocabulary: int, distil: bool) -> OlaVLM:
    """The stage's model, ready to train, on the meta device."""
    dtype = DTYPES[recipe.model.dtype]
    config.vision_config.dtype = dtype
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        vision = VisionEncoder.from_config(config.vision_config, config.select_layer, config.image_size)
        model = OlaVLM(config, llm=llm, vision=vision)
        if vocabulary > llm.get_input_embeddings().num_embeddings:
            llm.resize_token_embeddings(vocabulary, mean_resizing=False)
        if recipe.lora.rank is not None and trains_llm(stage):
            add_lora(llm, recipe.lora)
    model.head_is_plain = True
    apply_stage(model, stage, freeze_tokens=recipe.train.freeze_tokens, distil=distil)
    return model


def _make_fake(model: nn.Module) -> None:
    """Gives every parameter and buffer of the meta device a place on a CPU that does not exist; ties stay."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = made.get(id(parameter))
                if fake is None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fake = made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _config(
    recipe: Recipe, specs: Sequence[TaskSpec], fused: Sequence[FusedTeacher], distil: bool
) -> tuple[OlaVLMConfig, ImageTransform]:
    m = recipe.model
    there = recipe.init.from_ is not None and Path(recipe.init.from_).is_dir()  # or an earlier stage has yet to run
    if whole := whole_model(recipe.init.from_) if there else None:
        with load_errors(whole):
            base = OlaVLMConfig.from_pretrained(whole)
        text_config, vision_config, transform = base.text_config, base.vision_config, base.image_transform
    else:
        with load_errors(m.llm):
            text_config = AutoConfig.from_pretrained(m.llm)
        vision_config, transform = load_encoder_config(m.encoder), load_image_transform(m.encoder)
    text_config._attn_implementation = m.attention or "sdpa"
    config = OlaVLMConfig(
        text_config=text_config,
        vision_config=vision_config,
        tasks=list(specs),
        num_task_tokens=m.num_task_tokens,
        with_predictors=distil,
        gen_query=m.gen_query,
        key_blocks=m.key_blocks,
        include_answer=m.include_answer,
        fusion=m.fusion,
        fused_teachers=list(fused),
        select_layer=m.select_layer,
        image_size=transform.size,
    )
    return config, transform


def _step_peak(
    model: OlaVLM, recipe: Recipe, shape: BatchShape, transform: ImageTransform, placement: Placement
) -> int:
    """Most bytes alive at once in one forward and backward, beyond weights and gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    b, length = shape.samples, shape.text_tokens
    with LiveBytes() as live:
        ids = torch.zeros(b, length, dtype=torch.long)
        if recipe.data.encoder_features is None:
            pictures = torch.zeros(b, 3, transform.size, transform.size)
        else:
            pictures = torch.zeros(b, model.vision.num_tokens, model.vision.width, dtype=torch.float16)
        targets = {t.name: torch.empty(shape.global_batch, t.tokens, t.dim, dtype=torch.float16) for t in model.tasks}
        rows = _own_rows(recipe, shape)
        features = [torch.empty(rows, t.tokens, t.dim, dtype=torch.float16) for t in model.fused_teachers]
        autocast = torch.autocast("cpu", torch.bfloat16) if recipe.train.mixed_precision == "bf16" else nullcontext()
        with autocast:
            pixels, given = (pictures, None) if model.vision.tower is not None else (None, pictures)
            of_teachers = {t.name: values[:b] for t, values in zip(model.fused_teachers, features, strict=True)}
            output = model(
                ids,
                labels=ids,
                pixel_values=pixels,
                image_features=given,
                teacher_features=of_teachers,
                placement=placement,
            )
            loss, predictions = output.text_loss_sum, output.predictions
            for task in model.tasks if predictions else ():
                of_layers = [predictions.pop(f"{task.name}/{layer}") for layer in task.layers]
                loss = loss + _embedding_loss(of_layers, targets[task.name], model.logit_scales[task.name])
        del output
        loss.backward()
    return live.peak


def _embedding_loss(predictions: list[torch.Tensor], targets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    b, m = len(predictions[0]), len(targets)
    valid, labels = torch.ones(b, dtype=torch.bool), torch.zeros(b, dtype=torch.long)
    sums = embedding_loss_sums(
        predictions, targets, labels, valid, torch.ones(m, dtype=torch.bool), scale, overwrite=True
    )
    return torch.stack(sums).sum()


def _placement(model: OlaVLM, shape: BatchShape, recipe: Recipe) -> Placement:
    """The placement of samples that all have an image ahead of their text, whose end is supervised."""
    ids = torch.full((shape.samples, shape.text_tokens), model.config.image_token_id + 1)
    ids[:, 0] = model.config.image_token_id
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -shape.supervised_tokens :] = 0
    return place(ids, torch.ones_like(ids), labels, model.inserted, longest_sequence(recipe, model))


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.mixed_precision == "bf16" else DTYPES[recipe.model.dtype]


def _own_rows(recipe: Recipe, batch: BatchShape) -> int:
    """Samples of an optimizer step on one device: all their features are there at once."""
    return batch.samples * recipe.train.accumulation


def _feature_bytes(teachers: Sequence[TaskSpec | FusedTeacher], rows: int) -> int:
    """In float16, as stores keep them by default."""
    return rows * sum(teacher.tokens * teacher.dim * 2 for teacher in teachers)


def _bytes(parameters: Any) -> int:
    """Bytes of distinct parameters: tied ones count once."""
    distinct: dict[int, nn.Parameter] = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in distinct.values())
