"""The arms: one optimizer step of PT, made of the trainer's own parts, with targets from different places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from olavlm.student.config import Recipe
from olavlm.student.data import Collator, batches, make_sampler
from olavlm.student.parallel import spread
from olavlm.student.stages import apply_stage
from olavlm.student.step import OptimizerStep
from olavlm.student.targets import OnlineTargets, TargetSource, open_targets, tokens_without_losses
from olavlm.student.task import DistillTask
from olavlm.student.trainer import open_data, start_model

from .scene import Scene
from .sizes import CACHED, ONE, ONLINE, PLAIN, TOKENS

STEPS = 10**4  # more than any arm takes

_OVERRIDES: dict[str, dict[str, object]] = {
    PLAIN: {f"tasks.{task}": "null" for task in ("gen", "depth", "seg")},
    TOKENS: {"losses.stages": "[]"},
    CACHED: {},
    ONLINE: {"targets.source": "online"},
    ONE: {"targets.source": "online"},
}


def recipe_of(scene: Scene, arm: str, checkpointing: bool, overrides: Mapping[str, object] | None = None) -> Recipe:
    """The scene's recipe as the arm has it. `TOKENS` has the same sequence as the arms with losses."""
    run = f"{arm}, {'with' if checkpointing else 'without'} checkpointing"
    own = {"train.gradient_checkpointing": str(checkpointing).lower(), **_OVERRIDES[arm]}
    return scene.recipe(run, own | dict(overrides or {}))


class OneAtATime:
    """The teachers as the public code runs them: each image prepared and computed alone, on the thread that trains.

    It is spared what the public code does beside: reading and decoding, which the loaders do, its slower preparation
    (it uses ours), and the decoders.

    Args:
        online: whose teachers it runs.
    """

    def __init__(self, online: OnlineTargets) -> None:
        self.online, self.specs, self.cards = online, online.specs, online.cards

    def load(self, images: Sequence[str | None]) -> dict:
        """Decoded photographs, which all have one size here, as uint8 (b, H, W, 3)."""
        assert None not in images, "every sample of the benchmark has an image"
        stack = torch.from_numpy(np.stack([np.asarray(self.online.roots.open(image)) for image in images]))
        first, *others = self.online.teachers
        valid = torch.ones(len(images), dtype=torch.bool)
        return {first: ({"pictures": stack}, valid)} | {name: ({}, valid) for name in others}

    def finish(self, loaded: dict, device: torch.device) -> tuple[dict, dict]:
        targets: dict[str, list[torch.Tensor]] = {name: [] for name in self.online.teachers}
        parts, _ = next(iter(loaded.values()))
        for pixels in parts["pictures"].numpy():
            picture = Image.fromarray(pixels)
            for name, teacher in self.online.teachers.items():
                prepared = torch.from_numpy(teacher.prepare(picture)[None])
                targets[name].append(teacher.forward(prepared.to(device)))
        valid = {name: rows.to(device) for name, (_, rows) in loaded.items()}
        return {name: torch.cat(rows) for name, rows in targets.items()}, valid


def open_source(
    arm: str, recipe: Recipe, device: torch.device, online: OnlineTargets | None = None
) -> TargetSource | None:
    """Where the arm's targets come from, None where there is no loss. Teachers that are `online` already serve both."""
    if not recipe.distils("pt"):
        return None
    if arm not in (ONLINE, ONE):
        return open_targets(recipe, device)
    online = online or OnlineTargets(recipe, device)
    return OneAtATime(online) if arm == ONE else online


class OpenArm:
    """An arm ready to take steps. `seconds()` takes one and returns what it took, the wait for data included."""

    def __init__(
        self,
        scene: Scene,
        arm: str,
        accelerator: Accelerator,
        checkpointing: bool,
        workers: int,
        online: OnlineTargets | None,
    ) -> None:
        recipe = recipe_of(scene, arm, checkpointing)
        distil, self.device = recipe.distils("pt"), accelerator.device
        dataset, roots = open_data(recipe)
        self.source = open_source(arm, recipe, self.device, online)
        specs = self.source.specs if distil else tokens_without_losses(recipe) if recipe.tasks else []
        self.model, tokenizer = start_model(recipe, "pt", specs, [], distil)
        apply_stage(self.model, "pt", distil=distil)
        if checkpointing:
            self.model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parallel = spread(self.model, accelerator, recipe.train)
        losses = recipe.losses
        kept = self.model.tasks if distil else []
        self.task = DistillTask(kept, losses.contrastive, losses.contrastive_weight, losses.kernels)
        self.step = OptimizerStep(recipe, accelerator, self.parallel, self.source, self.task)
        self.loading = batches(
            Collator.of(recipe, self.model, tokenizer, dataset, roots, self.source),
            make_sampler(recipe, dataset, self.source, recipe.train.batch_size),
            range(STEPS),
            rank=0,
            world_size=1,
            accumulation=1,
            workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        self.taken = 0

    def batch(self) -> list:
        """The next step's micro-batches."""
        return next(self.loading)

    def take(self, micro_batches: list) -> dict[str, float]:
        """One optimizer step; its metrics."""
        self.taken += 1
        return self.step(self.taken - 1, micro_batches)

    def seconds(self) -> float:
        began = perf_counter()
        self.take(self.batch())
        self.wait()
        return perf_counter() - began

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sequence(self) -> int:
        """Positions of the LLM in the next step, image and task tokens included."""
        (micro,) = self.batch()
        return micro.input_ids.shape[1] + self.model.num_inserted_tokens


@contextmanager
def open_arm(
    scene: Scene,
    arm: str,
    accelerator: Accelerator,
    checkpointing: bool,
    workers: int | None = None,
    online: OnlineTargets | None = None,
) -> Iterator[OpenArm]:
    """With loader processes of its own, `workers` instead of the size's, that end with it."""
    workers = scene.size.workers if workers is None else workers
    opened = OpenArm(scene, arm, accelerator, checkpointing, workers, online)
    with closing(opened.loading):
        yield opened


def new_accelerator(scene: Scene, device: str) -> Accelerator:
    """As the trainer makes it for the scene's recipe."""
    AcceleratorState._reset_state()
    precision = recipe_of(scene, CACHED, False).train.mixed_precision
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
    assert accelerator.device.type == device, f"accelerate took {accelerator.device}, not {device}"
    return accelerator
