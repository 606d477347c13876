"""OlaVLM: a vision encoder, a projector, task tokens, a causal language model, and predictors of teacher features.

    model = OlaVLM.build(llm="meta-llama/Meta-Llama-3-8B-Instruct", encoder="openai/clip-vit-large-patch14-336",
                         tokenizer=tokenizer, tasks=[TaskSpec("depth", tokens=576, dim=1024, layers=(8, 20))])
    model.save_pretrained("checkpoint")
    model = OlaVLM.from_pretrained("checkpoint")

Source: arXiv 2412.09585. The parts are the library's own models.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from olavlm.student.answering import Answering, greedy_settings
from olavlm.student.assembly import (
    AssembledBatch,
    assemble,
    key_mask,
)
from olavlm.student.choices import Geometry
from olavlm.student.decoder import (
    capture_states,
    decoder_blocks,
    grow_vocabulary,
    head_is_plain,
    learned_positions,
    state_width,
    takes_positions,
)
from olavlm.student.errors import ModelError, RecipeError, SampleError
from olavlm.student.fused_teachers import encode_fused, in_order, load_fused
from olavlm.student.loading import load_complete, load_errors, refuse_missing
from olavlm.student.losses.text import text_loss_from_states, text_loss_sum
from olavlm.student.model_config import OlaVLMConfig
from olavlm.student.packing import packed_inputs, prepare_packing
from olavlm.student.placement import Inserted, PaddingSide, Placement, place
from olavlm.student.predictor import EmbeddingPredictor
from olavlm.student.projector import as_input_of, make_projector, num_image_tokens
from olavlm.student.run_files import shared_weights
from olavlm.student.text.conversation import (
    IMAGE_TOKEN,
    load_tokenizer,
    prepare_tokenizer,
)
from olavlm.student.text.templates import check_template
from olavlm.student.tokens import TaskSpec, TaskTokens
from olavlm.student.vision.encoders import VisionEncoder, load_image_transform

LOGIT_SCALE_INIT = 2.0
"""Initial value of the learnt s; similarities are multiplied by exp(s)."""


@dataclass
class OlaVLMOutput(ModelOutput):
    """What a forward gives."""

    logits: torch.Tensor | None = None
    """[B, L, V] over the assembled sequence; only without labels."""
    text_loss_sum: torch.Tensor | None = None
    """float32 scalar, summed over supervised tokens; only with labels."""
    predictions: dict[str, torch.Tensor] | None = None
    """For "task/layer": [B, n, D]. Rows that are not `complete` mean nothing, but are finite."""
    logit_scales: dict[str, torch.Tensor] | None = None
    """For each task with predictors: scalar s, a function of the parameter."""
    complete: torch.Tensor | None = None
    """bool [B]: rows with an image, of which nothing was cut off."""
    attention_mask: torch.Tensor | None = None
    """long [B, L] of the assembled sequence."""


class OlaVLM(Answering, PreTrainedModel):
    """The multimodal language model. `build` starts one from base checkpoints, `from_pretrained` reads a saved one.

    Args:
        config: shapes and choices.
        llm, vision: ready parts; random ones of the config's shapes when None.
    """

    config_class = OlaVLMConfig
    config: OlaVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = (r"^predictors\.", r"^logit_scales\.")  # of what is loaded without them
    _keep_in_fp32_modules_strict = ("projector", "task_tokens", "predictors", "logit_scales")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: OlaVLMConfig,
        llm: PreTrainedModel | None = None,
        vision: VisionEncoder | None = None,
    ) -> None:
        super().__init__(config)
        self.vision = vision or VisionEncoder.from_config(
            config.vision_config, config.select_layer, config.image_transform.size
        )
        self.llm = llm or AutoModelForCausalLM.from_config(config.text_config)
        self.tasks = config.task_specs
        width = state_width(self.llm)
        self.fused_teachers = config.teachers
        self.projector = make_projector(config.fusion, self.vision.grid, self.vision.width, self.fused_teachers, width)
        self._teachers: dict[str, Any] = {}  # no part of the module: they are frozen, and never saved
        self.task_tokens = TaskTokens(self.tasks, config.num_task_tokens, width)
        self.predictors = nn.ModuleDict()
        self.logit_scales = nn.ParameterDict()
        if config.with_predictors:
            num_blocks = len(decoder_blocks(self.llm))
            for task in self.tasks:
                for layer in task.layers:
                    if layer > num_blocks:
                        raise RecipeError(f"task {task.name}: layer {layer} of an LLM of {num_blocks} blocks")
                    self.predictors[_predictor_key(task.name, layer)] = self._predictor(task, width)
                if task.layers:
                    self.logit_scales[task.name] = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))
        self.head_is_plain: bool | None = None
        """Whether the LLM's logits are its head's of the last states, and no more; None until that is looked up."""
        self.packed = False
        """Whether `forward` runs the LLM without padding; `pack` sets it."""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """The one that the model was built or loaded with; `save_pretrained` writes it."""
        self.post_init()

    def _predictor(self, task: TaskSpec, llm_width: int) -> EmbeddingPredictor:
        latent = self.config.num_task_tokens == 0
        return EmbeddingPredictor(
            llm_width,
            task.dim,
            task.tokens,
            width=llm_width if task.predictor_width == "llm" and not latent else task.dim,
            latent=latent,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Own parts keep PyTorch's initialisation; the library's default would be another."""
        if isinstance(module, nn.Linear | nn.LayerNorm | TaskTokens | EmbeddingPredictor):
            module.reset_parameters()
        elif module is self.logit_scales:
            for scale in self.logit_scales.values():
                nn.init.constant_(scale, LOGIT_SCALE_INIT)

    @classmethod
    def build(
        cls,
        llm: str | Path,
        encoder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[TaskSpec] = (),
        *,
        geometry: Geometry = "square",
        select_layer: int = -2,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        **config: Any,
    ) -> "OlaVLM":
        """A model from a causal LM, a hub id or a folder, and a vision encoder (`encoder_name`); the rest starts anew.

        `<image>` and, if it lacks one, a padding token are added to `tokenizer`, in place. Vocabulary rows that this
        adds to the LLM, input and output, are the mean of the existing rows.

        Args:
            tasks: what is distilled, in the order of insertion.
            dtype: of LLM and encoder. Projector, task tokens, predictors and scales are float32, also once reloaded.
            attn_implementation: of LLM and encoder, in the library's terms.
            config: further fields of `OlaVLMConfig`.

        Raises:
            ModelError: a checkpoint that is missing, of another kind, or incomplete.
            RecipeError: a setting that cannot be used, with the rule.
        """
        prepare_tokenizer(tokenizer)
        check_template(config.get("template", OlaVLMConfig.template), tokenizer)
        transform = load_image_transform(encoder, geometry)
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        vision = VisionEncoder.from_pretrained(encoder, select_layer, **options)
        language_model = load_complete(AutoModelForCausalLM, llm, **options)
        language_model.generation_config = greedy_settings(language_model.generation_config)
        model = cls(
            OlaVLMConfig(
                text_config=language_model.config,
                vision_config=vision.tower.config,
                tasks=list(tasks),
                image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
                select_layer=select_layer,
                **transform.config_fields(),
                **config,
            ),
            llm=language_model,
            vision=vision,
        )
        grow_vocabulary(model.llm, 1 + max(tokenizer.get_vocab().values()))
        model.head_is_plain = head_is_plain(model.llm)
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> "OlaVLM":
        """The model of a checkpoint that `save_pretrained` wrote; arguments are the library's.

        The run folder of pt, which holds an adapter, gives that adapter on the base models it was trained on; `dtype`
        and `attn_implementation` apply then, and no others.

        Raises:
            ModelError: no checkpoint there, another kind of model, or weights missing from it.
            TypeError: another argument with an adapter.
        """
        from olavlm.student.adapter import ADAPTER_CONFIG, read_adapter

        with_info = kwargs.pop("output_loading_info", False)
        path = pretrained_model_name_or_path
        if (Path(path) / ADAPTER_CONFIG).is_file():
            if other := [*args, *(kwargs.keys() - {"dtype", "attn_implementation"})]:
                raise TypeError(f"{path} holds an adapter: dtype and attn_implementation apply, not {other[0]!r}")
            chosen = {name: value for name, value in kwargs.items() if value not in (None, "auto")}
            model, _ = read_adapter(Path(path)).build(**chosen)
            return (model, {"missing_keys": set()}) if with_info else model
        with load_errors(path):
            model_type = AutoConfig.from_pretrained(str(path)).model_type
        if model_type != cls.config_class.model_type:  # or a model of the default sizes would be made, at random
            raise ModelError(f"{path} holds a {model_type!r} model, not one of ours; give a run folder of olavlm-train")
        with load_errors(path, kwargs.get("attn_implementation")):
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        refuse_missing(path, info)
        with load_errors(path), suppress(OSError):  # without generation settings, those of the LLM's config stay
            model.llm.generation_config = GenerationConfig.from_pretrained(path)
        with suppress(ModelError):  # a folder without one is a model all the same
            model.tokenizer = load_tokenizer(path)
        model.head_is_plain = head_is_plain(model.llm)
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        with_predictors: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes config, safetensors, generation settings, image preprocessor and tokenizer.

        Args:
            tokenizer: instead of the model's own.
            with_predictors: False leaves predictors and logit scales out, and the config says so.
            state_dict: weights gathered elsewhere, instead of the model's own.
        """
        state = self.state_dict() if state_dict is None else state_dict
        kept = self.config.with_predictors
        if not with_predictors:
            state = {k: v for k, v in state.items() if not k.startswith(("predictors.", "logit_scales."))}
        self.config.with_predictors = kept and with_predictors
        try:
            with shared_weights(save_directory):
                super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)
        finally:
            self.config.with_predictors = kept
        self.llm.generation_config.save_pretrained(save_directory)
        self.config.image_transform.save(save_directory)
        if (tokenizer := tokenizer or self.tokenizer) is not None:
            tokenizer.save_pretrained(save_directory)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def load_teachers(self, models: Mapping[str, str | Path] | None = None) -> None:
        """Loads the teachers that a fusion baseline reads, on the model's device; nothing without fusion.

        Args:
            models: for some of `fused_teachers`, by name, a hub id or a folder instead of the recorded one.

        Raises:
            ModelError: a name that is none of them, a teacher that cannot be loaded, or one with other features than
                those of the training.
        """
        self._teachers = load_fused(self.fused_teachers, models or {}, self.device)

    def encode_teachers(self, *images: Image.Image) -> dict[str, torch.Tensor]:
        """What the teachers of a fusion baseline see in pictures, as `forward` takes it: float32 (B, n, D) by name.

        Empty without fusion. Loads them first unless `load_teachers` has.

        Raises:
            SampleError: features that are not finite.
            ModelError: teachers that cannot be loaded.
        """
        if self.fused_teachers and not self._teachers:
            self.load_teachers()
        return encode_fused(self._teachers, images, self.device)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that stand for an image, those of fused teachers included."""
        return num_image_tokens(self.config.fusion, self.vision.num_tokens, len(self.fused_teachers))

    @property
    def inserted(self) -> Inserted:
        """What takes the place of an `<image>`."""
        return Inserted(self.config.image_token_id, self.num_image_tokens, len(self.tasks), self.config.num_task_tokens)

    def pack(self, packing: bool | None) -> None:
        """Has `forward` run the LLM without padding, or not; None: where that is known to be faster (`packing`).

        `generate` stays padded, as is the `forward` of a model that this was not called on.

        Raises:
            ModelError: packing is asked for, and the LLM cannot; with the reason.
        """
        self.packed = prepare_packing(packing, self.llm)

    @property
    def longest_sequence(self) -> int:
        """Where sequences are cut: by the config, or where the LLM has no embeddings of positions any more."""
        positions = learned_positions(self.llm)
        longest = self.config.max_sequence_length
        return longest if positions is None else min(longest, positions)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        teacher_features: Mapping[str, torch.Tensor] | None = None,
        placement: Placement | None = None,
    ) -> OlaVLMOutput:
        """One pass over a batch of text with at most one image a sample.

        What comes out is padded on the side that the text is padded on: the left if any row has padding ahead of it.

        Args:
            input_ids: long (B, L), with `<image>` where a sample's image belongs.
            attention_mask: (B, L), 1 for text and 0 for padding; all 1 when None.
            labels: long (B, L), -100 where nothing is learnt; None gives logits instead of the text loss.
            pixel_values: float (B, 3, S, S), one row a sample; rows of samples without `<image>` are not read. None
                when no sample has one.
            image_features: float (B, tokens, width), what the encoder gives for `pixel_values`, in their place.
            teacher_features: of each of `fused_teachers`, by name: float (B, n, D), one row a sample; rows of samples
                without `<image>` are not read. Needed where `pixel_values` are.
            placement: `place(input_ids, attention_mask, labels, ...)` on the device, which a loader can make ahead of
                time; without one the ids are fetched from the device to make it.

        Raises:
            SampleError: more than one `<image>` in a sample, or one without what is to be seen of it.
        """
        placement = self._place(input_ids, attention_mask, labels) if placement is None else placement
        batch = self._assemble(input_ids, placement, pixel_values, teacher_features, image_features)
        layers = {layer for task in self.tasks for layer in task.layers} if len(self.predictors) else set()
        last, states, logits = self._run_llm(batch, layers, with_logits=labels is None)
        return OlaVLMOutput(
            logits=logits if labels is None else None,
            text_loss_sum=None if labels is None else self._text_loss_sum(last, logits, placement),
            predictions=self._predict(placement, states),
            logit_scales={name: scale.clone() for name, scale in self.logit_scales.items()},
            complete=placement.complete,
            attention_mask=placement.attention_mask,
        )

    @torch.no_grad()
    def states(
        self,
        layers: set[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        teacher_features: Mapping[str, torch.Tensor] | None = None,
        placement: Placement | None = None,
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """States [B, L, H] of the wanted layers, counted from 1, in one pass, and bool [B, L], False at padding.

        Inputs are those of `forward`. The states have no graph.
        """
        placement = self._place(input_ids, attention_mask) if placement is None else placement
        batch = self._assemble(input_ids, placement, pixel_values, teacher_features)
        _, states, _ = self._run_llm(batch, layers, with_logits=False)
        return states, placement.attention_mask.bool()

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        teacher_features: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New token ids (B, new tokens), by the LLM's own `generate`, which takes the further arguments.

        Inputs are those of `forward`, padded on either side.
        """
        placement = self._place(input_ids, attention_mask, cut=False, padding_side="left")
        batch = self._assemble(input_ids, placement, pixel_values, teacher_features)
        return self.llm.generate(inputs_embeds=batch.embeds, attention_mask=placement.attention_mask, **kwargs)

    def _place(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        cut: bool = True,
        padding_side: PaddingSide | None = None,
    ) -> Placement:
        """The placement of a batch on any device, cut to the longest sequence unless it is to be gone on with."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = self.longest_sequence if cut else None
        return place(input_ids, mask, labels, self.inserted, length, padding_side).to(input_ids.device)

    def _assemble(
        self,
        input_ids: torch.Tensor,
        placement: Placement,
        pixel_values: torch.Tensor | None = None,
        teacher_features: Mapping[str, torch.Tensor] | None = None,
        image_features: torch.Tensor | None = None,
    ) -> AssembledBatch:
        text = self.llm.get_input_embeddings()(input_ids.flatten().index_select(0, placement.text_tokens))
        rows = placement.image_rows
        if len(rows):
            first = next(row for row, layout in enumerate(placement.layouts) if layout.image is not None)
            given = pixel_values if image_features is None else image_features
            if given is None:
                raise SampleError(f"row {first} has {IMAGE_TOKEN}, but no pixel_values are given")
            fused = in_order(self.fused_teachers, teacher_features or {}, first)
            if len(rows) < len(placement.layouts):
                given, *fused = (values.index_select(0, rows) for values in (given, *fused))
            features = self.vision(given) if image_features is None else given
            images = self.projector(features, *fused)
        else:
            nothing = [(self.vision.num_tokens, self.vision.width), *((t.tokens, t.dim) for t in self.fused_teachers)]
            images = self.projector(*(text.new_zeros(1, *shape) for shape in nothing))[:0]
        return assemble(text, images.to(text), self.task_tokens().to(text), placement)

    def _run_llm(
        self, batch: AssembledBatch, layers: set[int], with_logits: bool
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor | None]:
        """Final states [B, L, H], states after the wanted blocks, and logits if wanted or if the head is not plain.

        What they hold at padding means nothing: zeros if packed.
        """
        if self.head_is_plain is None:
            self.head_is_plain = head_is_plain(self.llm)
        with capture_states(self.llm, layers) as states:
            if with_logits or not self.head_is_plain:
                logits = self.llm(**self._llm_inputs(batch), use_cache=False).logits
            else:
                self.llm.get_decoder()(**self._llm_inputs(batch), use_cache=False)
                logits = None
        # Reentrant gradient checkpointing may cut the states off the graph, and with them the predictors' gradient.
        cut = [layer for layer, state in states.items() if batch.embeds.requires_grad and not state.requires_grad]
        assert not cut, f"states of layers {cut} are outside the graph; use non-reentrant gradient checkpointing"
        if self.packed:
            padded = {id(state): _padded(state, batch.placement) for state in states.values()}  # the last may be twice
            states = {layer: padded[id(state)] for layer, state in states.items()}
            logits = None if logits is None else _padded(logits, batch.placement)
        last = states.pop("last")
        return last, states, logits

    def _llm_inputs(self, batch: AssembledBatch) -> dict[str, Any]:
        placement = batch.placement
        if self.packed:
            packed = batch.embeds.flatten(0, 1).index_select(0, placement.tokens)[None]
            return {"inputs_embeds": packed, **packed_inputs(self.llm, placement.lengths, placement.positions)}
        if placement.padding_side == "right":
            # No token sees padding behind it: without a mask all are the same, and attention has its fastest kernel.
            return {"inputs_embeds": batch.embeds}
        inputs = {"inputs_embeds": batch.embeds, "attention_mask": placement.attention_mask}
        if takes_positions(self.llm):  # or it would count the padding ahead
            inputs["position_ids"] = (placement.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return inputs

    def _text_loss_sum(self, last: torch.Tensor, logits: torch.Tensor | None, placement: Placement) -> torch.Tensor:
        """Next-token cross-entropy, with vocabulary logits at labelled positions alone; padding predicts nothing."""
        if logits is not None:
            return text_loss_sum(logits.flatten(0, 1).index_select(0, placement.predicting), placement.predicted)
        states = last.flatten(0, 1).index_select(0, placement.predicting)
        vocabulary = self.llm.config.get_text_config().vocab_size
        return text_loss_from_states(self.llm.get_output_embeddings(), states, placement.predicted, vocabulary)

    def _predict(self, placement: Placement, states: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predictions by "task/layer", one predictor after the other.

        The layers of a task have predictors of equal shapes, and batching their products was tried: no gain on a CPU
        beyond what repetitions differ by (`benchmarks/forward`: 0.8 and 1.1 times the speed), since each product alone
        is large: 9,216 x 4,096 x 4,096 for 16 samples of the paper's depth task, which fills a GPU too. Nor are masked
        keys left out ahead of the projection: they are the other tasks' 16 tokens of some 700, and padding.
        """
        predictions = {}
        for index, task in enumerate(self.tasks):
            if not states:
                break
            mask = key_mask(placement, index, self.config.key_blocks, self.config.include_answer)
            for layer in task.layers:
                predictor = self.predictors[_predictor_key(task.name, layer)]
                keys = as_input_of(predictor.in_proj.weight, states[layer])
                queries = self._queries(index, keys, placement)
                predictions[f"{task.name}/{layer}"] = predictor(keys, queries, mask)
        return predictions

    def _queries(self, index: int, keys: torch.Tensor, placement: Placement) -> torch.Tensor | None:
        """Queries of a task: [1, Q, H] raw, [B, N, H] contextual, None for a predictor with latents."""
        task = self.tasks[index]
        if self.config.num_task_tokens == 0:
            return None
        if task.tokens > 1 or self.config.gen_query == "raw":
            return self.task_tokens.queries(task.name)[None]
        # A sample without the task's tokens, whose prediction is not used, reads its first positions instead.
        offsets = torch.arange(self.config.num_task_tokens, device=keys.device)
        positions = placement.task_starts[:, index, None] + offsets
        positions = positions.clamp(max=keys.shape[1] - 1)  # [B, N]
        return keys.gather(1, positions[..., None].expand(-1, -1, keys.shape[-1]))


def _padded(packed: torch.Tensor, placement: Placement) -> torch.Tensor:
    """[1, tokens, ...] to [b, L, ...], zeros at padding."""
    b, length = placement.shape
    rows = packed.new_zeros(b * length, *packed.shape[2:]).index_copy_(0, placement.tokens, packed[0])
    return rows.view(b, length, *packed.shape[2:])


def _predictor_key(task: str, layer: int) -> str:
    return f"{task}_{layer}"


AutoModel.register(OlaVLMConfig, OlaVLM, exist_ok=True)
AutoModelForImageTextToText.register(OlaVLMConfig, OlaVLM, exist_ok=True)
