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

from olavlm.cache.images import without_credentials
from olavlm.student.choices import Fusion, Geometry, Kernels, KeyBlocks, PredictorWidth, QueryKind, Stage, TrackerName
from olavlm.student.errors import RecipeError

STAGES = ("pt", "vpt", "ift")


_NOT_THE_RESULT = (
    "output_dir", "stages", "max_steps", "save_every", "keep", "trackers", "batch_size", "accumulation",
    "pictures_every", "pictures"
)  # fmt: skip
"""Fields of `train` that a run may change when it is resumed."""


def _rule(ok: bool, key: str, value: object, text: str) -> None:
    """RecipeError that names the key, its value and the rule that it breaks."""
    if not ok:
        raise RecipeError(f"{key} is {value}: {text}")


@dataclass
class ModelConfig:
    """The language model, the base encoder, and what of the method is built onto them."""

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

    def __post_init__(self) -> None:
        known = self.attention in (None, "eager", "sdpa") or _is_attention(self.attention)
        _rule(known, "model.attention", self.attention, "use sdpa, flash_attention_2 or eager")
        _rule(self.max_length >= 1, "model.max_length", self.max_length, "at least 1")
        _rule(self.num_task_tokens >= 0, "model.num_task_tokens", self.num_task_tokens, "at least 0")
        _rule(len(set(self.order)) == len(self.order), "model.order", self.order, "each task once")


@dataclass
class TaskConfig:
    """One teacher's features, and the predictors that learn them."""

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
    """The embedding losses, which are added to the text loss."""

    stages: list[Stage] = field(default_factory=lambda: ["pt"])
    """Stages with embedding losses (table 4)."""
    contrastive: bool = True
    """Whether the contrastive term counts (table V of the appendix)."""
    contrastive_weight: float = 0.3
    """Its weight beside smooth-L1."""
    kernels: Kernels = "eager"
    """What computes them: plain PyTorch, or Triton's kernels on CUDA, which no GPU has run yet."""

    def __post_init__(self) -> None:
        weight = self.contrastive_weight
        _rule(0 <= weight < inf, "losses.contrastive_weight", weight, "at least 0")


@dataclass
class DataConfig:
    """Dialogues and images."""

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

    def __post_init__(self) -> None:
        block, keyed = self.shuffle_block, self.encoder_features_key is not None
        _rule(0 < self.fraction <= 1, "data.fraction", self.fraction, "above 0 and at most 1")
        _rule(block is None or block >= 1, "data.shuffle_block", block, "at least 1")
        _rule(self.workers >= 0, "data.workers", self.workers, "at least 0")
        store = self.encoder_features
        _rule(store is not None or not keyed, "data.encoder_features", store, "data.encoder_features_key needs a store")
        _rule(bool(self.file), "data.file", self.file, "name at least one dataset file")
        _rule(bool(self.images), "data.images", self.images, "name at least one image root")


@dataclass
class TargetsConfig:
    """Where the teachers' features come from."""

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

    def __post_init__(self) -> None:
        room = self.local_cache_gb
        _rule(room > 0, "targets.local_cache_gb", room, "above 0; without a cache, leave targets.local_cache out")


@dataclass
class InitConfig:
    """What training starts from, instead of `model.llm` and `model.encoder`."""

    from_: str | None = None
    """Run folder or checkpoint to start from; written `init.from`. `{recipe}` in it stands for the recipe's name,
    `{previous}` for the stage ahead of this one in `train.stages`."""


@dataclass
class TrainConfig:
    """The run: its folder, length, batches, optimizer and checkpoints."""

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

    def __post_init__(self) -> None:
        norm, every = self.max_grad_norm, self.pictures_every
        ordered = self.stages == [stage for stage in STAGES if stage in self.stages]
        _rule(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        _rule(self.accumulation >= 1, "train.accumulation", self.accumulation, "at least 1")
        _rule(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "at least 1")
        _rule(0 < self.epochs < inf, "train.epochs", self.epochs, "above 0")
        _rule(0 <= self.seed < 2**32, "train.seed", self.seed, "from 0 to 2**32 - 1, as NumPy's generators take")
        _rule(0 < self.lr < inf, "train.lr", self.lr, "above 0")
        _rule(norm is None or 0 < norm < inf, "train.max_grad_norm", norm, "above 0, or null for none")
        _rule(0 <= self.weight_decay < inf, "train.weight_decay", self.weight_decay, "at least 0")
        _rule(0 <= self.warmup < 1, "train.warmup", self.warmup, "a part of the run, from 0 to below 1")
        _rule(self.save_every >= 1, "train.save_every", self.save_every, "at least 1")
        _rule(self.keep >= 1, "train.keep", self.keep, "at least 1")
        _rule(every is None or every >= 1, "train.pictures_every", every, "at least 1, or null")
        _rule(self.pictures >= 1, "train.pictures", self.pictures, "at least 1")
        _rule(bool(self.stages) and ordered, "train.stages", self.stages, "some of pt, vpt, ift, in this order")


@dataclass
class LoraConfig:
    """Low-rank updates of the language model, in place of training its weights (arXiv 2106.09685)."""

    rank: int | None = None
    """Rank of the update that vpt and ift learn for each of the LLM's weights, which stay as they are;
    without one the weights themselves are trained. LLaVA-1.5 takes 128."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank; twice the rank by default."""
    dropout: float = 0.0
    """Of what the update reads. With it, results depend on how a batch is cut."""
    targets: str | list[str] = "all-linear"
    """Names of the layers that get an update, or all-linear: all linear ones but the output embedding."""

    def __post_init__(self) -> None:
        _rule(self.rank is None or self.rank >= 1, "lora.rank", self.rank, "at least 1, or null")
        _rule(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to below 1")


@dataclass
class Recipe:
    """Everything a run depends on. RecipeError for values that cannot be, alone or together."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tasks: dict[str, TaskConfig] = field(default_factory=_paper_tasks)
    losses: LossConfig = field(default_factory=LossConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for name, task in self.tasks.items():
            _rule(name in self.model.order, "model.order", self.model.order, f"task {name} has no place in it")
            _rule(all(x >= 1 for x in task.layers), f"tasks.{name}.layers", task.layers, "layers are counted from 1")
        if self.fuses:
            fusion = f"model.fusion is {self.model.fusion}, which "
            fused = f"{fusion}fuses the features of their teachers; name one at least"
            _rule(bool(self.tasks), "tasks", "empty", fused)
            tokens, stages = self.model.num_task_tokens, self.losses.stages
            _rule(tokens == 0, "model.num_task_tokens", tokens, f"{fusion}has no task tokens; set it to 0")
            _rule(not stages, "losses.stages", stages, f"{fusion}distils nothing; set it to []")

    @property
    def files(self) -> list[str]:
        """`data.file` as a list."""
        return [self.data.file] if isinstance(self.data.file, str) else self.data.file

    @property
    def image_roots(self) -> list[str]:
        """`data.images` as a list."""
        return [self.data.images] if isinstance(self.data.images, str) else self.data.images

    @property
    def held_out_files(self) -> list[str]:
        """`data.held_out` as a list."""
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
        run is resumed on any number of processes as long as its global batch stays. Without credentials in URLs."""
        content = without_credentials(self.to_dict())
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
