"""A recipe: everything a run depends on, as nested dataclasses that a YAML file sets and the command line overrides.

How files, stages and the command line make one of these is in `recipes.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from olavlm.student.choices import Fusion, Geometry, Kernels, KeyBlocks, PredictorWidth, QueryKind, Stage, TrackerName
from olavlm.student.errors import RecipeError

STAGES = ("pt", "vpt", "ift")


_NOT_THE_RESULT = (
    "output_dir", "stages", "max_steps", "save_every", "keep", "trackers", "batch_size", "accumulation",
    "pictures_every", "pictures"
)  # fmt: skip
"""Fields of `train` that a run may change when it is resumed."""


@dataclass
class ModelConfig:
    llm: str
    """Causal language model: a hub id or a local folder."""
    encoder: str
    """Base vision encoder: a hub id or a local folder, timm:MODEL or open_clip:MODEL/PRETRAINED (`encoder_name`)."""
    template: str = "llama_3"
    """Prompt template: llama_3, phi_3, vicuna_v1, plain, or chat, the tokenizer's own."""
    chat_template: str | None = None
    """Jinja file in place of the tokenizer's own chat template."""
    geometry: Geometry | None = None
    """What the base encoder sees: square (centre crop), pad, or squash (the whole, distorted). By default square in pt,
    pad after it."""
    select_layer: int = -2
    """Hidden state of the encoder that is projected."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of LLM and encoder weights. A bfloat16 LLM can be frozen (pt) but is not trained well."""
    attention: str | None = None
    """sdpa, flash_attention_2 or eager; the library's choice by default."""
    packing: bool | None = None
    """Whether the LLM is trained on a micro-batch's samples in one row, without padding, each attending to itself
    alone: the same losses, up to rounding. By default it is with SDPA and flash attention, if the LLM can."""
    max_length: int = 4096
    """Longest sequence, image and task tokens included; the rest is cut."""
    num_task_tokens: int = 8
    """N, special tokens inserted for each task; 0 for none (arXiv 2412.09585, table 5)."""
    order: list[str] = field(default_factory=lambda: ["gen", "depth", "seg"])
    """Order in which the tasks' tokens are inserted; tasks that are off are skipped."""
    fusion: Fusion = "none"
    """Baselines that feed the features of the tasks' teachers to the LLM, in training and in use, instead of distilling
    them: side by side with the encoder's (feature_concat), or behind them (token_concat); without task tokens and
    losses."""
    gen_query: QueryKind = "contextual"
    """Queries of one-token tasks: the layer's states at the task's tokens, or the raw parameter."""
    key_blocks: KeyBlocks = "sys+img+t+txt"
    """What predictors attend to (table I of the appendix)."""
    include_answer: bool = True
    """Whether the supervised answer is among those keys, as in the public code."""


@dataclass
class TaskConfig:
    layers: list[int]
    """Decoder blocks with a predictor, counted from 1."""
    weight: float = 0.5
    """Of the task's loss in the total."""
    predictor_width: PredictorWidth = "target"
    """Inner width of the predictors: the teacher's, or the LLM's."""
    teacher: str | None = None
    """Name of the teacher, such as timm:MODEL; by default the task's own."""
    recipe: str | None = None
    """Of the teacher's features, such as depth's mean4 or last; the teacher's default by default."""
    model: str | None = None
    """Teacher checkpoint, hub id or folder, for online targets; by default the one that filled the store, else the
    teacher's own."""
    key: str | None = None
    """Where the store keeps the features; by default what `olavlm-extract` calls them."""


def _paper_tasks() -> dict[str, TaskConfig]:
    return {
        "gen": TaskConfig([12, 20]),
        "depth": TaskConfig([8, 20], predictor_width="llm"),
        "seg": TaskConfig([10, 18]),
    }


@dataclass
class LossConfig:
    stages: list[Stage] = field(default_factory=lambda: ["pt"])
    """Stages with embedding losses (table 4)."""
    contrastive: bool = True
    """Whether the contrastive term counts (table V of the appendix)."""
    contrastive_weight: float = 0.3
    """Its weight beside smooth-L1."""
    kernels: Kernels = "eager"
    """What computes them: plain PyTorch, or Triton's kernels on CUDA, which no GPU has run yet."""


@dataclass
class DataConfig:
    file: str | list[str]
    """LLaVA files, .json, .jsonl or .parquet."""
    images: str | list[str]
    """Image roots, [PREFIX=]DIR|ZIP|URL."""
    fraction: float = 1.0
    """Part of the samples that is used, drawn by `train.seed`."""
    group_by_modality: bool = False
    """Whether a global batch is all image samples or all text-only ones. Micro-batches are of like lengths anyway."""
    shuffle_block: int | None = None
    """For stores on object storage: samples whose rows lie in the same block of so many store rows are trained on one
    after the other, in shuffled order, so that a shard is opened once and not for every sample. Blocks are shuffled,
    too. A global batch is then made of few neighbourhoods of the dataset: take the global batch / 16 or less, and a
    divisor of the store's shard rows. By default every sample is drawn on its own."""
    workers: int = 4
    """Loader processes; 0 loads in the training process."""
    encoder_features: str | None = None
    """Feature store with what the base encoder gives (olavlm-extract --teacher base), read in place of the images: the
    encoder is not run. Another one for each geometry, so that pt and ift have their own."""
    encoder_features_key: str | None = None
    """Where that store keeps them; by default what `olavlm-extract` calls them."""
    held_out: str | list[str] | None = None
    """LLaVA files with samples that are not trained on: `train.pictures_every` draws the first of them. By default,
    the first of those that `fraction` leaves out."""


@dataclass
class TargetsConfig:
    store: str | None = None
    """Feature store of `olavlm-extract`."""
    source: Literal["cache", "online"] = "cache"
    """Whether targets are read from the store, or teachers run in the loop."""
    geometry: Literal["reference", "square", "pad"] = "reference"
    """What the teachers saw, or see, of an image: `reference` is each teacher's own framing, as in the paper; `square`
    and `pad` are the base encoder's, so that the grids lie over each other. Then model.geometry must be the same."""
    local_cache: str | None = None
    """Folder on a local disk in which what was read of a store on object storage is kept, for the next epoch and the
    next run, by all processes of a machine; of data.encoder_features too. Of no use for a store on a file system."""
    local_cache_gb: float = 50
    """Of disk space that it may take, in 10^9 bytes; what was used the longest ago goes first."""


@dataclass
class InitConfig:
    from_: str | None = None
    """Run folder or checkpoint to start from; written `init.from`. `{recipe}` in it stands for the recipe's name,
    `{previous}` for the stage ahead of this one in `train.stages`."""


@dataclass
class TrainConfig:
    output_dir: str
    """Run folder. A run that stopped is resumed from it. `{recipe}` and `{stage}` in it stand for their names."""
    stages: list[Stage] = field(default_factory=lambda: ["pt", "ift"])
    """What `olavlm-train all` runs, each from the result of the one before (table 2). By default the stages that the
    recipe has a section for, or pt and ift."""
    epochs: float = 1.0
    """Passes over the data: the length of the run and of the learning-rate schedule."""
    max_steps: int | None = None
    """Stop after this many optimizer steps. The schedule keeps its length; beyond it, it starts anew."""
    seed: int = 0
    """Of new parameters and of the order of samples."""
    batch_size: int = 16
    """Samples a process and micro-batch. The global batch is batch_size x accumulation x processes."""
    accumulation: int = 1
    """Micro-batches an optimizer step."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.03
    """Part of the schedule with rising learning rate; then a cosine to 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this norm; not at all by default."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward."""
    gradient_checkpointing: bool = False
    """Recompute the LLM's activations in the backward."""
    freeze_tokens: bool = True
    """Whether task tokens stay as PT left them in vpt and ift (table 6)."""
    save_every: int = 200
    """Optimizer steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    trackers: list[TrackerName] = field(default_factory=list)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb (the extra `wandb`, which reads
    WANDB_PROJECT, WANDB_MODE=offline and so on)."""
    pictures_every: int | None = None
    """Optimizer steps between pictures of targets and predictions, in stages with embedding losses: in
    RUN/pictures, and for trackers that take pictures. None by default."""
    pictures: int = 4
    """Held-out samples that are drawn."""


@dataclass
class LoraConfig:
    rank: int | None = None
    """Rank of the update that vpt and ift learn for each of the LLM's weights, which stay as they are (LoRA,
    arXiv 2106.09685); without one the weights themselves are trained. LLaVA-1.5 takes 128."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank; twice the rank by default."""
    dropout: float = 0.0
    """Of what the update reads. With it, results depend on how a batch is cut."""
    targets: str | list[str] = "all-linear"
    """Names of the layers that get an update, or all-linear: all linear ones but the output embedding."""


@dataclass
class Recipe:
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tasks: dict[str, TaskConfig] = field(default_factory=_paper_tasks)
    losses: LossConfig = field(default_factory=LossConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        def rule(ok: bool, key: str, value: object, text: str) -> None:
            if not ok:
                raise RecipeError(f"{key} is {value}: {text}")

        t, d, order = self.train, self.data, self.model.order
        rule(len(set(order)) == len(order), "model.order", order, "each task once")
        rule(t.batch_size >= 1, "train.batch_size", t.batch_size, "at least 1")
        rule(t.accumulation >= 1, "train.accumulation", t.accumulation, "at least 1")
        rule(t.max_steps is None or t.max_steps >= 1, "train.max_steps", t.max_steps, "at least 1")
        rule(0 < t.epochs < inf, "train.epochs", t.epochs, "above 0")
        rule(0 <= t.seed < 2**32, "train.seed", t.seed, "from 0 to 2**32 - 1, as NumPy's generators take")
        attention = self.model.attention
        known = attention in (None, "eager", "sdpa") or _is_attention(attention)
        rule(known, "model.attention", attention, "use sdpa, flash_attention_2 or eager")
        rule(self.model.max_length >= 1, "model.max_length", self.model.max_length, "at least 1")
        rule(self.model.num_task_tokens >= 0, "model.num_task_tokens", self.model.num_task_tokens, "at least 0")
        rule(0 < t.lr < inf, "train.lr", t.lr, "above 0")
        norm, weight = t.max_grad_norm, self.losses.contrastive_weight
        rule(norm is None or 0 < norm < inf, "train.max_grad_norm", norm, "above 0, or null for none")
        rule(0 <= t.weight_decay < inf, "train.weight_decay", t.weight_decay, "at least 0")
        rule(0 <= weight < inf, "losses.contrastive_weight", weight, "at least 0")
        rule(0 <= t.warmup < 1, "train.warmup", t.warmup, "a part of the run, from 0 to below 1")
        rule(t.save_every >= 1, "train.save_every", t.save_every, "at least 1")
        rule(t.keep >= 1, "train.keep", t.keep, "at least 1")
        every = t.pictures_every
        rule(every is None or every >= 1, "train.pictures_every", every, "at least 1, or null")
        rule(t.pictures >= 1, "train.pictures", t.pictures, "at least 1")
        ordered = t.stages == [stage for stage in STAGES if stage in t.stages]
        rule(bool(t.stages) and ordered, "train.stages", t.stages, "some of pt, vpt, ift, in this order")
        rule(self.lora.rank is None or self.lora.rank >= 1, "lora.rank", self.lora.rank, "at least 1, or null")
        rule(0 <= self.lora.dropout < 1, "lora.dropout", self.lora.dropout, "from 0 to below 1")
        rule(0 < d.fraction <= 1, "data.fraction", d.fraction, "above 0 and at most 1")
        rule(d.shuffle_block is None or d.shuffle_block >= 1, "data.shuffle_block", d.shuffle_block, "at least 1")
        rule(d.workers >= 0, "data.workers", d.workers, "at least 0")
        room = self.targets.local_cache_gb
        rule(room > 0, "targets.local_cache_gb", room, "above 0; without a cache, leave targets.local_cache out")
        keyless = d.encoder_features is not None or d.encoder_features_key is None
        rule(keyless, "data.encoder_features", d.encoder_features, "data.encoder_features_key needs a store")
        rule(bool(d.file), "data.file", d.file, "name at least one dataset file")
        rule(bool(d.images), "data.images", d.images, "name at least one image root")
        for name, task in self.tasks.items():
            rule(name in self.model.order, "model.order", self.model.order, f"task {name} has no place in it")
            rule(all(x >= 1 for x in task.layers), f"tasks.{name}.layers", task.layers, "layers are counted from 1")
        if self.fuses:
            fusion = f"model.fusion is {self.model.fusion}, which "
            rule(bool(self.tasks), "tasks", "empty", f"{fusion}fuses the features of their teachers; name one at least")
            tokens = self.model.num_task_tokens
            rule(tokens == 0, "model.num_task_tokens", tokens, f"{fusion}has no task tokens; set it to 0")
            rule(not self.losses.stages, "losses.stages", self.losses.stages, f"{fusion}distils nothing; set it to []")

    @property
    def files(self) -> list[str]:
        return [self.data.file] if isinstance(self.data.file, str) else self.data.file

    @property
    def image_roots(self) -> list[str]:
        return [self.data.images] if isinstance(self.data.images, str) else self.data.images

    @property
    def held_out_files(self) -> list[str]:
        return [self.data.held_out] if isinstance(self.data.held_out, str) else self.data.held_out or []

    @property
    def task_order(self) -> list[str]:
        """The tasks that are on, in the order of insertion."""
        return [name for name in self.model.order if name in self.tasks]

    @property
    def fuses(self) -> bool:
        """Whether features of teachers are an input of the model, in every stage."""
        return self.model.fusion != "none"

    def distils(self, stage: Stage) -> bool:
        """Whether the stage has embedding losses."""
        return stage in self.losses.stages and bool(self.tasks)

    def base_geometry(self, stage: Stage) -> Geometry:
        """What the base encoder sees of an image in this stage."""
        return self.model.geometry or ("square" if stage == "pt" else "pad")

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe, as it would stand in a file."""
        resolved = dataclasses.asdict(self)
        resolved["init"] = {"from": resolved["init"]["from_"]}
        return resolved

    def identity(self) -> dict[str, Any]:
        """The resolved recipe, without where it writes, when it stops, how it loads, and how the global batch is cut: a
        run is resumed on any number of processes as long as its global batch stays."""
        content = self.to_dict()
        for key in _NOT_THE_RESULT:
            del content["train"][key]
        del content["model"]["packing"], content["data"]["workers"], content["data"]["held_out"]
        del content["targets"]["local_cache"], content["targets"]["local_cache_gb"]
        return content

    def hash(self) -> str:
        """sha256 of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def _is_attention(name: str) -> bool:
    from transformers import AttentionInterface  # takes seconds, and few recipes name one

    return name in AttentionInterface().valid_keys() or "/" in name  # a kernel of the hub


def describe(cls: type = Recipe) -> str:
    """Every recipe key with its type and default, one a line, for `--help`."""
    lines = []
    for section in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[section.name]
        prefix = section.name
        if typing.get_origin(hint) is dict:
            prefix, hint = f"{section.name}.NAME", typing.get_args(hint)[1]
        for f in dataclasses.fields(hint):
            default = "required" if f.default is f.default_factory is dataclasses.MISSING else _default(f)
            kind = typing.get_type_hints(hint)[f.name]
            lines.append(f"  {prefix}.{f.name.rstrip('_')}: {_type_name(kind)} = {default}")
    return "\n".join(lines)


def _default(f: dataclasses.Field) -> str:
    return str(f.default if f.default is not dataclasses.MISSING else f.default_factory())


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list[{_type_name(typing.get_args(hint)[0])}]"
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
