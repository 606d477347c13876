"""Stock LLaVA as a starting point: a `LlavaForConditionalGeneration` checkpoint becomes an `OlaVLM` of its weights.

    converted = from_llava_hf("llava-hf/llava-1.5-7b-hf")
    converted.model.save_pretrained("start")

Without task tokens (N = 0) the two give the same logits. What would make them differ is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from olavlm.student.answering import greedy_settings
from olavlm.student.decoder import grow_vocabulary, head_is_plain
from olavlm.student.errors import ModelError, RecipeError, StudentError
from olavlm.student.loading import load_complete, load_errors
from olavlm.student.model import OlaVLM
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.text.chat_template import IMAGE_TOKEN, check_chat_template
from olavlm.student.text.conversation import encode, encode_prompt, load_tokenizer, terminator_id
from olavlm.student.text.templates import CHAT, TEMPLATES, check_template
from olavlm.student.vision.encoders import VisionEncoder
from olavlm.student.vision.transformers_encoders import FAMILIES

from .llava_images import read_image_transform

MODEL_TYPE = LlavaConfig.model_type


@dataclass
class Converted:
    """A model that was read from elsewhere, its tokenizer with it."""

    model: OlaVLM
    notes: list[str] = field(default_factory=list)
    """What had to be chosen on the way, for the user to know."""


def from_llava_hf(source: str | Path, template: str | None = None) -> Converted:
    """Reads a stock LLaVA checkpoint, a hub id or a folder, in the dtype it is stored in.

    Args:
        template: prompt template; by default the one that the checkpoint's chat template writes (`template_of`).

    Raises:
        ModelError: no such checkpoint, or one that computes what ours does not.
        RecipeError: a template that is unknown or that cannot be masked exactly.
    """
    with load_errors(source):
        config = AutoConfig.from_pretrained(str(source))
    check_config(config, source)
    tokenizer = _tokenizer(source, config)
    transform, notes = read_image_transform(source, config.vision_config)
    if template is None:
        template, reasons = template_of(tokenizer)
        notes += reasons
    else:
        check_template(template, tokenizer)
    if written := _behind_image(tokenizer, config.image_token_id, template):
        notes.append(
            f"template {template} writes {written[0]} to {written[-1]} behind an image: they stay vocabulary rows, and "
            "the model has no task tokens of its own"
        )
    stock = load_complete(LlavaForConditionalGeneration, source, dtype="auto")
    llm = causal_lm(stock)
    vision = VisionEncoder(stock.model.vision_tower, config.vision_feature_layer, transform.size)
    model = OlaVLM(
        OlaVLMConfig(
            text_config=llm.config,
            vision_config=vision.tower.config,
            num_task_tokens=0,
            with_predictors=False,
            image_token_id=config.image_token_id,
            select_layer=config.vision_feature_layer,
            template=template,
            max_sequence_length=getattr(llm.config, "max_position_embeddings", None) or 4096,
            **transform.config_fields(),
        ),
        llm=llm,
        vision=vision,
    )
    _copy_projector(stock.model.multi_modal_projector, model.projector)
    rows = llm.get_input_embeddings().num_embeddings
    grow_vocabulary(llm, 1 + max(tokenizer.get_vocab().values()))
    if (added := llm.get_input_embeddings().num_embeddings - rows) > 0:
        notes.append(f"vocabulary: {added} rows more than the checkpoint's {rows}, for tokens that have none there")
    model.head_is_plain = True
    model.tokenizer = tokenizer
    return Converted(model.eval(), notes)


def check_config(config: object, source: str | Path) -> None:
    """ModelError for a config of another model, or of a LLaVA that computes what ours does not."""
    if getattr(config, "model_type", None) != MODEL_TYPE:
        raise ModelError(
            f"{source} holds a {getattr(config, 'model_type', None)!r} model, not {MODEL_TYPE!r}: give a checkpoint of "
            "LlavaForConditionalGeneration"
        )
    tower = config.vision_config
    if tower.model_type not in FAMILIES:
        raise ModelError(f"{source}: vision tower {tower.model_type!r} is not supported; {', '.join(FAMILIES)} are")
    if not isinstance(config.vision_feature_layer, int):
        raise ModelError(
            f"{source}: vision_feature_layer is {list(config.vision_feature_layer)}; ours projects the features of one "
            "layer, and this projector reads several side by side"
        )
    kept = "default" if _prefix_tokens(tower) else "full"
    if config.vision_feature_select_strategy != kept or _prefix_tokens(tower) > 1:
        raise ModelError(
            f"{source}: vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, and the tower "
            f"{tower.model_type!r} has {_prefix_tokens(tower)} tokens ahead of its patches; ours projects patches alone"
            + (f", as {kept!r} does" if _prefix_tokens(tower) < 2 else "")
        )
    if config.projector_hidden_act != "gelu":
        raise ModelError(f"{source}: projector_hidden_act is {config.projector_hidden_act!r}; ours is 'gelu'")


def _prefix_tokens(tower: object) -> int:
    return FAMILIES[tower.model_type].num_prefix_tokens + getattr(tower, "num_register_tokens", 0)


def causal_lm(stock: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model and its head as the library's causal LM, on the same tensors.

    Raises:
        ModelError: a causal LM of this kind does more than the two, such as scaling its logits.
    """
    text_config = stock.config.text_config
    text_config.tie_word_embeddings = stock.config.tie_word_embeddings
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text_config)
    decoder = stock.model.language_model
    if type(getattr(llm, llm.base_model_prefix, None)) is not type(decoder):
        raise ModelError(
            f"{type(llm).__name__} keeps no {type(decoder).__name__}; this language model is not supported"
        )
    names = set(llm.state_dict())
    setattr(llm, llm.base_model_prefix, decoder)
    llm.set_output_embeddings(stock.lm_head)
    llm.config = decoder.config
    llm.generation_config = greedy_settings(stock.generation_config)
    more = sorted(names - set(llm.state_dict())) + [name for name, p in llm.named_parameters() if p.is_meta]
    if more or not head_is_plain(llm):
        what = f"has {more[0]}" if more else "scales, caps or shifts its logits"
        raise ModelError(
            f"{type(llm).__name__} {what}, which stock LLaVA leaves out; this language model is not supported"
        )
    return llm


@torch.no_grad()
def _copy_projector(stock: nn.Module, projector: nn.Sequential) -> None:
    for theirs, ours in ((stock.linear_1, projector[0]), (stock.linear_2, projector[2])):
        ours.weight.copy_(theirs.weight)
        if theirs.bias is None:
            ours.bias.zero_()
        else:
            ours.bias.copy_(theirs.bias)


def _tokenizer(source: str | Path, config: LlavaConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with the chat template of its processor, which is what its users see."""
    tokenizer = load_tokenizer(source)
    ours = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if ours != config.image_token_id:
        raise ModelError(
            f"{source}: image_token_index is {config.image_token_id}, and {IMAGE_TOKEN} has the id {ours} in the "
            f"tokenizer; save the checkpoint with a tokenizer whose image token is {IMAGE_TOKEN}"
        )
    with suppress(OSError):  # without a processor, the tokenizer's own template stays
        chat_template = ProcessorMixin.get_processor_dict(str(source))[0].get("chat_template")
        if isinstance(chat_template, dict):
            chat_template = chat_template.get("default")
        tokenizer.chat_template = chat_template or tokenizer.chat_template
    return tokenizer


_PICTURE = [{"from": "human", "value": f"{IMAGE_TOKEN}\nWhat is this?"}, {"from": "gpt", "value": "A cup."}]
_WORDS = [{"from": "human", "value": "Is it full?"}, {"from": "gpt", "value": "Yes, of tea."}]
_PROBES = (_PICTURE, _WORDS, [*_PICTURE, *_WORDS])


def template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The name of the template that a tokenizer's chat template writes, and what to say about the choice.

    A named template if prompts and labels are the same token by token; else `chat`, the tokenizer's own. Where that
    cannot be trained with, as with LLaVA-1.5's, which writes no end of an answer, the template of LLaVA whose
    terminator is a token of this tokenizer.

    Raises:
        RecipeError: neither.
    """
    chats = [name for name, template in TEMPLATES.items() if template.chat]
    own = _prompts(tokenizer, CHAT)
    for name in chats:
        if own is not None and _prompts(tokenizer, name) == own:
            return name, []
    try:
        check_chat_template(tokenizer)
        return CHAT, []
    except RecipeError as error:
        reason = str(error).removeprefix("template chat: ").partition(";")[0]
    for name in chats:
        if terminator_id(tokenizer, name) in tokenizer.added_tokens_decoder:
            return name, [f"template: {name}, by the tokenizer's tokens, for {reason}; --template names another"]
    raise RecipeError(f"{reason}; name the prompt template that the model was trained with: --template NAME")


def _behind_image(tokenizer: PreTrainedTokenizerBase, image_token_id: int, template: str) -> list[str]:
    """The added tokens that a template writes right behind an image, as that of an exported model does."""
    ids = encode_prompt(tokenizer, _PICTURE[:1], template)
    behind = takewhile(tokenizer.added_tokens_decoder.__contains__, ids[ids.index(image_token_id) + 1 :])
    return tokenizer.convert_ids_to_tokens(list(behind))


def _prompts(tokenizer: PreTrainedTokenizerBase, template: str) -> Sequence[object] | None:
    """Ids and labels of some dialogues, and the ids of prompts to continue; None if the template cannot give them."""
    try:
        whole = [encode(tokenizer, turns, template) for turns in _PROBES]
        return whole + [encode_prompt(tokenizer, turns[:-1], template) for turns in _PROBES]
    except StudentError:
        return None
