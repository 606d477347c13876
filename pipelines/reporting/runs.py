"""Run folders to look at: the metrics of a run, its recipe, and what about it needs a look."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from olavlm.pipelines.cli import JobFailed

from .chart import Curve
from .page import ranges

PROBES = "probes"


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
    recipe: dict[str, Any]
    recipe_text: str
    versions: dict[str, str]

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
                case ["loss", task, layer, "smooth_l1" | "contrastive"] if layer.isdigit():
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
        from olavlm.student.probing.bank import CONFIG as PROBES_CONFIG  # these import PyTorch
        from olavlm.student.training.checkpoint import ADAPTER_CONFIG

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
            content = json.loads(line)
            content["step"] = int(content["step"])
        except (ValueError, KeyError, TypeError):
            damaged += 1  # such as the line that a kill cut short
            continue
        values = {k: math.nan if v is None else v for k, v in content.items()}  # some writers spell NaN as null
        metrics.append({k: v for k, v in values.items() if isinstance(v, int | float)})
    recipe_text = _text(folder / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        recipe = None
    recipe = recipe if isinstance(recipe, dict) else {}
    stage = _json(folder / "stage.json")
    return Run(
        folder=folder,
        name=name,
        metrics=sorted(metrics, key=lambda m: m["step"]),
        damaged_lines=damaged,
        stage=PROBES if "probe" in recipe else stage.get("stage"),
        processes=stage.get("processes"),
        parts=stage.get("parts") or [],
        recipe=recipe,
        recipe_text=recipe_text,
        versions=_json(folder / "versions.json"),
    )


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
    if run.damaged_lines:
        faults.append(f"metrics.jsonl: {_count(run.damaged_lines, 'line')} damaged or cut short, and left out.")
    for key in run.keys:
        if not key.startswith("loss/"):
            continue
        curve = run.curve(key)
        for what, hit in (("is not finite", lambda v: not math.isfinite(v)), ("is exactly zero", lambda v: v == 0)):
            steps = [step for step, value in zip(curve.x, curve.y, strict=True) if hit(value)]
            if steps:
                where = f"in {len(steps):,} of {_count(len(curve.x), 'step')}, first in step {steps[0]}"
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
        faults.append(f"{_count(bad, 'sample')} with an image that could not be read trained nothing.")
    return faults


def _count(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}" + ("" if count == 1 else "s")


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
