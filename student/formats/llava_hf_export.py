"""Our models as stock LLaVA: a `LlavaForConditionalGeneration` and its `LlavaProcessor`, which need none of our code.

    to_llava_hf(*load_checkpoint("runs/ift")).save("exported")

Task tokens become vocabulary rows, put behind the image by the chat template, so that logits over the original
vocabulary are the same. What stock LLaVA would compute otherwise is refused, with the reason.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from olavlm.student.decoder import head_is_plain
from olavlm.student.errors import ModelError
from olavlm.student.model import OlaVLM
from olavlm.student.run_files import shared_weights
from olavlm.student.text.templates import CHAT, get_template
from olavlm.student.vision.image_transform import ImageTransform
from olavlm.student.vision.transformers_encoders import FAMILIES

from .llava_hf import causal_lm
from .llava_hf_tokenizer import ExportedTokenizer, export_tokenizer, generic_tokenizer_class, task_token_names

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Of the base encoders those that stock LLaVA runs everywhere."""


@dataclass
class Exported:
    """A stock model with all that is saved beside it."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    text: ExportedTokenizer
    notes: list[str] = field(default_factory=list)
    """What its users should know, a sentence each."""

    def save(self, folder: str | Path) -> None:
        """Writes weights, configs, processor, tokenizer and chat template."""
        with shared_weights(folder):
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        generic_tokenizer_class(Path(folder))


@torch.no_grad()
def to_llava_hf(model: OlaVLM, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None) -> Exported:
    """A stock model on the weights of ours, which is used up.

    Args:
        dtype: of all weights; by default that of the language model's.

    Raises:
        ModelError: why stock LLaVA cannot hold the model.
    """
    check_exportable(model)
    config, llm = model.config, model.llm
    text = export_tokenizer(
        tokenizer, config.template, task_token_names(model.task_tokens.names, config.num_task_tokens)
    )
    ids = text.tokenizer.convert_tokens_to_ids(text.task_tokens)
    dtype = dtype or llm.dtype
    parts = {"language model": llm.dtype, "projector and task tokens": model.projector[0].weight.dtype}
    notes = [f"{part}: {_name(dtype)}, and {_name(own)} in the run" for part, own in parts.items() if own != dtype]
    if end := model.written_end(tokenizer):
        notes.append(f"answers end with {end}, several tokens here: generate with stop_strings=[{end!r}]")
    rows = model.task_tokens().to(llm.get_input_embeddings().weight.dtype)
    ends = model.stop_ids(tokenizer)
    never_written = config.image_token_id if tokenizer.pad_token_id in ends else tokenizer.pad_token_id
    _grow(llm, ids, rows, like=never_written)
    stock = _assemble(model)
    causal_lm(stock)  # refuses what the decoder and the head alone do not compute
    stock = stock.to(dtype).eval()
    for part in (stock.config, stock.config.text_config, stock.config.vision_config):
        part.dtype = dtype  # servers read that of a part, too
    worst = next((name for name, w in stock.named_parameters() if not w.isfinite().all()), None)
    if worst is not None:
        raise ModelError(f"{worst} has values that are not finite in {_name(dtype)}; use --dtype bfloat16 or float32")
    stock.generation_config = GenerationConfig(
        bos_token_id=text.tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=text.tokenizer.pad_token_id,
        suppress_tokens=sorted({*model.never_said(), *ids}),
    )
    return Exported(
        stock, _processor(stock.config, model.config.image_transform, text.tokenizer), text, [*notes, *_notes(text)]
    )


def check_exportable(model: OlaVLM) -> None:
    """ModelError for a model that stock LLaVA computes otherwise, as far as its config says."""
    config, tower = model.config, model.vision.tower.config
    if config.fusion != "none":
        raise ModelError(
            f"the model is a fusion baseline ({config.fusion}): it reads features of its teachers, and stock LLaVA "
            "runs one encoder"
        )
    if tower.model_type not in TOWERS:
        raise ModelError(
            f"the encoder is a {tower.model_type!r}; stock LLaVA runs those of type CLIP and SigLIP "
            f"({', '.join(TOWERS)})"
        )
    if model.vision.image_size != tower.image_size:
        raise ModelError(
            f"the encoder sees pictures of {model.vision.image_size} pixels and was made for {tower.image_size}: stock "
            "LLaVA resizes no position embeddings"
        )
    if config.template != CHAT and not get_template(config.template).chat:
        raise ModelError(
            f"template {config.template!r} has no roles to answer in; a model with a chat template exports"
        )
    if not (model.head_is_plain or head_is_plain(model.llm)):
        raise ModelError(
            f"{type(model.llm).__name__} scales, caps or shifts its logits, which stock LLaVA leaves out; this "
            "language model is not supported"
        )


def _processor(config: LlavaConfig, transform: ImageTransform, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    return LlavaProcessor(
        LlavaImageProcessorPil(**transform.library_settings()),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=FAMILIES[config.vision_config.model_type].num_prefix_tokens,
        chat_template=tokenizer.chat_template,
    )


def _grow(llm: PreTrainedModel, ids: list[int], rows: torch.Tensor, like: int) -> None:
    """Vocabulary rows for the task tokens: `rows` [T*N, H] to read, those of the token `like` to write. Unties them.

    Raises:
        ModelError: an embedding that does more than scale its rows.
    """
    read, write = llm.get_input_embeddings(), llm.get_output_embeddings()
    size = max(read.num_embeddings, *(1 + i for i in ids)) if ids else read.num_embeddings
    write.weight = nn.Parameter(_resized(write.weight, size), requires_grad=False)
    read.weight = nn.Parameter(_resized(read.weight, size), requires_grad=False)
    read.num_embeddings = write.out_features = size
    if not ids:
        return
    at = torch.tensor(ids)
    write.weight[at] = write.weight[like].clone()
    read.weight[at] = 1
    scale = read(at)  # 1, but for models that scale what they look up
    read.weight[at] = rows / scale
    if not torch.allclose(read(at), rows, rtol=torch.finfo(rows.dtype).eps * 4):
        raise ModelError(f"{type(read).__name__} does more than look rows up; this language model is not supported")


def _resized(weight: torch.Tensor, size: int) -> torch.Tensor:
    grown = weight.new_zeros(size, weight.shape[1])
    grown[: len(weight)] = weight
    return grown


def _assemble(model: OlaVLM) -> LlavaForConditionalGeneration:
    """The stock model around our parts; ModelError for an LLM whose decoder is not the library's own for its config."""
    llm, tower, projector = model.llm, model.vision.tower, model.projector
    text_config = _plain_copy(llm.config)
    text_config.vocab_size, text_config.tie_word_embeddings = llm.get_input_embeddings().num_embeddings, False
    text_config.architectures = [type(llm).__name__]  # by which servers choose their own implementation
    prefix = FAMILIES[tower.config.model_type].num_prefix_tokens
    config = LlavaConfig(
        text_config=text_config,
        vision_config=_plain_copy(tower.config),
        image_token_index=model.config.image_token_id,
        image_seq_length=model.vision.num_tokens,
        vision_feature_layer=model.config.select_layer,
        vision_feature_select_strategy="default" if prefix else "full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )
    decoder = llm.base_model
    with torch.device("meta"):
        wanted = type(AutoModel.from_config(text_config))
        if wanted is not type(decoder) or decoder is llm:
            raise ModelError(
                f"{type(llm).__name__} keeps no {wanted.__name__}, which stock LLaVA runs; this language model is not "
                "supported"
            )
        stock = LlavaForConditionalGeneration(config)
    stock.model.language_model, stock.model.vision_tower = decoder, tower
    stock.model.multi_modal_projector.linear_1 = projector[0]
    stock.model.multi_modal_projector.linear_2 = projector[2]
    stock.lm_head.weight = llm.get_output_embeddings().weight
    return stock


def _plain_copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without where it was read from, which is saved with some."""
    fields = copy.deepcopy(config).to_dict()
    fields.pop("_name_or_path", None)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes(text: ExportedTokenizer) -> list[str]:
    """What matters to whoever writes prompts without the chat template."""
    notes, beginning = [], text.beginning
    if text.task_tokens:
        tokens = f"{text.task_tokens[0]} to {text.task_tokens[-1]}"
        notes.append(
            f"a prompt without the chat template gets the task tokens, {tokens}, from the tokenizer, behind an <image> "
            "that does not end it"
            if text.image_alone
            else f"a prompt without the chat template has to have the task tokens, {tokens}, behind its <image>"
        )
    if beginning and text.writes_beginning:
        notes.append(
            f"the chat template writes {beginning} and the tokenizer does not add it: a prompt without the template "
            "has to begin with it"
        )
    elif beginning:
        notes.append(
            f"the tokenizer adds {beginning} and the chat template does not write it: let special tokens be added to "
            "what the template gives"
        )
    return notes
