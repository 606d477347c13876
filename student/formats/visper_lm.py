"""The authors' published checkpoints of OLA-VLM / VisPer-LM as models of ours: pretrained, finetuned, and baselines.

    converted = from_visper_lm("shi-labs/OLA-VLM-CLIP-ViT-Llama3-8b")
    converted.model.save_pretrained("start")

On the same inputs the two give the same logits and predictions. What theirs computes and ours does not is refused, or
said in a note. Every tensor is taken or is known to be left out, and no weight stays at random.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from olavlm.student.answering import greedy_settings
from olavlm.student.config import LossConfig
from olavlm.student.decoder import grow_vocabulary, head_is_plain
from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.loading import find_file, load_errors, refuse_missing
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.conversation import IMAGE_TOKEN, load_tokenizer, terminator_id
from olavlm.student.text.templates import check_template
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.encoder_name import EncoderName
from olavlm.student.vision.encoders import VisionEncoder, load_encoder_config, load_image_transform

from .llava_hf import Converted
from .shards import Shards
from .visper_lm_config import TASKS, ReleaseConfig, is_ola, read_config
from .visper_lm_names import (
    TOWER,
    check_shapes,
    clip_prefix,
    is_behind_features,
    is_computed,
    is_of_predictors,
    release_name,
    teacher_of,
)

_TEMPLATES = {"llama": ("llama_3", "vicuna_v1"), "phi3": ("phi_3",)}
"""What their models are trained with, by the kind of language model: the first whose end of an answer is a token."""
_LLM, _TOWER = "llm.", "vision.tower."


def from_visper_lm(source: str | Path, template: str | None = None, encoder: str | None = None) -> Converted:
    """Reads a published checkpoint, a hub id or a folder of safetensors, in the dtype it is stored in.

    Args:
        template: prompt template; by default that of the language model.
        encoder: where the vision tower lies (`encoder_name`); by default what the checkpoint's config names. Of a CLIP
            whose weights the checkpoint holds, only the config and the image processor are read.

    Raises:
        ModelError: no such checkpoint, tensors that are missing or unknown, or a model that computes what ours does
            not.
        RecipeError: a template that is unknown, or that the tokenizer does not tell.
    """
    release = read_config(source)
    shards = Shards(source)
    tokenizer = load_tokenizer(source, config=release.text_config)
    template = template or _template_of(release, tokenizer)
    check_template(template, tokenizer)
    found = {name: shape for name, shape in shards.shapes.items() if not is_computed(name)}
    notes = [*release.notes, *_without_teachers(found)]
    tasks, with_predictors = _predictors(release, found, notes)
    encoder = _encoder(release, encoder, notes)
    config = _config(release, tasks, with_predictors, template, tokenizer, encoder)
    try:
        with torch.device("meta"):
            skeleton = OlaVLM(config)
    except RecipeError as error:
        raise ModelError(f"{source}: {error}") from error
    own = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    clip = clip_prefix(found)
    names = {ours: release_name(ours, tasks, clip) for ours in own}
    _spare(names, release, found, encoder, notes)
    check_shapes(source, {theirs: own[ours] for ours, theirs in names.items()}, found)

    tensors = shards.read(names.values())
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    dtype = state["llm.model.embed_tokens.weight"].dtype
    llm = _filled(skeleton.llm, _below(state, _LLM), dtype, source)
    llm.generation_config = _ends(source, llm)
    vision = _vision(skeleton, _below(state, _TOWER), encoder, dtype, source)
    config.text_config, config.vision_config = llm.config, vision.tower.config
    model = OlaVLM(config, llm=llm, vision=vision)
    model.load_state_dict({name: t for name, t in state.items() if not name.startswith((_LLM, _TOWER))}, strict=False)
    rows = llm.get_input_embeddings().num_embeddings
    grow_vocabulary(llm, 1 + max(tokenizer.get_vocab().values()))
    if (added := llm.get_input_embeddings().num_embeddings - rows) > 0:
        notes.append(
            f"vocabulary: {added} rows more than the checkpoint's {rows}; {IMAGE_TOKEN}, an id of -200 in the public "
            "code, is a token"
        )
    model.head_is_plain = head_is_plain(llm)
    model.tokenizer = tokenizer
    return Converted(model.eval(), notes)


def _template_of(release: ReleaseConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    candidates = _TEMPLATES[release.text_config.model_type]
    for name in candidates:
        if terminator_id(tokenizer, name) in tokenizer.added_tokens_decoder:
            return name
    raise RecipeError(
        f"the tokenizer has no token that ends an answer of {' or '.join(candidates)}; name the prompt template that "
        "the model was trained with: --template NAME"
    )


def _without_teachers(found: dict[str, tuple[int, ...]]) -> list[str]:
    """Takes teachers and decoders out of what was found, in place; says so."""
    teachers = {name: teacher for name in found if (teacher := teacher_of(name)) is not None}
    if not teachers:
        return []
    _drop(found, teachers)
    return [f"teachers: {len(teachers)} tensors of {', '.join(sorted(set(teachers.values())))} are left out"]


def _predictors(
    release: ReleaseConfig, found: dict[str, tuple[int, ...]], notes: list[str]
) -> tuple[tuple[TaskSpec, ...], bool]:
    """The tasks, and whether the model has predictors; those that ours cannot be are taken out of what was found."""
    present = [name for name in found for task in TASKS if is_of_predictors(name, task)]
    if not present:
        if is_ola(release.model_type) and release.tasks:
            notes.append("predictors: the checkpoint holds none")
        return release.tasks, False
    release.check_predictors()
    tasks = release.tasks
    own_mlps = any(".linear_" in name for name in present)
    if release.intermediate_depth or (own_mlps and release.intermediate_depth is None):
        _drop(found, [name for name in found if is_of_predictors(name, "depth")])
        tasks = tuple(replace(task, layers=()) if task.name == "depth" else task for task in tasks)
        notes.append(
            "depth: its predictors are left out, so that there are no predictions of depth; they end in MLPs "
            "(use_intermediate_depth) that ours has not, and are trained behind the first of these. Its tokens stay"
        )
    elif any(task.name == "depth" for task in tasks):
        notes.append(
            "depth: in the public code the teacher sees red and blue exchanged; targets here are of RGB, so that "
            "predictions may fit them less than they did the authors' own"
        )
    notes += _training_notes(release)
    return tasks, True


def _training_notes(release: ReleaseConfig) -> list[str]:
    """What predictors were trained with, and are not used with here."""
    notes = ["keys: in the public code predictors attend to padding too; here it is masked, as if samples came alone"]
    if not release.use_contrastive:
        notes.append("contrastive loss: off in this checkpoint (losses.contrastive), so that logit scales start anew")
    elif release.contrastive_weight != LossConfig.contrastive_weight:
        notes.append(f"contrastive loss: its weight was {release.contrastive_weight} (losses.contrastive_weight)")
    return notes


def _drop(found: dict[str, tuple[int, ...]], names: Iterable[str]) -> None:
    for name in names:
        del found[name]


def _encoder(release: ReleaseConfig, given: str | None, notes: list[str]) -> str:
    """The name of the encoder. ModelError, with the remedy, if it is not where the checkpoint says."""
    encoder = given or release.encoder()
    if encoder != release.vision_tower:
        notes.append(f"vision tower: {encoder}, for the checkpoint's {release.vision_tower}")
    if given is None:
        try:
            load_encoder_config(encoder)
        except ModelError as error:
            raise ModelError(f"{str(error).rstrip('.')}; say where the vision tower lies: --encoder NAME") from error
    return encoder


def _config(
    release: ReleaseConfig,
    tasks: tuple[TaskSpec, ...],
    with_predictors: bool,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    encoder: str,
) -> OlaVLMConfig:
    transform = load_image_transform(encoder, release.geometry)
    return OlaVLMConfig(
        text_config=release.text_config,
        vision_config=load_encoder_config(encoder),
        tasks=list(tasks),
        num_task_tokens=release.num_task_tokens,
        with_predictors=with_predictors,
        gen_query="contextual",
        key_blocks=release.key_blocks,
        include_answer=True,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        select_layer=release.select_layer,
        template=template,
        max_sequence_length=release.max_sequence_length,
        **transform.config_fields(),
    )


def _spare(
    names: dict[str, str],
    release: ReleaseConfig,
    found: dict[str, tuple[int, ...]],
    encoder: str,
    notes: list[str],
) -> None:
    """Takes out of the names, ours to theirs, those of tensors that need not be in the checkpoint."""
    held = any(name.startswith(TOWER) for name in found)
    if not held:
        notes.append(f"vision tower: the checkpoint holds no weights of it; those of {encoder}")
    tied = release.text_config.tie_word_embeddings
    for ours, theirs in list(names.items()):
        spared = (
            (ours.startswith(_TOWER) and (not held or is_behind_features(ours)))
            or (ours.startswith("logit_scales.") and not release.use_contrastive)
            or (ours == "llm.lm_head.weight" and tied)
        )
        if spared and theirs not in found:
            del names[ours]


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _filled(
    skeleton: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype, source: str | Path
) -> PreTrainedModel:
    """A model of the library on these tensors, in place of one without memory."""
    with load_errors(source):
        model, info = type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    refuse_missing(source, info)
    return model


def _vision(
    skeleton: OlaVLM, state: dict[str, torch.Tensor], encoder: str, dtype: torch.dtype, source: str | Path
) -> VisionEncoder:
    """The tower with the checkpoint's weights, as far as it has them, in one dtype."""
    layer, side = skeleton.config.select_layer, skeleton.config.image_transform.size
    if state and EncoderName.parse(encoder).library == "transformers":
        own = next(iter(state.values())).dtype
        return VisionEncoder(_filled(skeleton.vision.tower, state, own, source), layer, side)
    vision = VisionEncoder.from_pretrained(encoder, layer, dtype)
    vision.tower.load_state_dict(state, strict=False)
    return vision


def _ends(source: str | Path, llm: PreTrainedModel) -> GenerationConfig:
    """The tokens that begin, end and pad, which the checkpoint's generation settings know better than its config."""
    if find_file(source, "generation_config.json") is None:
        given = llm.generation_config
    else:
        with load_errors(source):
            given = GenerationConfig.from_pretrained(str(source))
    return greedy_settings(given)
