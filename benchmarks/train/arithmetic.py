"""FLOPs of a step at the paper's shapes, by tensors without content: no GPU is needed to count.

The product's estimate of memory (`olavlm-train --dry-run`) takes one micro-batch forward and backward through the whole
model; the mode that adds up bytes there adds up FLOPs here.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

from olavlm.student.config import Recipe
from olavlm.student.data.targets import task_spec
from olavlm.student.recipes import load_recipe
from olavlm.student.training.memory import BatchShape, estimate_memory

from ..extract.arithmetic import TEACHERS
from ..figures import Measurement, number
from .base_models import write_encoder, write_llm
from .scene import Scene
from .sizes import CACHED, SIZES, TOKENS, Size

TEXT, ANSWER = 89, 35
"""Tokens of a sample, `<image>` among them, and those supervised: sequences of 688 with image and task tokens."""
TFLOP = "TFLOP an image"


class _Flops(FlopCounterMode):
    """In the place of the mode that counts live bytes. The two at once would not do: this one keeps tensors alive."""

    total = 0
    """Of the last that ended."""
    peak = 0

    def __init__(self) -> None:
        super().__init__(display=False)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _Flops.total = self.get_total_flops()


def measure(scene: Scene, device: str) -> list[Measurement]:
    size = scene.size if scene.size_name == "tiny" else SIZES["paper"]
    folder = scene.folder / "shapes"
    llm, encoder = write_llm(folder / "llm", size.llm), write_encoder(folder / "encoder", size.encoder)
    values, notes = {}, []
    for checkpointing in size.checkpointing:
        how = f"{'with' if checkpointing else 'without'} gradient checkpointing"
        flops = {}
        for arm in (TOKENS, CACHED):
            said = {"model.llm": llm, "model.encoder": encoder, "data.file": "none", "data.images": "none"}
            said |= {"train.batch_size": size.batch, "train.gradient_checkpointing": str(checkpointing).lower()}
            recipe = load_recipe(size.recipe, [f"--{key}={value}" for key, value in said.items()], "pt")
            flops[arm] = _counted(recipe, size, distil=arm == CACHED)
            values[f"{arm}, {how}"] = {TFLOP: [round(flops[arm] / 1e12 / size.batch, 5)]}
        times = flops[CACHED] / flops[TOKENS]
        notes.append(
            f"{how.capitalize()}, predictors and losses are {1 - 1 / times:.1%} of the FLOPs of *{CACHED}*: by these "
            f"its step would take {number(times)} times as long as that of *{TOKENS}*."
        )
    title = f"{size.llm.title}, {size.encoder.title}, {size.batch} images a step"
    return [Measurement(title, values, of="tensors without content", notes=notes)]


def _counted(recipe: Recipe, size: Size, *, distil: bool) -> int:
    """FLOPs of a step."""
    specs = [task_spec(name, recipe.tasks[name], *_shape(name)) for name in recipe.task_order]
    shape = BatchShape(size.batch, TEXT, ANSWER, size.batch)
    with patch.object(sys.modules[estimate_memory.__module__], "LiveBytes", _Flops):
        estimate_memory(recipe, "pt", specs, shape, vocabulary=size.llm.vocabulary, distil=distil)
    return _Flops.total


def _shape(task: str) -> tuple[int, int]:
    return TEACHERS[task].tokens, TEACHERS[task].dim
