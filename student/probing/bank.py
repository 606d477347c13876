"""Probes: how well a layer of a frozen model represents what a teacher sees, measured by a resampler that learns it.

Each probe is an `EmbeddingPredictor` with latent queries of its own, one for each task and layer. It reads the states
at all positions of the layer. Source: arXiv 2412.09585, probing experiments.

    RUN/probes.safetensors    the probes, float32
    RUN/probes.json           the model they read, its token layout, tasks and teachers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olavlm.student.errors import ModelError
from olavlm.student.predictor import EmbeddingPredictor
from olavlm.student.projector import as_input_of
from olavlm.student.run_files import load_tensors, save_tensors, write_json
from olavlm.student.tokens import TaskSpec
from olavlm.student.training.identity import start_digest

WEIGHTS, CONFIG = "probes.safetensors", "probes.json"
BYTES_A_PARAMETER = 16
"""float32 with its gradient and AdamW's two moments."""


class ProbeBank(nn.Module):
    """A probe for each task and layer. What one starts from, and so what it learns, depends on no other one.

    Args:
        tasks: what is predicted, and from which layers; weight and predictor width are not read.
        llm_width: H, width of the states.
        seed: of the first weights.
    """

    def __init__(self, tasks: Sequence[TaskSpec], llm_width: int, seed: int = 0) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.probes = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            for task in tasks:
                for layer in task.layers:
                    torch.manual_seed(_seed_of(seed, task.name, layer))
                    probe = EmbeddingPredictor(llm_width, task.dim, task.tokens, latent=True)
                    self.probes[_key(task.name, layer)] = probe

    @property
    def layers(self) -> set[int]:
        """Those that any task is probed at."""
        return {layer for task in self.tasks for layer in task.layers}

    def forward(self, task: str, layer: int, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Predicted features (B, n, D) from the layer's states [B, L, H] where bool [B, L] says so."""
        probe = self.probes[_key(task, layer)]
        return probe(as_input_of(probe.in_proj.weight, states), None, mask)

    def sizes(self) -> dict[str, int]:
        """Parameters of one probe of each task."""
        return {
            task.name: sum(p.numel() for p in self.probes[_key(task.name, task.layers[0])].parameters())
            for task in self.tasks
        }


def _key(task: str, layer: int) -> str:
    return f"{task}_{layer}"


def _seed_of(seed: int, task: str, layer: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {task} {layer}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class ProbedTeacher:
    """What fills the targets of a task."""

    key: str
    """Where the store keeps them."""
    card: dict[str, Any]
    """Of the features, as the store has it."""

    @property
    def fingerprint(self) -> str:
        """What is equal for equal features."""
        return self.card["fingerprint"]


@dataclass(frozen=True)
class ProbeRun:
    """What a finished run of probes says of itself, beside the weights."""

    model: str
    """Where the model that they read lies."""
    weights: str
    """Names its weights (`identity.start_digest`)."""
    template: str | None
    """Prompt template of a stock LLaVA, where one was named."""
    dtype: str
    layout: dict[str, Any]
    """Of the model's sequences (`model.token_layout`)."""
    tasks: list[TaskSpec]
    teachers: dict[str, ProbedTeacher]
    """By task."""
    seed: int
    steps: int

    def save(self, folder: Path, bank: ProbeBank) -> None:
        """Write both files, `probes.json` last."""
        save_tensors({name: p.detach().cpu() for name, p in bank.named_parameters()}, folder / WEIGHTS)
        content = asdict(self) | {"tasks": [task.to_dict() for task in self.tasks]}
        write_json(folder / CONFIG, {"format": 1, **content})

    @classmethod
    def load(cls, folder: Path) -> ProbeRun:
        """ModelError without a finished run of probes in the folder."""
        try:
            content = json.loads((folder / CONFIG).read_text())
            del content["format"]
            content["tasks"] = [TaskSpec.from_dict(task) for task in content["tasks"]]
            content["teachers"] = {name: ProbedTeacher(**teacher) for name, teacher in content["teachers"].items()}
            return cls(**content)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelError(
                f"{folder} holds no {CONFIG}; give the run folder of olavlm-probe train, once it has finished"
            ) from None
        except (KeyError, TypeError, ValueError) as e:
            raise ModelError(f"{folder / CONFIG} is damaged: {e}") from None

    def find_model(self, folder: Path, moved_to: str | None = None) -> str:
        """Where the model lies that the probes of the folder read.

        Raises:
            ModelError: it is not there, or has other weights than it had.
        """
        path, of_hub = moved_to or self.model, start_digest(None)
        if start_digest(path) == self.weights or self.weights == of_hub or (moved_to and not Path(path).exists()):
            return path  # of a hub id nothing is known
        if moved_to:
            raise ModelError(f"{path} is not the model that the probes in {folder} read: it has other weights")
        if start_digest(path) == of_hub:
            raise ModelError(
                f"{path} holds no weights, and the probes in {folder} read a model there; name where it lies now "
                "(olavlm-probe eval --model, score --probed-model)"
            )
        raise ModelError(f"{path} has other weights than when the probes in {folder} were trained; train them again")

    def bank(self, folder: Path) -> ProbeBank:
        """The probes of the folder; ModelError if they are damaged or do not fit."""
        bank = ProbeBank(self.tasks, self.layout["width"])
        weights = load_tensors(folder / WEIGHTS)
        try:
            bank.load_state_dict(weights)
        except RuntimeError as e:
            raise ModelError(f"{folder / WEIGHTS} is damaged: {str(e).splitlines()[0]}") from None
        return bank.eval()
