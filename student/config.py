"""Recipes: everything a run depends on, as nested dataclasses that a YAML file sets and the command line overrides.

A recipe file holds the sections below, optionally `base: OTHER.yaml` (a file beside it, or a shipped recipe) that it
overrides, and `stages: {pt: {...}, ift: {...}}` with what differs between stages. Later wins: base, file, its stage,
command line. A key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from transformers import AttentionInterface

from .assembly import KeyBlocks
from .encoders import Geometry
from .errors import RecipeError
from .tokens import PredictorWidth, QueryKind

Stage = Literal["pt", "vpt", "ift"]
STAGES = ("pt", "vpt", "ift")
SHIPPED = "olavlm.pipelines"


@dataclass
class ModelConfig:
    llm: str
    """Causal language model: a hub id or a local folder."""
    encoder: str
    """Base vision encoder: a hub id or a local folder."""
    template: str = "llama_3"
    """Prompt template: llama_3, phi_3, vicuna_v1 or plain."""
    geometry: Geometry | None = None
    """What the base encoder sees: square (centre crop) or pad. By default square in pt, pad after it."""
    select_layer: int = -2
    """Hidden state of the encoder that is projected."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of LLM and encoder weights. A bfloat16 LLM can be frozen (pt) but is not trained well."""
    attention: str | None = None
    """sdpa, flash_attention_2 or eager; the library's choice by default."""
    max_length: int = 4096
    """Longest sequence, image and task tokens included; the rest is cut."""
    num_task_tokens: int = 8
    """N, special tokens inserted for each task; 0 for none (arXiv 2412.09585, table 5)."""
    order: list[str] = field(default_factory=lambda: ["gen", "depth", "seg"])
    """Order in which the tasks' tokens are inserted; tasks that are off are skipped."""
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


@dataclass
class DataConfig:
    file: str | list[str]
    """LLaVA files, .json, .jsonl or .parquet."""
    images: str | list[str]
    """Image roots, [PREFIX=]DIR|ZIP|URL."""
    fraction: float = 1.0
    """Part of the samples that is used, drawn by `train.seed`."""
    group_by_modality: bool = False
    """Whether a global batch is all image samples or all text-only ones."""
    workers: int = 4
    """Loader processes; 0 loads in the training process."""


@dataclass
class TargetsConfig:
    store: str | None = None
    """Feature store of `olavlm-extract`."""
    source: Literal["cache", "online"] = "cache"
    """Whether targets are read from the store, or teachers run in the loop."""
    geometry: Literal["reference", "square", "pad"] = "reference"
    """What the teachers saw, or see, of an image: `reference` is each teacher's own framing, as in the paper; `square`
    and `pad` are the base encoder's, so that the grids lie over each other. Then model.geometry must be the same."""


@dataclass
class InitConfig:
    from_: str | None = None
    """Run folder or checkpoint to start from; written `init.from`."""


@dataclass
class TrainConfig:
    output_dir: str
    """Run folder. A run that stopped is resumed from it."""
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
    tensorboard: bool = False
    """Whether metrics go to TensorBoard too."""


@dataclass
class Recipe:
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tasks: dict[str, TaskConfig] = field(default_factory=_paper_tasks)
    losses: LossConfig = field(default_factory=LossConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        def rule(ok: bool, key: str, value: object, text: str) -> None:
            if not ok:
                raise RecipeError(f"{key} is {value}: {text}")

        t, d = self.train, self.data
        rule(t.batch_size >= 1, "train.batch_size", t.batch_size, "at least 1")
        rule(t.accumulation >= 1, "train.accumulation", t.accumulation, "at least 1")
        rule(t.max_steps is None or t.max_steps >= 1, "train.max_steps", t.max_steps, "at least 1")
        rule(t.epochs > 0, "train.epochs", t.epochs, "above 0")
        rule(0 <= t.seed < 2**32, "train.seed", t.seed, "from 0 to 2**32 - 1, as NumPy's generators take")
        attention = (None, "eager", *AttentionInterface().valid_keys())
        known = self.model.attention in attention or "/" in str(self.model.attention)  # a kernel of the hub
        rule(known, "model.attention", self.model.attention, "use sdpa, flash_attention_2 or eager")
        rule(self.model.max_length >= 1, "model.max_length", self.model.max_length, "at least 1")
        rule(self.model.num_task_tokens >= 0, "model.num_task_tokens", self.model.num_task_tokens, "at least 0")
        rule(t.lr > 0, "train.lr", t.lr, "above 0")
        rule(0 <= t.warmup < 1, "train.warmup", t.warmup, "a part of the run, from 0 to below 1")
        rule(t.save_every >= 1, "train.save_every", t.save_every, "at least 1")
        rule(t.keep >= 1, "train.keep", t.keep, "at least 1")
        rule(0 < d.fraction <= 1, "data.fraction", d.fraction, "above 0 and at most 1")
        rule(d.workers >= 0, "data.workers", d.workers, "at least 0")
        rule(bool(d.file), "data.file", d.file, "name at least one dataset file")
        rule(bool(d.images), "data.images", d.images, "name at least one image root")
        for name, task in self.tasks.items():
            rule(name in self.model.order, "model.order", self.model.order, f"task {name} has no place in it")
            rule(all(x >= 1 for x in task.layers), f"tasks.{name}.layers", task.layers, "layers are counted from 1")

    @property
    def files(self) -> list[str]:
        return [self.data.file] if isinstance(self.data.file, str) else self.data.file

    @property
    def image_roots(self) -> list[str]:
        return [self.data.images] if isinstance(self.data.images, str) else self.data.images

    @property
    def task_order(self) -> list[str]:
        """The tasks that are on, in the order of insertion."""
        return [name for name in self.model.order if name in self.tasks]

    def base_geometry(self, stage: Stage) -> Geometry:
        """What the base encoder sees of an image in this stage."""
        return self.model.geometry or ("square" if stage == "pt" else "pad")

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe, as it would stand in a file."""
        resolved = dataclasses.asdict(self)
        resolved["init"] = {"from": resolved["init"]["from_"]}
        return resolved

    def hash(self) -> str:
        """sha256 of the resolved recipe, without where it writes, when it stops, how it loads, and how the global batch
        is cut: a run is resumed on any number of processes as long as its global batch stays."""
        content = self.to_dict()
        for key in ("output_dir", "max_steps", "save_every", "keep", "tensorboard", "batch_size", "accumulation"):
            del content["train"][key]
        del content["data"]["workers"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_recipe(config: str, overrides: Sequence[str], stage: Stage) -> Recipe:
    """Read a recipe for one stage.

    Args:
        config: path of a YAML file, or the name of a shipped recipe.
        overrides: command line words, `--section.field value` or `--section.field=value`; values are YAML.

    Raises:
        RecipeError: a file that is missing or no YAML, a key or value that is not valid.
    """
    merged = _read(config)
    by_stage = merged.pop("stages", None) or {}
    if not isinstance(by_stage, dict) or set(by_stage) - set(STAGES):
        raise RecipeError(f"{config}: 'stages' holds {', '.join(STAGES)}, got {', '.join(map(str, by_stage))}")
    for name in by_stage:
        _check_keys(by_stage[name] or {}, Recipe, (), f"{config}, stage {name}")
    merged = _merge(merged, by_stage.get(stage) or {})
    for key, value in _parse_overrides(overrides):
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _check_keys(nested, Recipe, (), "command line")
        merged = _merge(merged, nested)
    _check_keys(merged, Recipe, (), config)
    return _build(merged, config)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files(SHIPPED) / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _read(config: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file over its base; `above` are the files that it is a base of, the nearest last."""
    path = above[-1].parent / config if above else Path(config)
    if not path.is_file():
        path = shipped_recipes().get(Path(config).stem) if Path(config).name == str(config) else None
    if path is None:
        raise RecipeError(f"recipe {config} does not exist; give a file or one of {', '.join(shipped_recipes())}")
    if any(path.samefile(file) for file in above):
        chain = " -> ".join(file.name for file in (*above, path))
        raise RecipeError(f"recipe {path} is a base of itself ({chain}); a chain of bases has to end")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe {path} is not valid YAML: {e}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} is a {type(content).__name__}, not a mapping of sections")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: base is {base!r}; name a file beside it, or a shipped recipe")
    return _merge(_read(base, (*above, path)), content)


def _merge(under: dict, over: dict) -> dict:
    """Mappings are merged key by key, everything else is replaced; a task set to null is taken out."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"argument {word!r} is not expected; an override is --section.field value")
        key, eq, text = word[2:].partition("=")
        if not eq:
            if not rest:
                raise RecipeError(f"--{key} lacks its value")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError:
            pairs.append((key, text))
    return pairs


def _check_keys(content: Any, cls: type, path: tuple[str, ...], where: str) -> None:
    """RecipeError for the first key that the dataclass does not have, with the nearest of all valid ones."""
    hints = typing.get_type_hints(cls)
    for key, value in content.items() if isinstance(content, dict) else ():
        names = {f.name.rstrip("_"): f.name for f in dataclasses.fields(cls)}
        if key not in names:
            full = (*path, str(key))
            while isinstance(value, dict) and value:  # name a field, not a section
                name, value = next(iter(value.items()))
                full = (*full, str(name))
            dotted, valid = ".".join(full), list(_all_keys(Recipe))
            local = [".".join((*path, n)) for n in names]
            near = difflib.get_close_matches(dotted, local + valid, 1, cutoff=0.0)
            raise RecipeError(f"{where}: unknown recipe key '{dotted}'; the nearest is '{near[0]}'")
        hint = hints[names[key]]
        if dataclasses.is_dataclass(hint):
            _check_keys(value, hint, (*path, key), where)
        elif typing.get_origin(hint) is dict and isinstance(value, dict):
            for name, entry in value.items():
                _check_keys(entry, typing.get_args(hint)[1], (*path, key, name), where)


def _all_keys(cls: type, path: tuple[str, ...] = ()):
    for name, hint in typing.get_type_hints(cls).items():
        here = (*path, name.rstrip("_"))
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, here)
        elif typing.get_origin(hint) is dict:
            yield from _all_keys(typing.get_args(hint)[1], (*here, "NAME"))
        else:
            yield ".".join(here)


def _build(content: dict[str, Any], where: str) -> Recipe:
    content = json.loads(json.dumps(content, default=str))
    if isinstance(content.get("init"), dict) and "from" in content["init"]:
        content["init"]["from_"] = content["init"].pop("from")
    if isinstance(content.get("tasks"), dict):
        content["tasks"] = {name: task for name, task in content["tasks"].items() if task is not None}
    for section in ("model", "data", "train"):
        content[section] = content.get(section) or {}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe)
    try:
        return parser.instantiate(parser.parse_object({"recipe": content})).recipe
    except (ArgumentError, TypeError, ValueError) as e:
        message = " ".join(str(e).replace("recipe.", "").replace("Parser key ", "").split())
        raise RecipeError(f"{where}: {message.replace('from_', 'from')}") from None


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
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
