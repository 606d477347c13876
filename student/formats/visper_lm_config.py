"""The config.json of the authors' published checkpoints: language model, tower, tasks, and what ours cannot be.

Their kinds of model are not the library's, so the JSON is read as it is; no code of a checkpoint is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, Phi3ForCausalLM, PreTrainedConfig, PreTrainedModel

from olavlm.student.choices import Geometry, KeyBlocks
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.loading import load_errors, read_config_fields
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.encoder_name import USUAL_LAYER, EncoderName

LANGUAGE_MODELS: dict[str, type[PreTrainedModel]] = {"llama": LlamaForCausalLM, "phi3": Phi3ForCausalLM}
"""By what `model_type` ends with, or else the architecture. Theirs are ola_llama and ola_phi3 from pt, llava_llama and
llava_phi3 from vpt and ift, and of baselines; whether there are predictors, the tensors say."""

_CLIP, _CONVNEXT = "openai/clip-vit-large-patch14-336", "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"
TOWERS = {Path(_CLIP).name: _CLIP, _CONVNEXT: f"open_clip:laion/{_CONVNEXT}-res768"}
"""Their two towers as our encoders, by the last part of `mm_vision_tower`, which may be a path on another machine."""

TASKS = {"gen": "img", "depth": "depth", "seg": "seg"}
"""Theirs, and what the names of a task's fields begin with."""

_LIBRARY_FIELDS = {"model_type", "architectures", "auto_map", "_name_or_path", "transformers_version"}
_OWN_FIELDS = {
    "aux_mode", "contrastive_loss_weight", "depth_estimator", "freeze_mm_mlp_adapter", "image_aspect_ratio",
    "image_depth", "image_gen", "image_generator", "image_grid_pinpoints", "image_seg", "image_segmentor",
    "num_task_tokens", "pass_text_to_aux", "sample_tokens", "task_token_format", "tokenizer_model_max_length",
    "tokenizer_padding_side", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower", "use_ce", "use_contrastive",
    "use_mm_proj",
}  # fmt: skip
"""What is not the language model's, beside fields that begin with `mm_`."""


@dataclass
class ReleaseConfig:
    """What a published config says, in our terms."""

    model_type: str
    llm_class: type[PreTrainedModel]
    text_config: PreTrainedConfig
    vision_tower: str
    select_layer: int
    geometry: Geometry
    tasks: tuple[TaskSpec, ...]
    num_task_tokens: int
    key_blocks: KeyBlocks
    use_contrastive: bool
    contrastive_weight: float
    max_sequence_length: int
    intermediate_depth: bool | None
    """Whether depth's predictors end in three MLPs of their own; None if it does not say."""
    settings: dict[str, _Fields]
    """Of each task's predictors."""
    notes: list[str] = field(default_factory=list)

    def check_predictors(self) -> None:
        """ModelError for predictors that compute what ours do not, for a checkpoint that has some."""
        for task in self.tasks:
            for key, ours in {"depth": 1, "num_heads": 4, "dim_head": 32, "ff_mult": 1}.items():
                self.settings[task.name].only(key, ours, ours)
            if not task.layers:
                name = f"{TASKS[task.name]}_layer_indices"
                raise self.settings[task.name].error(
                    name, None, "it must be the layers of the predictors, as in '8-20'"
                )

    def encoder(self) -> str:
        """The name of its vision tower among our encoders."""
        parsed = EncoderName.parse(self.vision_tower)
        known = TOWERS.get(Path(parsed.model).name)
        if known is None:
            return self.vision_tower
        ours = EncoderName.parse(known)
        place = parsed.model if Path(parsed.model).is_dir() else ours.model
        side = parsed.side or ours.side
        library = "" if ours.library == "transformers" else f"{ours.library}:"
        return f"{library}{place}" + ("" if side is None else f"-res{side}")


def is_ola(model_type: str) -> bool:
    """Whether models of this kind are pretrained ones, which have predictors."""
    return model_type.startswith("ola_")


def read_config(source: str | Path) -> ReleaseConfig:
    """The config of a checkpoint, a folder or a hub id.

    Raises:
        ModelError: none there, one of another model, or of one that computes what ours does not; with the value.
    """
    fields = read_config_fields(source)
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    kinds = [model_type, *(architectures if isinstance(architectures, list) else ())]
    said = [str(kind).lower().removesuffix("forcausallm") for kind in kinds]
    ends = [end for name in said for end in LANGUAGE_MODELS if name.endswith(end)]
    if not ends:
        raise ModelError(
            f"{source} holds a {model_type!r} model; model types of VisPer-LM end with {' or '.join(LANGUAGE_MODELS)}"
        )
    llm_class = LANGUAGE_MODELS[ends[0]]
    reader, depth = _Fields(fields, source), fields.get("image_depth")
    with load_errors(source):
        text_config = llm_class.config_class(**_language_fields(fields))
    num_task_tokens = reader.number("num_task_tokens", 0)
    mode = fields.get("aux_mode", "-".join(name for name in TASKS if f"image_{name}" in fields))
    names = str(mode).split("-") if mode and "num_task_tokens" in fields else []
    if unknown := [name for name in names if name not in TASKS]:
        raise reader.error("aux_mode", fields.get("aux_mode"), f"{unknown[0]!r} is none of {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise reader.error("aux_mode", fields.get("aux_mode"), "each task may occur once")
    reader.only("mm_projector_type", "mlp2x_gelu", "mlp2x_gelu")  # where it is not said, the tensors do
    reader.only("mm_vision_select_feature", "patch", "patch")
    reader.only("mm_patch_merge_type", "flat", "flat")
    reader.only("mm_use_im_start_end", False, False)
    geometry: Geometry = reader.only("image_aspect_ratio", "square", "square", "pad")
    token_format = reader.only("task_token_format", "emb", "emb", "expand_emb")
    release = ReleaseConfig(
        model_type=str(model_type),
        llm_class=llm_class,
        text_config=text_config,
        vision_tower=reader.text("mm_vision_tower"),
        select_layer=reader.number("mm_vision_select_layer", USUAL_LAYER),
        geometry=geometry,
        tasks=tuple(_task(name, reader) for name in names),
        num_task_tokens=num_task_tokens,
        key_blocks="sys+img+t+txt" if fields.get("pass_text_to_aux", True) else "sys+img+t",
        use_contrastive=bool(fields.get("use_contrastive", True)),
        contrastive_weight=reader.number("contrastive_loss_weight", 0.3, float),
        max_sequence_length=reader.number("tokenizer_model_max_length", text_config.max_position_embeddings),
        intermediate_depth=depth.get("use_intermediate_depth") if isinstance(depth, dict) else None,
        settings={name: reader.inner(f"image_{name}") for name in names},
    )
    pooled = [task.name for task in release.tasks if task.tokens > 1]
    if token_format == "emb" and not is_ola(model_type) and num_task_tokens and pooled:
        release.notes.append(
            f"tokens: with task_token_format 'emb' the public code inserts every query of {' and '.join(pooled)} in a "
            f"{model_type} model; here it is their {num_task_tokens} means, as in pretraining"
        )
    return release


@dataclass(frozen=True)
class _Fields:
    """Values of a config, or of a dictionary in it, that are what they have to be; null is not there."""

    fields: Mapping[str, Any]
    source: str | Path
    within: str = ""

    def error(self, name: str, value: Any, rule: str) -> ModelError:
        return ModelError(f"{self.source}: config.json has {self.within}{name} {value!r}; {rule}")

    def _value(self, name: str, absent: Any) -> Any:
        value = self.fields.get(name)
        return absent if value is None else value

    def only(self, name: str, absent: Any, *taken: Any) -> Any:
        """The value, which is one of those that ours computes."""
        value = self._value(name, absent)
        if value not in taken:
            raise self.error(name, value, f"ours is {' or '.join(map(repr, taken))}")
        return value

    def number(self, name: str, absent: float | None = None, kind: Callable[[Any], Any] = int) -> Any:
        value = self._value(name, absent)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or kind(value) != value:
            raise self.error(name, value, "it must be a number")
        return kind(value)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(name, value, "it must be text")
        return value

    def inner(self, name: str) -> _Fields:
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise self.error(name, value, "it must hold the settings of a predictor")
        return _Fields(value, self.source, f"{name}.")


def _task(name: str, config: _Fields) -> TaskSpec:
    settings, prefix = config.inner(f"image_{name}"), TASKS[name]
    tokens = settings.number("num_tokens")
    if (tokens == 1) != (name == "gen"):  # or its special tokens would be others than ours
        raise settings.error("num_tokens", tokens, "gen has 1, depth and seg have more")
    indices = settings.fields.get(f"{prefix}_layer_indices")
    layers = [] if indices is None else str(indices).split("-")
    if not all(layer.isdecimal() for layer in layers):
        raise settings.error(f"{prefix}_layer_indices", indices, "it must be layers counted from 1, as in '8-20'")
    try:
        return TaskSpec(
            name,
            tokens=tokens,
            dim=settings.number("output_dim"),
            layers=tuple(map(int, layers)),
            weight=settings.number(f"{prefix}_loss_weight", 0.5, float),
            predictor_width="llm" if name == "depth" else "target",
        )
    except RecipeError as error:
        raise ModelError(f"{config.source}: config.json: {error}") from error


def _language_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    others = _LIBRARY_FIELDS | _OWN_FIELDS
    if fields.get("rope_scaling") is None:
        others = others | {"rope_scaling"}
    return {name: value for name, value in fields.items() if name not in others and not name.startswith("mm_")}
