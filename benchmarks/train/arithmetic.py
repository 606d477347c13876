"""FLOPs and memory of a step at the paper's shapes, by tensors without content: no GPU is needed to count.

The product's estimate of memory (`olavlm-train --dry-run`) takes one micro-batch forward and backward through the whole
model; the mode that adds up bytes there adds up FLOPs here.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

from olavlm.student.config import Recipe
from olavlm.student.memory import BatchShape, LiveBytes, estimate_memory
from olavlm.student.recipes import load_recipe
from olavlm.student.targets import task_spec

from ..extract.arithmetic import TEACHERS
from ..figures import Measurement, number
from .base_models import write_encoder, write_llm
from .scene import Scene
from .sizes import CACHED, SIZES, TOKENS, Size

TEXT, ANSWER = 89, 35
"""Tokens of a sample, `<image>` among them, and those supervised: sequences of 688 with image and task tokens."""
TFLOP = "TFLOP an image"


class _Both:
    """In the place of the mode that counts live bytes: it and PyTorch's counter of FLOPs at once."""

    flops = 0
    """Of the last that ended."""

    def __init__(self) -> None:
        self._live, self._counter = LiveBytes(), FlopCounterMode(display=False)

    def __enter__(self) -> _Both:
        with ExitStack() as stack:
            stack.enter_context(self._live)
            stack.enter_context(self._counter)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)
        _Both.flops = self._counter.get_total_flops()

    @property
    def peak(self) -> int:
        return self._live.peak


def measure(scene: Scene, device: str) -> list[Measurement]:
    size = scene.size if scene.size_name == "tiny" else SIZES["paper"]
    folder = scene.folder / "shapes"
    llm, encoder = write_llm(folder / "llm", size.llm), write_encoder(folder / "encoder", size.encoder)
    values, share = {}, {}
    for checkpointing in size.checkpointing:
        how = f"{'with' if checkpointing else 'without'} gradient checkpointing"
        for arm in (TOKENS, CACHED):
            said = {"model.llm": llm, "model.encoder": encoder, "data.file": "none", "data.images": "none"}
            said |= {"train.batch_size": size.batch, "train.gradient_checkpointing": str(checkpointing).lower()}
            recipe = load_recipe(size.recipe, [f"--{key}={value}" for key, value in said.items()], "pt")
            flops, gigabytes = _counted(recipe, size, distil=arm == CACHED)
            values[f"{arm}, {how}"] = {TFLOP: [round(flops / 1e12 / size.batch, 5)], "memory GB": [gigabytes]}
            share[arm] = flops
        share[how] = 1 - share[TOKENS] / share[CACHED]
    shares = "; ".join(f"{value:.1%} {how}" for how, value in share.items() if "checkpointing" in how)
    return [
        Measurement(
            f"{size.llm.title}, {size.encoder.title}, {size.batch} images a step, by arithmetic",
            values,
            of="tensors without content",
            notes=[
                f"Of *{CACHED}*, predictors and losses are {shares} of the FLOPs, and the step would take "
                f"{', '.join(number(1 / (1 - v)) for how, v in share.items() if 'checkpointing' in how)} times as long "
                "as without distillation if time went by them. Memory is the estimate of `olavlm-train --dry-run`."
            ],
        )
    ]


def _counted(recipe: Recipe, size: Size, *, distil: bool) -> tuple[int, float]:
    """FLOPs of a step, and its memory in GB."""
    specs = [task_spec(name, recipe.tasks[name], *_shape(name)) for name in recipe.task_order]
    shape = BatchShape(size.batch, TEXT, ANSWER, size.batch)
    options = {"vocabulary": size.llm.vocabulary, "distil": distil}
    with patch.object(sys.modules[estimate_memory.__module__], "LiveBytes", _Both):
        memory = estimate_memory(recipe, "pt", specs, shape, **options)
    return _Both.flops, round(memory.total / 1e9, 2)


def _shape(task: str) -> tuple[int, int]:
    return TEACHERS[task].tokens, TEACHERS[task].dim
