"""What probes read of a feature store: the targets of their tasks; and, of a fusion baseline, what the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olavlm.cache import CacheError, Dataset, FeatureStore
from olavlm.cache.images import redacted
from olavlm.student.data.coverage import check_covered, rows_in_plan
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.data.targets import CachedTargets
from olavlm.student.errors import TargetsError
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.losses.scaled_features import Features, ScaledFeatures
from olavlm.student.tokens import TaskSpec

from .settings import RECIPES, ProbeData, default_key

_FUSED = "fused/"  # ahead of a teacher's name, apart from the tasks'


@dataclass
class ProbeBatch:
    """A micro-batch on the device."""

    inputs: dict[str, Any]
    """Of `OlaVLM.states`."""
    targets: dict[str, Features]
    """For each task (b, n, D)."""
    valid: dict[str, torch.Tensor]
    """For each task bool (b,): the image reached the model whole, and there is a target."""


class ProbeRows(CachedTargets):
    """A target source: rows of the tasks' features, by task.

    Args:
        keys: by task, where the store keeps its features.

    Raises:
        TargetsError: the store is not there or lacks a key; says the command that makes it.
    """

    def __init__(self, data: ProbeData, keys: Mapping[str, str]) -> None:
        self.data, self.keys = data, dict(keys)
        try:
            self.store = FeatureStore(data.store)
            present = self.store.teachers
        except CacheError as e:
            raise TargetsError(f"{e}: {self._command(next(iter(keys)))}") from None
        for name, key in keys.items():
            if key not in present:
                raise TargetsError(
                    f"store {redacted(data.store)} lacks {key} (it has {', '.join(present) or 'nothing'}); make it "
                    f"with: {self._command(name)}"
                )
        self.groups = {name: self.store[key] for name, key in keys.items()}
        self.specs = [TaskSpec(name, g.layout.tokens, g.layout.dim) for name, g in self.groups.items()]
        self.cards = {name: group.card for name, group in self.groups.items()}
        self.fused: list[str] = []

    def _command(self, task: str) -> str:
        options = ["--recipe", RECIPES[task]] if task in RECIPES else []
        if (key := self.keys[task]) != default_key(task):
            options = ["--as", key]
        return self.data.extract_command(task, *options)

    def check_covers(self, dataset: Dataset) -> None:
        """TargetsError, with the command, if some image of the dataset has not been extracted for the tasks."""
        rows = rows_in_plan(self.store, dataset, self._command(next(iter(self.keys))))
        for name in self.keys:
            check_covered(self.store, self.keys[name], rows, self._command(name))

    def feed(self, teachers: Sequence[FusedTeacher], dataset: Dataset) -> None:
        """Also read what a fusion baseline is fed: the features with the fingerprints of its training.

        Raises:
            TargetsError: the store has none, or not of all images of the dataset; says the command that makes them.
        """
        known = {self.store[key].card.get("fingerprint"): key for key in self.store.teachers if teachers}
        for teacher in teachers:
            card, command = teacher.card, self._command_of(teacher)
            if teacher.fingerprint not in known:
                raise TargetsError(
                    f"store {redacted(self.data.store)} lacks the features of {card['name']} that the model reads "
                    f"(fingerprint {teacher.fingerprint[:16]}); make them with: {command}"
                )
            group = self.store[known[teacher.fingerprint]]
            check_covered(self.store, group.key, rows_in_plan(self.store, dataset, command), command)
            self.groups[_FUSED + teacher.name] = group
            self.fused.append(teacher.name)

    def _command_of(self, teacher: FusedTeacher) -> str:
        card = teacher.card
        options = ["--recipe", card["recipe"]["name"], "--geometry", card["geometry"]]
        options += ["--compute-dtype", card["compute_dtype"]]
        return self.data.extract_command(f"{card['name']}={card['model']}", *options)

    def on_device(self, micro: MicroBatch, device: torch.device) -> ProbeBatch:
        """The micro-batch as the model and the losses take it."""
        features, valid = self.finish(micro.targets, device)
        inputs: dict[str, Any] = {
            name: getattr(micro, name).to(device, non_blocking=True) for name in ("input_ids", "pixel_values")
        }
        inputs["placement"] = micro.placement.to(device)
        usable = micro.complete.to(device, non_blocking=True)
        fed: dict[str, torch.Tensor] = {}
        for name in self.fused:
            values, there = features[_FUSED + name], valid[_FUSED + name]
            values = values.float() if isinstance(values, ScaledFeatures) else values
            fed[name] = values.masked_fill(~there[:, None, None], 0)  # not used, and finite all the same
            usable = usable & there
        targets = {name: features[name] for name in self.keys}
        valid = {name: valid[name] & usable for name in self.keys}
        return ProbeBatch(inputs | ({"teacher_features": fed} if fed else {}), targets, valid)
