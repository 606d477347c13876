"""What a run of probes depends on. Imports nothing heavy: a command line is read before PyTorch is there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from olavlm.cache.images import redacted, without_credentials
from olavlm.student.config import TrainConfig
from olavlm.student.errors import RecipeError
from olavlm.student.processes import Process

RECIPES = {"depth": "last"}
"""Of a task's features, where it is not the teacher's default: the paper distils the mean of depth's layers, in the
public code, and probes the last."""


@dataclass(frozen=True)
class ProbeData:
    """Images and their features, as the user names them."""

    files: list[str]
    images: list[str]
    store: str

    def extract_command(self, teacher: str, *options: str) -> str:
        """What makes features that are missing."""
        words = ["olavlm-extract", "--teacher", teacher, *options, "--data", *self.files, "--images", *self.images]
        return shlex.join(map(redacted, [*words, "--store", self.store]))


def default_key(task: str) -> str:
    """Where a store keeps a task's features, unless the user says otherwise."""
    return f"{task}-{RECIPES[task]}" if task in RECIPES else task


@dataclass(frozen=True)
class ProbeSettings:
    """Everything a run of probes depends on."""

    model: str
    """What is probed: a run folder, or a stock LLaVA."""
    data: ProbeData
    """The images, each once, and where the targets are."""
    tasks: Mapping[str, str]
    """By task, the key of its features in the store."""
    output: str
    """Run folder."""
    layers: list[int] | None = None
    """Decoder blocks, counted from 1; all of them by default."""
    template: str | None = None
    """Of a stock LLaVA, in place of what its chat template writes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen LLM and encoder."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of model and probes; the probes' weights are float32."""
    batch_size: int = 256
    """Images an optimizer step, over all processes."""
    micro_batch: int = 16
    """Images a process and forward."""
    epochs: float = 2.0
    max_steps: int | None = None
    """Stop after this many steps; the learning rate's schedule keeps its length."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, without weight decay."""
    warmup: float = 0.03
    """Part of the run with rising learning rate; then a cosine to 0."""
    seed: int = 0
    """Of first weights and order."""
    workers: int = 4
    """Loader processes."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 1
    """Checkpoints kept."""
    num_processes: int = field(default_factory=lambda: Process.launched().count)

    def __post_init__(self) -> None:
        def rule(ok: bool, flag: str, value: object, text: str) -> None:
            if not ok:
                raise RecipeError(f"--{flag} is {value}: {text}")

        for flag in ("batch_size", "micro_batch", "save_every", "keep"):
            rule(getattr(self, flag) >= 1, flag.replace("_", "-"), getattr(self, flag), "at least 1")
        rule(self.max_steps is None or self.max_steps >= 1, "max-steps", self.max_steps, "at least 1")
        rule(self.workers >= 0, "workers", self.workers, "at least 0")
        rule(0 < self.lr < inf, "lr", self.lr, "above 0")
        rule(0 < self.epochs < inf, "epochs", self.epochs, "above 0")
        rule(0 <= self.warmup < 1, "warmup", self.warmup, "a part of the run, from 0 to below 1")
        rule(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2**32 - 1, as NumPy's generators take")
        rule(bool(self.tasks), "tasks", "empty", "name one at least, such as depth")
        split = self.num_processes * self.forward_size
        text = f"{self.num_processes} processes with forwards of {self.forward_size} images do not divide it"
        rule(split > 0 and self.batch_size % split == 0, "batch-size", self.batch_size, text)

    @property
    def forward_size(self) -> int:
        """Images of a forward: `micro_batch`, or fewer in a small batch."""
        return min(self.micro_batch, self.batch_size // self.num_processes)

    @property
    def train(self) -> TrainConfig:
        """As the parts of the trainer take it."""
        return TrainConfig(
            output_dir=self.output,
            epochs=self.epochs,
            max_steps=self.max_steps,
            seed=self.seed,
            batch_size=self.forward_size,
            accumulation=self.batch_size // (self.forward_size * self.num_processes),
            lr=self.lr,
            warmup=self.warmup,
            mixed_precision=self.mixed_precision,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types, without credentials in URLs."""
        return without_credentials(asdict(self) | {"tasks": dict(self.tasks)})

    def identity(self, layers: tuple[int, ...]) -> dict[str, Any]:
        """The settings that a run's numbers follow from: it is resumed under the same alone."""
        content = self.to_dict() | {"layers": list(layers)}
        for name in ("output", "max_steps", "micro_batch", "workers", "save_every", "keep", "num_processes"):
            del content[name]
        return content
