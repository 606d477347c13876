"""What a run is, in short: its first numbers, its faults, what was asked for, what trained."""

from __future__ import annotations

import statistics
from typing import Any

from olavlm.cache.display import TIMES

from .chart import closing_mean
from .page import Markup, block, duration, facts, fold, note, number, ranges, source, table, tiles, warning
from .runs import PROBES, Run
from .settings import Settings


def show_summary(run: Run, settings: Settings) -> str:
    """How far the run came, and its last losses."""
    if not run.metrics:
        return ""
    steps, last = run.metrics, run.metrics[-1]

    def ending(key: str) -> tuple[str, str]:
        values = run.curve(key).y
        if not values:
            return number(None), "not logged"
        mean, count = closing_mean(values)
        over = f"mean of the last {count} steps" if count > 1 else "last step"
        return number(mean), f"{over}; {number(values[0])} at first"

    times = [m["step_ms"] for m in steps if "step_ms" in m]
    waits = [m["data_wait_ms"] for m in steps if "data_wait_ms" in m]
    triples = [("Total loss", *ending("loss/total"))] if run.terms else []
    if run.stage != PROBES:
        triples.append(("Text loss", *ending("loss/text")))
    epoch = f"{number(last['epoch'], 3)} of {number(run.asked('epochs'), 3)} epochs" if "epoch" in last else ""
    triples.append(("Steps", number(last["step"]), epoch))
    if times:
        median = statistics.median(times)
        triples.append(("Step time", duration(median), f"median; {duration(sum(times))} in all"))
        if run.global_batch and median:
            rate = number(1000 * run.global_batch / median, 3)
            triples.append(("Samples a second", rate, f"at the median; global batch {run.global_batch}"))
    if sum(times) and len(waits) == len(times):
        triples.append(("Waiting for data", f"{100 * sum(waits) / sum(times):.1f} %", "of the time of all steps"))
    return tiles(triples)


def show_faults(run: Run, settings: Settings) -> str:
    """What needs a look."""
    return warning(run.faults)


def show_facts(run: Run, settings: Settings) -> str:
    """What was trained, on what."""
    pairs = _probe_facts(run) if run.stage == PROBES else _training_facts(run)
    shown = facts((name, str(value)) for name, value in pairs if value is not None)
    return shown if run.recipe else shown + note("recipe.yaml is missing or damaged: what was asked for is not known.")


def _probe_facts(run: Run) -> list[tuple[str, Any]]:
    tasks, layers = run.asked("tasks") or {}, run.asked("layers") or []
    return [
        ("Probed model", run.asked("model")),
        ("Layers", ranges(layers) if layers else None),
        *((f"Task {name}", f"targets {key}") for name, key in tasks.items()),
        ("Data", _joined(run.get("probe", "data", "files"))),
        ("Images", _joined(run.get("probe", "data", "images"))),
        ("Targets", run.get("probe", "data", "store")),
        ("Global batch", run.global_batch),
        *_training_style(run),
    ]


def _training_style(run: Run) -> list[tuple[str, Any]]:
    precision = {"no": "float32", "bf16": "bfloat16 autocast"}
    return [
        ("Learning rate", f"{number(run.asked('lr'))} at its peak" if run.asked("lr") else None),
        ("Precision", precision.get(str(run.asked("mixed_precision")))),
        ("Seed", run.asked("seed")),
    ]


def _training_facts(run: Run) -> list[tuple[str, Any]]:
    tasks = run.get("tasks") or {}
    distils = run.stage in (run.get("losses", "stages") or []) and tasks
    batch = (run.get("train", "batch_size"), run.get("train", "accumulation"), run.processes)
    fusion = run.get("model", "fusion") or "none"
    targets = "teachers in the loop" if run.get("targets", "source") == "online" else run.get("targets", "store")
    return [
        ("Language model", run.get("model", "llm")),
        ("Vision encoder", run.get("model", "encoder")),
        ("Started from", run.get("init", "from") or ("base models" if run.recipe else None)),
        ("Data", _joined(run.get("data", "file"))),
        ("Images", _joined(run.get("data", "images"))),
        ("Targets", targets if distils else None),
        ("Fused features", f"{', '.join(tasks)}, by {fusion}, from {targets}" if fusion != "none" else None),
        *((f"Task {name}", _task(task or {})) for name, task in (tasks.items() if distils else ())),
        ("Processes", run.processes),
        ("Global batch", f"{run.global_batch} = {f' {TIMES} '.join(map(str, batch))}" if run.global_batch else None),
        *_training_style(run),
    ]


def _joined(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _task(task: dict[str, Any]) -> str:
    layers = ", ".join(map(str, task.get("layers") or [])) or "none"
    return f"layers {layers}; weight {task.get('weight')}"


def show_parts(run: Run, settings: Settings) -> str:
    """Parameters of each part, and how many of them train."""

    def line(part: dict[str, Any]) -> list[object]:
        parameters, trainable = part.get("parameters", 0), part.get("trainable", 0)
        share = 100 * trainable / parameters if parameters else 0
        return [
            part.get("part", ""),
            f"{parameters:,}",
            f"{trainable:,}",
            Markup(f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'),
        ]

    if run.stage == PROBES:
        return ""
    if not run.parts:
        return block("What trained", note("stage.json is missing or damaged."))
    total = {"part": "all", **{k: sum(p.get(k, 0) for p in run.parts) for k in ("parameters", "trainable")}}
    rows = [line(part) for part in (*run.parts, total)]
    return block(
        "What trained", table("What trained", ("part", "parameters", "trainable", "share"), rows, numbers=(1, 2))
    )


def show_settings(run: Run, settings: Settings) -> str:
    """The recipe as it was resolved, folded."""
    used = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "not recorded"
    recipe = fold("Resolved recipe", source(run.recipe_text, "Resolved recipe")) if run.recipe_text else ""
    return block("Settings", facts([("Run folder", str(run.folder)), ("Versions", used)]) + recipe)
