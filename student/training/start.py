"""The model that a stage begins with: from base checkpoints, a whole model, or what an earlier stage left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from olavlm.student.adapter import is_adapter, read_adapter
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.data.collator import least_length, longest_sequence
from olavlm.student.data.encoder_features import EncoderFeatures
from olavlm.student.data.targets import TargetSource, tokens_without_losses
from olavlm.student.decoder import checkpoint_activations
from olavlm.student.errors import RecipeError
from olavlm.student.extension import extend
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.loading import DTYPES
from olavlm.student.lora import add_lora
from olavlm.student.model import OlaVLM
from olavlm.student.stages import PartRow, apply_stage, trains_llm
from olavlm.student.text.chat_template import check_template_file
from olavlm.student.text.conversation import load_tokenizer
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.encoder_name import EncoderName


def prepare_model(
    recipe: Recipe, stage: Stage, source: TargetSource | None, *, saves: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase, EncoderFeatures | None, list[PartRow]]:
    """The model that the stage trains, set to train what it trains.

    Args:
        source: the teachers' features, if the stage reads any.
        saves: whether this process will save the model; then the encoder stays with it, where features are read in its
            place.

    Returns:
        Model, tokenizer, the encoder's features if they are read in its place, and the table of what trains.

    Raises:
        StudentError: a model that cannot be had or does not fit the recipe, or sequences too short to learn from.
    """
    distil = recipe.distils(stage)
    specs, fused = [], []
    if recipe.fuses:
        fused = [FusedTeacher.of(name, source.cards[name]) for name in recipe.task_order]
    elif distil:
        specs = source.specs
    elif stage == "pt" and recipe.tasks:
        specs = tokens_without_losses(recipe)
    model, tokenizer = start_model(recipe, stage, specs, fused, distil)
    model.pack(recipe.model.packing)
    features = None
    if recipe.data.encoder_features is not None:
        features = EncoderFeatures(recipe)
        features.take_the_place_of(model.vision, keep=stage != "pt" and saves)  # pt's result holds no encoder
    least, longest = least_length(tokenizer, recipe.model.template, model.inserted), longest_sequence(recipe, model)
    if longest < least:
        limit, remedy = "model.max_length", "make it longer"
        if longest < recipe.model.max_length:
            limit, remedy = "the longest sequence of this LLM", "take fewer task tokens, or another LLM"
        raise RecipeError(
            f"{limit} is {longest}: a short question about an image takes {least} tokens here before it is answered, "
            f"and nothing would be learnt; {remedy}"
        )
    if recipe.lora.rank is not None and trains_llm(stage):
        add_lora(model.llm, recipe.lora)
    table = apply_stage(model, stage, freeze_tokens=recipe.train.freeze_tokens, distil=distil)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model.llm)
    return model, tokenizer, features, table


def start_model(
    recipe: Recipe, stage: Stage, specs: list[TaskSpec], fused: list[FusedTeacher], distil: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
    """The model that the stage starts from: base checkpoints in pt, `init.from` after it.

    `specs` are the tasks with tokens or losses, `fused` the teachers of a fusion baseline.
    """
    model, tokenizer = _start_model(recipe, stage, specs, fused, distil)
    if recipe.init.from_ is not None and recipe.model.chat_template is not None:
        check_template_file(tokenizer, recipe.model.chat_template, recipe.init.from_)
    return model, tokenizer


def _start_model(
    recipe: Recipe, stage: Stage, specs: list[TaskSpec], fused: list[FusedTeacher], distil: bool
) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
    m = recipe.model
    settings = build_settings(recipe, stage) | {"fused_teachers": [teacher.to_dict() for teacher in fused]}
    if recipe.init.from_ is None:
        if stage != "pt":
            raise RecipeError(f"init.from is not set; {stage} starts from the run folder of an earlier stage")
        tokenizer = load_tokenizer(m.llm, m.chat_template)
        return OlaVLM.build(m.llm, m.encoder, tokenizer, specs, **settings), tokenizer
    if is_adapter(recipe.init.from_):
        adapter = read_adapter(Path(recipe.init.from_))
        bases = {} if adapter.whole else {"llm": adapter.llm, "encoder": adapter.encoder}
        check_start(recipe, {**adapter.config, **bases}, adapter.tasks, fused)
        if distil:
            adapter.tasks = specs
        return adapter.build(with_predictors=distil, llm=m.llm, encoder=m.encoder, **settings)
    if distil and stage != "pt":
        raise RecipeError(
            f"losses.stages has {stage}, and {recipe.init.from_} is no run folder of pt, with predictors to go on with"
        )
    kept = {} if stage == "pt" else {"with_predictors": False}  # which a checkpoint from elsewhere may hold
    model = OlaVLM.from_pretrained(recipe.init.from_, dtype=DTYPES[m.dtype], attn_implementation=m.attention, **kept)
    tokenizer = model.tokenizer or load_tokenizer(recipe.init.from_)  # which says why there is none
    start = {name: getattr(model.config, name) for name in (*_INHERITED, "fused_teachers")}
    if stage == "pt":
        check_start(recipe, {**start, "num_task_tokens": m.num_task_tokens}, specs, fused)
        own = {key: value for key, value in settings.items() if key not in ("dtype", "attn_implementation")}
        return extend(model, specs, **own), tokenizer
    check_start(recipe, start, list(model.tasks), fused)
    model.config.fused_teachers = settings["fused_teachers"]  # the same, as this stage's store knows them
    model.config.geometry, model.config.max_sequence_length = settings["geometry"], m.max_length
    return model, tokenizer


_INHERITED = ("template", "num_task_tokens", "select_layer", "fusion")  # what a later stage cannot change


def check_start(recipe: Recipe, start: dict[str, Any], tasks: list[TaskSpec], fused: list[FusedTeacher]) -> None:
    """RecipeError if the recipe says otherwise than `init.from` what the model is: it would be trained as another."""
    inherited = [name for name in _INHERITED if name != "num_task_tokens" or recipe.task_order or tasks]
    before = [FusedTeacher.from_dict(teacher) for teacher in start["fused_teachers"]]
    said: dict[str, tuple[Any, Any]] = {
        "tasks, in model.order": (recipe.task_order, [x.name for x in (*tasks, *before)])
    }
    said |= {f"model.{name}": (getattr(recipe.model, name), start[name]) for name in inherited}
    for teacher, there in zip(fused, before, strict=False):
        said[f"the fingerprint of {teacher.name}'s features"] = teacher.fingerprint, there.fingerprint
    for name in ("llm", "encoder"):
        there = start.get(name)
        if there is not None and (Path(there).is_dir() or not Path(there).is_absolute()):  # it has not been moved
            said[f"model.{name}"] = base_location(getattr(recipe.model, name)), there
    for key, (here, there) in said.items():
        if here != there and not _is_same_place(here, there):
            raise RecipeError(f"{key} is {here}, and {recipe.init.from_} was trained with {there}; use the same")


def _is_same_place(here: Any, there: Any) -> bool:
    """Whether two paths, however they are written, lead to one folder."""
    texts = isinstance(here, str) and isinstance(there, str)
    return texts and Path(here).exists() and Path(there).exists() and Path(here).samefile(there)


def build_settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The recipe's model section as arguments of `OlaVLM.build`."""
    m = recipe.model
    return {
        "geometry": recipe.base_geometry(stage),
        "select_layer": m.select_layer,
        "dtype": DTYPES[m.dtype],
        "attn_implementation": m.attention,
        "template": m.template,
        "max_sequence_length": m.max_length,
        "num_task_tokens": m.num_task_tokens,
        "fusion": m.fusion,
        "gen_query": m.gen_query,
        "key_blocks": m.key_blocks,
        "include_answer": m.include_answer,
    }


def base_location(model: str) -> str:
    """With local paths in full, so that the adapter finds them from anywhere; a hub id as it is."""
    return EncoderName.parse(model).absolute()
