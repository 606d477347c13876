"""Run folders to look at: the metrics of a run, its recipe, and what about it needs a look."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from olavlm.cache.wording import counted
from olavlm.pipelines.cli import JobFailed

from .chart import Curve
from .page import ranges

PROBES = "probes"
_LARGEST = 3.5e38
"""Of what float32 holds."""
_NUMBER, _TEXTS = (int, float), (str, list)
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "data", "targets", "losses", "train", "init", "tasks", "probe", "lora"), dict),
    **dict.fromkeys(("tasks.*.layers", "probe.layers", "model.order", "losses.stages"), list),
    **dict.fromkeys(("train.batch_size", "train.accumulation", "probe.batch_size", "train.seed", "probe.seed"), int),
    **dict.fromkeys(("train.lr", "train.epochs", "probe.lr", "probe.epochs", "losses.contrastive_weight"), _NUMBER),
    **dict.fromkeys(("data.fraction", "tasks.*.weight"), _NUMBER),
    **dict.fromkeys(("data.file", "data.images"), _TEXTS),
    **dict.fromkeys(("model.llm", "model.encoder", "targets.store", "train.output_dir", "init.from"), str),
    **dict.fromkeys(("probe.tasks", "probe.data"), dict),
    "tasks.*": dict,
}
"""What fields of a recipe hold that are shown or reckoned with, where they are set."""
_ANY_TASK = re.compile(r"^tasks\.[^.]+")


@dataclass(frozen=True)
class Run:
    """A run folder, read. Files that are not there are None or empty."""

    folder: Path
    name: str
    """short, for headings and legends"""
    metrics: list[dict[str, float]]
    """the steps of `metrics.jsonl`, in order"""
    damaged_lines: int
    """of `metrics.jsonl`"""
    stage: str | None
    """of training, or PROBES"""
    processes: int | None
    parts: list[dict[str, Any]]
    """`part`, `parameters`, `trainable`: what trained"""
    teachers: dict[str, dict[str, Any]]
    """by task, of the card of the features that it distils or is fed"""
    recipe: dict[str, Any]
    recipe_text: str
    odd_fields: list[str]
    """of the recipe, which hold what they cannot, and were left out"""
    versions: dict[str, str]
    odd_files: list[str] = field(default_factory=list)
    """what is wrong with files beside it that were left out, a sentence each"""

    def curve(self, key: str, name: str = "") -> Curve:
        """A metric over steps; steps that lack it are left out."""
        points = [(m["step"], m[key]) for m in self.metrics if key in m]
        return Curve(name or key, [p[0] for p in points], [p[1] for p in points])

    def curves(self, keys: Sequence[str], names: Sequence[str]) -> list[Curve]:
        """Several metrics, each under a name of its own."""
        return [self.curve(key, name) for key, name in zip(keys, names, strict=True)]

    @cached_property
    def keys(self) -> list[str]:
        """Names of all metrics, in order of appearance."""
        return list(dict.fromkeys(key for m in self.metrics for key in m))

    @cached_property
    def terms(self) -> dict[str, list[int]]:
        """For each task with embedding losses its layers, as the metrics hold them."""
        found: dict[str, set[int]] = {}
        for key in self.keys:
            match key.split("/"):
                case ["loss", task, layer, "smooth_l1" | "contrastive"] if layer.isdecimal():
                    found.setdefault(task, set()).add(int(layer))
        order = list(self.asked("tasks") or {}) if self.stage == PROBES else self.get("model", "order") or []
        ranked = sorted(found, key=lambda task: (order.index(task) if task in order else len(order), task))
        return {task: sorted(found[task]) for task in ranked}

    def get(self, *path: str) -> Any:
        """A value of the recipe, None where it has none."""
        value: Any = self.recipe
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def asked(self, field: str) -> Any:
        """A setting of how it trained, None where the recipe has none."""
        return self.get("probe" if self.stage == PROBES else "train", field)

    @property
    def finished(self) -> bool:
        """Whether it left its result: an adapter or a model, or probes."""
        from olavlm.student.adapter import ADAPTER_CONFIG
        from olavlm.student.probing.bank import CONFIG as PROBES_CONFIG  # these import PyTorch

        results = (PROBES_CONFIG,) if self.stage == PROBES else (ADAPTER_CONFIG, "config.json")
        return any((self.folder / name).is_file() for name in results)

    @property
    def global_batch(self) -> int | None:
        """Samples an optimizer step, over all processes."""
        if self.stage == PROBES:
            return self.asked("batch_size")
        sizes = (self.get("train", "batch_size"), self.get("train", "accumulation"), self.processes)
        return math.prod(sizes) if all(sizes) else None

    @cached_property
    def faults(self) -> list[str]:
        """What needs a look, a sentence each."""
        return find_faults(self)


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder, to be shown under `name`; JobFailed if it has no metrics. Other files may be missing."""
    if not folder.is_dir():
        raise JobFailed(f"run {folder} does not exist; give a run folder")
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise JobFailed(
            f"{folder} is not a run folder: it holds no metrics.jsonl; give one of olavlm-train or olavlm-probe"
        )
    metrics, damaged = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics.append(_logged(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            damaged += 1  # such as the line that a kill cut short
    recipe_text = _text(folder / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        recipe = None
    recipe, odd = without_odd(recipe if isinstance(recipe, dict) else {})
    stage = _json(folder / "stage.json")
    parts, processes, trained = stage.get("parts"), stage.get("processes"), stage.get("stage")
    return Run(
        folder=folder,
        name=name,
        metrics=sorted(metrics, key=lambda m: m["step"]),
        damaged_lines=damaged,
        stage=PROBES if "probe" in recipe else trained if isinstance(trained, str) else None,
        processes=processes if type(processes) is int else None,
        parts=parts if isinstance(parts, list) and all(map(_is_part, parts)) else [],
        teachers={k: v for k, v in _mapping(stage.get("teachers")).items() if isinstance(v, dict)},
        recipe=recipe,
        recipe_text=recipe_text,
        odd_fields=odd,
        versions=_json(folder / "versions.json"),
    )


def _logged(content: Any) -> dict[str, float]:
    """A line's numbers. Its step counts; of the others some writers spell NaN as null, and float32 made them all."""
    step = content["step"]
    if int(step) != step or not 0 <= step < 2**53:
        raise ValueError(f"step {step}")
    numbers = {k: math.nan if v is None else v for k, v in content.items() if isinstance(v, int | float | None)}
    if large := [k for k, v in numbers.items() if math.isfinite(v) and abs(v) > _LARGEST]:
        raise ValueError(f"{large[0]} is larger than a loss or a time can be")
    return {**numbers, "step": int(step)}


def without_odd(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe without fields that hold what they cannot, such as text for a number; and those, by their names."""
    odd: list[str] = []

    def kept(value: Any, name: str) -> Any:
        kind = _KINDS.get(_ANY_TASK.sub("tasks.*", name), object)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not object)):
            odd.append(f"{name} is {value!r}")
            return None
        if isinstance(value, dict):
            return {k: kept(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
        if name.endswith(".layers") and not all(type(layer) is int for layer in value or ()):
            odd.append(f"{name} is {value!r}")
            return None
        return value

    return kept(dict(recipe), ""), odd


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and all(type(value.get(k, 0)) is int for k in ("parameters", "trainable"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(file) or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def find_faults(run: Run) -> list[str]:
    """Losses that are zero, not finite or absent, an unfinished run, and the like: a sentence each."""
    faults = []
    if not run.metrics:
        faults.append("No step was logged.")
    elif not run.finished:
        faults.append(f"The run is not finished: its last logged step is {run.metrics[-1]['step']}.")
    if run.odd_fields:
        faults.append(f"recipe.yaml: {'; '.join(run.odd_fields)}: left out, for it cannot be so.")
    faults += [f"{said}." for said in run.odd_files]
    if run.damaged_lines:
        faults.append(f"metrics.jsonl: {counted(run.damaged_lines, 'line')} damaged or cut short, and left out.")
    for key in run.keys:
        if not key.startswith("loss/"):
            continue
        curve = run.curve(key)
        for what, hit in (("is not finite", lambda v: not math.isfinite(v)), ("is exactly zero", lambda v: v == 0)):
            steps = [step for step, value in zip(curve.x, curve.y, strict=True) if hit(value)]
            if steps:
                where = f"in {len(steps):,} of {len(curve.x):,} steps, first in step {steps[0]}"
                faults.append(f"{key} {what} {where}.{_why_zero(run, key, steps) if 'zero' in what else ''}")
    if run.metrics and run.stage in (run.get("losses", "stages") or []):
        for task, settings in (run.get("tasks") or {}).items():
            lacking = [x for x in (settings or {}).get("layers") or [] if x not in run.terms.get(task, [])]
            if lacking:
                faults.append(f"The recipe distils {task} at layer {ranges(lacking)}, but no such loss was logged.")
    if run.metrics and run.stage == PROBES:
        for task in run.asked("tasks") or {}:
            lacking = [x for x in run.asked("layers") or [] if x not in run.terms.get(task, [])]
            if lacking:
                faults.append(
                    f"Probes of {task} at layer {ranges(lacking)} were asked for, but no such loss was logged."
                )
    bad = sum(m.get("bad_images", 0) for m in run.metrics)
    if bad:
        faults.append(f"{counted(bad, 'sample')} with an image that could not be read trained nothing.")
    return faults


def _why_zero(run: Run, key: str, steps: Sequence[float]) -> str:
    wanted = set(steps)
    task = key.split("/")[1]
    valid = [m.get(f"valid/{task}") for m in run.metrics if m["step"] in wanted]
    if None in valid or not valid:
        return ""
    if max(valid) == 0:
        return " Those batches had no valid target."
    if max(valid) <= 1 and key.endswith("/contrastive"):
        return " Those batches had one valid target, and so no negatives."
    return " Those batches had valid targets: this term trains nothing."
