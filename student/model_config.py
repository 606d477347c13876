"""The model's config: all that rebuilds an `OlaVLM` around its weights, as `config.json` keeps it."""

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

import olavlm.student.vision.tower_configs  # noqa: F401  a saved config may name one of them
from olavlm.student.assembly import check_key_blocks
from olavlm.student.choices import Fusion, Geometry, KeyBlocks, QueryKind
from olavlm.student.errors import RecipeError
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.projector import check_fusion
from olavlm.student.text.templates import check_template
from olavlm.student.tokens import TaskSpec
from olavlm.student.vision.image_transform import ImageTransform


class OlaVLMConfig(PreTrainedConfig):
    """Everything that rebuilds the model around its weights.

    Args:
        text_config, vision_config: configs of the language model and of the vision tower.
        tasks: `TaskSpec` fields of each task, in the order in which their tokens are inserted.
        num_task_tokens: N, tokens inserted for each task; 0 for none.
        with_predictors: whether predictors and logit scales are part of the model; a finetuned model has none.
        gen_query: queries of tasks with one teacher token: `contextual`, the layer's states at the task's tokens, or
            `raw`, the parameter itself.
        key_blocks, include_answer: what predictors attend to (`olavlm.student.assembly.key_mask`).
        fusion, fused_teachers: how features of teachers are fused with the encoder's (`olavlm.student.projector`), and
            `FusedTeacher` fields of each, in their order; none in the method itself, which runs no teacher.
        image_token_id: id of `<image>`.
        select_layer: hidden state of the vision tower.
        template: prompt template the model is trained with.
        geometry, image_size, image_mean, image_std, image_interpolation: image transform the model is trained with; by
            default the size of `vision_config` and CLIP's pixels.
        max_sequence_length: longest sequence in training, inserted tokens included; the rest is cut.
    """

    model_type = "olavlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    tasks: list | None = None
    num_task_tokens: int = 8
    with_predictors: bool = True
    gen_query: QueryKind = "contextual"
    key_blocks: KeyBlocks = "sys+img+t+txt"
    include_answer: bool = True
    fusion: Fusion = "none"
    fused_teachers: list | None = None
    image_token_id: int = 0
    select_layer: int = -2
    template: str = "llama_3"
    geometry: Geometry = "square"
    image_size: int | None = None
    image_mean: list | None = None
    image_std: list | None = None
    image_interpolation: str = "bicubic"
    max_sequence_length: int = 4096
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _as_config(self.text_config, LlamaConfig)
        self.vision_config = _as_config(self.vision_config, CLIPVisionConfig)
        self.tasks = [task.to_dict() if isinstance(task, TaskSpec) else task for task in self.tasks or []]
        if self.gen_query not in ("contextual", "raw"):
            raise RecipeError(f"gen_query={self.gen_query!r} must be one of contextual, raw")
        check_key_blocks(self.key_blocks)
        self.fused_teachers = [t.to_dict() if isinstance(t, FusedTeacher) else t for t in self.fused_teachers or []]
        check_fusion(self.fusion, self.teachers)
        check_template(self.template)
        # The base class would set the parts' attention to this config's own, which is none.
        parts = {name: getattr(self, name)._attn_implementation for name in self.sub_configs}
        super().__post_init__(**{"attn_implementation": parts} | kwargs)

    @property
    def task_specs(self) -> tuple[TaskSpec, ...]:
        """The tasks, in the order of insertion."""
        return tuple(TaskSpec.from_dict(task) for task in self.tasks)

    @property
    def teachers(self) -> tuple[FusedTeacher, ...]:
        """Those whose features are fused with the encoder's, in their order."""
        return tuple(FusedTeacher.from_dict(teacher) for teacher in self.fused_teachers)

    @property
    def image_transform(self) -> ImageTransform:
        """What turns an image into `pixel_values`."""
        given = {"mean": self.image_mean, "std": self.image_std}
        return ImageTransform(
            self.image_size or self.vision_config.image_size,
            geometry=self.geometry,
            interpolation=self.image_interpolation,
            **{name: tuple(values) for name, values in given.items() if values},
        )


def _as_config(config: dict | PreTrainedConfig | None, default: type[PreTrainedConfig]) -> PreTrainedConfig:
    if config is None:
        return default()
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


AutoConfig.register(OlaVLMConfig.model_type, OlaVLMConfig, exist_ok=True)
