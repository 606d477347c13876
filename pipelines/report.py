"""olavlm-report: one HTML page about one run or several: what ran, how the losses went, what the predictors predict.

    olavlm-report runs/llama3-8b-clip-l/pt runs/llama3-8b-clip-l/ift --output report.html

On a laptop, after `olavlm-train pt --config tiny`:

    olavlm-report runs/tiny/pt

The page is one file and asks for nothing from outside. It is made of blocks, each a function of a run that gives HTML,
or '' when there is nothing to show; `BLOCKS` is their order. What cannot be had any more (a store, a base model) is said
in its place.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from html import escape as _escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from PIL import Image

from olavlm.cache import BadImage, CacheError, Dataset, DatasetError, ImageRoots, decode_rgb
from olavlm.cache.display import (
    TIMES,
    PcaColours,
    bar_limit,
    fills_grid,
    reachable_root,
    started_in,
    token_map,
    vector_bars,
)
from olavlm.student.checkpoint import ADAPTER_CONFIG, read_adapter
from olavlm.student.config import Recipe, load_recipe
from olavlm.student.data import Collator
from olavlm.student.errors import StudentError
from olavlm.student.targets import open_targets
from olavlm.student.trainer import DTYPES, open_data
from olavlm.teachers import TeacherError

from .cli import JobFailed, command, versions
from .page import (
    Curve,
    Markup,
    block,
    chart,
    empty,
    facts,
    fold,
    note,
    number,
    page,
    picture,
    table,
    tiles,
)

STAGE_NAMES = {"pt": "Pre-training (PT)", "vpt": "Visual pre-training (VPT)", "ift": "Instruction finetuning (IFT)"}
PHOTOGRAPH_SIDE = 480  # pixels, at most
BARS = (230, 64)  # pixels, of a one-token target


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-report",
        description="Write one self-contained HTML page about one run or several.",
        epilog="example: olavlm-report runs/tiny/pt runs/tiny/ift --output report.html",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder of olavlm-train")
    p.add_argument("--output", metavar="FILE.html", type=Path,
                   help="default: report.html in the run folder, of several runs in the folder they share")  # fmt: skip
    p.add_argument("--store", help="feature store with the targets (default: the recipe's)")
    p.add_argument("--images", nargs="+", action="extend", metavar="[PREFIX=]DIR|ZIP|URL",
                   help="image roots (default: the recipe's)")  # fmt: skip
    p.add_argument("--samples", type=_count, default=4, metavar="N",
                   help="photographs with targets and predictions (default 4; 0 loads no model)")  # fmt: skip
    return p


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


@command("olavlm-report")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    folders = list(dict.fromkeys(folder.absolute() for folder in args.runs))
    shared = Path(os.path.commonpath([f.parent for f in folders] if len(folders) > 1 else folders))
    runs = [read_run(f, str(f.relative_to(shared)) if len(folders) > 1 else f.name) for f in folders]
    output: Path = args.output or shared / "report.html"
    settings = Settings(args.store, args.images, args.samples)
    html = render(runs, settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    private = output.with_name(f".{output.name}.{os.getpid()}")
    private.write_text(html, encoding="utf-8")
    private.replace(output)
    print(f"report: {output} ({len(html) / 1e6:.1f} MB)")
    for run in runs:
        for fault in run.faults:
            print(f"{run.name}: {fault}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Settings:
    """What the command line says beside the runs."""

    store: str | None = None
    images: list[str] | None = None
    samples: int = 4


@dataclass(frozen=True)
class Run:
    """A run folder, read. Files that are not there are None or empty."""

    folder: Path
    name: str
    metrics: list[dict[str, float]]
    """the steps of `metrics.jsonl`, in order"""
    damaged_lines: int
    stage: str | None
    processes: int | None
    parts: list[dict[str, Any]]
    recipe: dict[str, Any]
    recipe_text: str
    versions: dict[str, str]

    def curve(self, key: str, name: str = "") -> Curve:
        """A metric over steps; steps that lack it are left out."""
        points = [(m["step"], m[key]) for m in self.metrics if key in m]
        return Curve(name or key, [p[0] for p in points], [p[1] for p in points])

    def curves(self, keys: Sequence[str], names: Sequence[str] = ()) -> list[Curve]:
        return [self.curve(key, name) for key, name in zip(keys, names or keys, strict=True)]

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
        order = self.get("model", "order") or []
        ranked = sorted(found, key=lambda task: (order.index(task) if task in order else len(order), task))
        return {task: sorted(found[task]) for task in ranked}

    def get(self, *path: str) -> Any:
        """A value of the recipe, None where it has none."""
        value: Any = self.recipe
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def finished(self) -> bool:
        return any((self.folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json"))

    @property
    def global_batch(self) -> int | None:
        sizes = (self.get("train", "batch_size"), self.get("train", "accumulation"), self.processes)
        return math.prod(sizes) if all(sizes) else None

    @cached_property
    def faults(self) -> list[str]:
        """What needs a look, a sentence each."""
        return find_faults(self)


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder; JobFailed if it is none. Damaged or missing files beside the metrics are left out."""
    if not folder.is_dir():
        raise JobFailed(f"run {folder} does not exist; give a run folder of olavlm-train")
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise JobFailed(f"{folder} is not a run folder: it holds no metrics.jsonl; give a run folder of olavlm-train")
    metrics, damaged = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
            content["step"] = int(content["step"])
        except (ValueError, KeyError, TypeError):
            damaged += 1  # such as the line that a kill cut short
            continue
        values = {k: math.nan if v is None else v for k, v in content.items()}  # some writers spell NaN as null
        metrics.append(
            {k: float(v) for k, v in values.items() if isinstance(v, int | float)} | {"step": content["step"]}
        )
    recipe_text = _text(folder / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        recipe = None
    stage = _json(folder / "stage.json")
    return Run(
        folder=folder,
        name=name,
        metrics=sorted(metrics, key=lambda m: m["step"]),
        damaged_lines=damaged,
        stage=stage.get("stage"),
        processes=stage.get("processes"),
        parts=stage.get("parts") or [],
        recipe=recipe if isinstance(recipe, dict) else {},
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
        faults.append(f"metrics.jsonl has {run.damaged_lines} damaged or unfinished line(s), which are left out.")
    for key in run.keys:
        if not key.startswith("loss/"):
            continue
        curve = run.curve(key)
        for what, hit in (("is not finite", lambda v: not math.isfinite(v)), ("is exactly zero", lambda v: v == 0)):
            steps = [step for step, value in zip(curve.x, curve.y, strict=True) if hit(value)]
            if steps:
                where = f"in {len(steps)} of {len(curve.x)} steps, first in step {steps[0]}"
                faults.append(f"{key} {what} {where}.{_why_zero(run, key, steps) if 'zero' in what else ''}")
    if run.metrics and run.stage in (run.get("losses", "stages") or []):
        for task, settings in (run.get("tasks") or {}).items():
            lacking = [str(x) for x in settings.get("layers") or [] if x not in run.terms.get(task, [])]
            if lacking:
                faults.append(f"The recipe distils {task} at layer {', '.join(lacking)}, but no such loss was logged.")
    bad = int(sum(m.get("bad_images", 0) for m in run.metrics))
    if bad:
        faults.append(f"{bad:,} samples had an image that could not be read; they trained nothing.")
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


# Blocks: (run, settings) -> HTML.


def show_summary(run: Run, settings: Settings) -> str:
    if not run.metrics:
        return ""
    steps, last = run.metrics, run.metrics[-1]
    spread = max(1, len(steps) // 20)

    def ending(key: str) -> tuple[str, str]:
        values = [m[key] for m in steps if key in m]
        if not values:
            return number(None), ""
        over = f"mean of the last {spread} steps" if spread > 1 else "last step"
        return number(statistics.fmean(values[-spread:])), f"{over}; {number(values[0])} at first"

    times = [m["step_ms"] for m in steps if "step_ms" in m]
    waits = [m["data_wait_ms"] for m in steps if "data_wait_ms" in m]
    triples = [("Total loss", *ending("loss/total")), ("Text loss", *ending("loss/text"))]
    epoch = f"{number(last['epoch'], 3)} of {number(run.get('train', 'epochs'), 3)} epochs" if "epoch" in last else ""
    triples.append(("Steps", number(last["step"]), epoch))
    if times:
        median = statistics.median(times)
        triples.append(("Step time", _duration(median), f"median; {_duration(sum(times))} in all"))
        if run.global_batch:
            rate = number(1000 * run.global_batch / median, 3)
            triples.append(("Throughput", f"{rate} samples/s", f"global batch {run.global_batch}"))
    if times and len(waits) == len(times):
        triples.append(("Waiting for data", f"{100 * sum(waits) / sum(times):.1f} %", "of the time of all steps"))
    return tiles(triples)


def _duration(milliseconds: float) -> str:
    seconds = milliseconds / 1000
    if seconds < 1:
        return f"{number(milliseconds, 3)} ms"
    if seconds < 120:
        return f"{number(seconds, 3)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_faults(run: Run, settings: Settings) -> str:
    return "".join(note(fault, "fault") for fault in run.faults)


def show_facts(run: Run, settings: Settings) -> str:
    tasks = run.get("tasks") or {}
    distils = run.stage in (run.get("losses", "stages") or []) and tasks
    batch = (run.get("train", "batch_size"), run.get("train", "accumulation"), run.processes)
    source = run.get("targets", "source")
    pairs = [
        ("Language model", run.get("model", "llm")),
        ("Vision encoder", run.get("model", "encoder")),
        ("Started from", run.get("init", "from") or ("base models" if run.recipe else None)),
        ("Data", _joined(run.get("data", "file"))),
        ("Images", _joined(run.get("data", "images"))),
        (
            "Targets",
            (run.get("targets", "store") if source == "cache" else "teachers in the loop") if distils else None,
        ),
        *((f"Task {name}", _task(settings)) for name, settings in (tasks.items() if distils else ())),
        ("Processes", run.processes),
        ("Global batch", f"{run.global_batch} = {f' {TIMES} '.join(map(str, batch))}" if run.global_batch else None),
        ("Learning rate", f"{number(run.get('train', 'lr'))} at its peak" if run.get("train", "lr") else None),
        ("Precision", {"no": "float32", "bf16": "bfloat16 autocast"}.get(str(run.get("train", "mixed_precision")))),
        ("Seed", run.get("train", "seed")),
    ]
    shown = facts((name, str(value)) for name, value in pairs if value is not None)
    return shown if run.recipe else shown + note("recipe.yaml is missing or damaged: what was asked for is not known.")


def _joined(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _task(settings: dict[str, Any]) -> str:
    layers = ", ".join(map(str, settings.get("layers") or [])) or "none"
    return f"layers {layers}; weight {settings.get('weight')}"


def show_losses(run: Run, settings: Settings) -> str:
    charts = [
        chart("Total loss", [run.curve("loss/total", "total")], mark_zeros=True),
        chart("Text loss", [run.curve("loss/text", "text")], unit="nats per token", mark_zeros=True),
        chart("Learning rate", [run.curve("lr", "learning rate")]),
    ]
    if "grad_norm" in run.keys:
        charts.append(chart("Gradient norm, before clipping", [run.curve("grad_norm", "norm")]))
    return block("Losses", _charts(charts), "Smoothed lines over the raw values of every step.")


def show_embedding_losses(run: Run, settings: Settings) -> str:
    content = ""
    for kind, title, unit in (("smooth_l1", "Smooth-L1", "mean over features"), ("contrastive", "Contrastive", "nats")):
        charts = []
        for task, layers in run.terms.items():
            keys, names = [f"loss/{task}/{x}/{kind}" for x in layers], [f"layer {x}" for x in layers]
            charts.append(chart(f"{title}, {task}", run.curves(keys, names), unit=unit, mark_zeros=True))
        content += _charts(charts)
    scales = [key for key in run.keys if key.startswith("scale/")]
    names = [key.partition("/")[2] for key in scales]
    content += _charts([chart("Factor on similarities, exp(s)", run.curves(scales, names))])
    weight, use = run.get("losses", "contrastive_weight"), run.get("losses", "contrastive")
    about = "Predicted against teacher features, by task and decoder layer, ahead of their weights. "
    if weight is not None:
        about += f"In the total, contrastive terms weigh {weight if use else 0} beside smooth-L1."
    return block("Embedding losses", content, about.strip())


def show_pace(run: Run, settings: Settings) -> str:
    curves = run.curves(["step_ms", "data_wait_ms"], ["step", "of which waiting for data"])
    charts = [chart("Time a step", curves, unit="ms", log=True)]
    if run.global_batch:
        x, y = run.curve("step_ms").x, run.curve("step_ms").y
        rate = [1000 * run.global_batch / v if v else math.nan for v in y]
        charts.append(chart("Throughput", [Curve("all processes", x, rate)], unit="samples/s"))
    return block("Pace", _charts(charts))


def _charts(charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def show_predictions(run: Run, settings: Settings) -> str:
    distils = run.get("tasks") and run.stage in (run.get("losses", "stages") or [])
    if not settings.samples or not distils or run.stage != "pt":
        return ""
    try:
        samples = predict(run, settings)
        content = "".join(_sample(sample) for sample in samples)
    except (StudentError, CacheError, TeacherError, OSError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        content = note(f"No pictures: {reason}")
    return block(
        "Targets and predictions",
        content,
        "What the teachers see in a photograph, and what each predictor makes of the language model's states at its "
        "layer. The colours are the three principal components of the target's tokens, and predictions are coloured in "
        "that same basis and scale: equal colours are equal features. Beside it stands the cosine of the whole "
        "prediction with its target, and in brackets the mean with the targets of the other photographs here.",
    )


@dataclass
class TaskView:
    """A task's target and predictions for one sample."""

    name: str
    grid: tuple[int, ...]
    target: np.ndarray | None
    """(tokens, dim) float32, None if the teacher gave none"""
    predictions: dict[int, np.ndarray]
    """for each layer (tokens, dim) float32; empty if the sample's image did not reach the model"""
    cosines: dict[int, tuple[float, float | None]]
    """for each layer: with its own target, and the mean with those of the other samples"""


@dataclass
class SampleView:
    image: str
    text: str
    photograph: Image.Image | None
    tasks: list[TaskView]


def predict(run: Run, settings: Settings) -> list[SampleView]:
    """The targets of some samples, spread over the data, and what the run's predictors make of them.

    The samples take the trainer's own way: its collator, its target source, and a forward with labels.

    Raises:
        StudentError, CacheError, TeacherError, OSError: the recipe, data, store or models cannot be had any more.
    """
    recipe = reachable_recipe(run, settings)
    adapter = read_adapter(run.folder)
    dataset, roots = open_data(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_targets(recipe, device)
    indices = spread(dataset, settings.samples)
    options = {"dtype": DTYPES[recipe.model.dtype], "attn_implementation": recipe.model.attention}
    model, tokenizer = adapter.build(with_predictors=True, **options)
    collator = Collator(
        dataset=dataset,
        roots=roots,
        tokenizer=tokenizer,
        transform=model.config.image_transform,
        template=recipe.model.template,
        image_token_id=model.config.image_token_id,
        num_inserted_tokens=model.num_inserted_tokens,
        max_length=recipe.model.max_length,
        source=source,
    )
    model = model.to(device).eval()
    batch = collator(indices)
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    with torch.inference_mode():
        output = model(**{name: getattr(batch, name).to(device) for name in names})
        targets, valid = source.finish(batch.targets, device)
    predictions = {key: p.float().cpu().numpy() for key, p in output.predictions.items()}
    known = {name: t.float().cpu().numpy() for name, t in targets.items()}
    usable = {name: v.cpu().numpy() for name, v in valid.items()}
    return [
        _view(
            dataset[index], row, roots, model.tasks, _grids(source), known, usable, batch.complete.tolist(), predictions
        )
        for row, index in enumerate(indices)
    ]


def reachable_recipe(run: Run, settings: Settings) -> Recipe:
    """The run's recipe, its relative paths as they can be reached from here, and what the command line replaces."""
    recipe = load_recipe(str(run.folder / "recipe.yaml"), [], run.stage)
    base = started_in(run.folder, recipe.train.output_dir)

    def reach(path: str) -> str:
        return str(base / path) if base is not None and not Path(path).exists() and (base / path).exists() else path

    recipe.data.file = [reach(file) for file in recipe.files]
    recipe.data.images = settings.images or [reachable_root(root, base) or root for root in recipe.image_roots]
    if settings.store:
        recipe.targets.store, recipe.targets.source = settings.store, "cache"
    elif recipe.targets.store:
        recipe.targets.store = reach(recipe.targets.store)
    for task in recipe.tasks.values():
        task.model = task.model and reach(task.model)
    return recipe


def spread(dataset: Dataset, count: int) -> list[int]:
    """Indices of `count` samples with different images, evenly spread over the data."""
    images = dataset.images()
    chosen = [images[int(i)] for i in np.linspace(0, len(images) - 1, min(count, len(images)))] if len(images) else []
    if not chosen:
        raise DatasetError("no sample of the data has an image")
    column = dataset.table.column("image")
    return [pc.index(column, pa.scalar(image.as_py(), pa.large_string())).as_py() for image in chosen]


def _grids(source: Any) -> dict[str, tuple[int, ...]]:
    if hasattr(source, "groups"):
        return {name: tuple(group.card.get("grid") or ()) for name, group in source.groups.items()}
    return {name: tuple(teacher.card.grid) for name, teacher in source.teachers.items()}


def _view(sample, row, roots, tasks, grids, targets, valid, complete, predictions) -> SampleView:
    try:
        photograph = roots.open(sample.image)
    except BadImage:
        photograph = None
    views = []
    for task in tasks:
        rows = np.flatnonzero(valid[task.name])
        own, others = row in rows, [int(r) for r in rows if r != row]
        view = TaskView(task.name, grids[task.name], targets[task.name][row] if own else None, {}, {})
        for layer in task.layers if complete[row] else ():
            p = predictions[f"{task.name}/{layer}"][row]
            view.predictions[layer] = p
            if own:
                apart = [cosine(p, targets[task.name][r]) for r in others]
                mean = cosine(p, view.target), statistics.fmean(apart) if apart else None
                view.cosines[layer] = mean
        views.append(view)
    turns = [turn["value"].replace("<image>", "").strip() for turn in sample.conversations]
    return SampleView(sample.image, next((t for t in turns[1:] if t), ""), photograph, views)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays as flat vectors, in float64; NaN if one of them is zero or not finite."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (a, b))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else math.nan


def _sample(sample: SampleView) -> str:
    caption = f"<small>{_escape(sample.text)}</small>" if sample.text else ""
    return (
        f'<div class="sample"><figure>{_photograph(sample.photograph, sample.image)}'
        f"<figcaption><b>{_escape(sample.image)}</b>{caption}</figcaption></figure>"
        f'<div class="tasks">{"".join(_task_view(view) for view in sample.tasks)}</div></div>'
    )


def _task_view(view: TaskView) -> str:
    pooled = (
        view.target if view.target is not None else next(iter(view.predictions.values()), np.empty((0, 0)))
    ).shape[0] == 1
    shown = [("target", view.target, None)]
    shown += [(f"layer {layer}", p, view.cosines.get(layer)) for layer, p in view.predictions.items()]
    draw = _bars(view) if pooled else _map(view)
    figures = "".join(
        f"<figure>{draw(values, name)}<figcaption>{name}{_cosine(c)}</figcaption></figure>" for name, values, c in shown
    )
    if not view.predictions:
        figures += f"<figure>{empty('the image did not reach the model')}</figure>"
    layout = '<div class="strips">' if pooled else f'<div class="maps" style="--n:{len(shown)}">'
    return f'<div class="task"><h4>{_escape(view.name)}</h4>{layout}{figures}</div></div>'


def _cosine(pair: tuple[float, float | None] | None) -> str:
    if pair is None:
        return ""
    own, others = pair
    return f" <b>{own:.2f}</b>" + (f" ({others:.2f})" if others is not None else "")


def _map(view: TaskView) -> Callable[[np.ndarray | None, str], str]:
    basis = None if view.target is None else PcaColours.fit(view.target)

    def draw(values: np.ndarray | None, name: str) -> str:
        if values is None:
            return empty("no target: quarantined or unreadable")
        if not np.isfinite(values).all():
            return empty("not finite")
        shown = token_map(values, view.grid, basis)
        if not fills_grid(len(values), view.grid):
            shown = shown.resize((shown.width, max(1, shown.width // 4)), Image.Resampling.NEAREST)
        return picture(shown, f"{view.name}, {name}: tokens as colours", pixels=True)

    return draw


def _bars(view: TaskView) -> Callable[[np.ndarray | None, str], str]:
    def draw(values: np.ndarray | None, name: str) -> str:
        if values is None:
            return empty("no target: quarantined or unreadable")
        if not np.isfinite(values).all():
            return empty("not finite")
        limit = bar_limit(values if view.target is None else view.target)
        return picture(vector_bars(values[0], BARS, limit), f"{view.name}, {name}: values as bars", css="bars")

    return draw


def _photograph(image: Image.Image | None, name: str, why: str = "the photograph cannot be read") -> str:
    if image is None:
        return empty(why)
    small = image.copy()
    small.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
    return picture(small, name)


def show_answers(run: Run, settings: Settings) -> str:
    """`RUN/answers.json`: a list of {image, prompt, answer}."""
    file = run.folder / "answers.json"
    if not file.is_file():
        return ""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        answers = [(e.get("image"), str(e["prompt"]), str(e["answer"])) for e in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return block("Answers", note(f"answers.json is not a list of image, prompt and answer: {e!r}"))
    figures = "".join(
        f'<div class="answer"><figure>{_answer_picture(run, settings, image)}</figure>'
        f'<div><p class="asked">{_escape(prompt)}</p><p>{_escape(answer) or "<i>(no words)</i>"}</p></div></div>'
        for image, prompt, answer in answers
    )
    return block("Answers", f'<div class="answers">{figures}</div>' if figures else "", "Greedy, by the trained model.")


def _answer_picture(run: Run, settings: Settings, image: str | None) -> str:
    if not image:
        return empty("text only")
    base = started_in(run.folder, str(run.get("train", "output_dir") or ""))
    for file in (Path(image), run.folder / image, *([] if base is None else [base / image])):
        if file.is_file():
            try:
                return _photograph(decode_rgb(file.read_bytes(), image), image)
            except (BadImage, OSError) as e:
                return empty(str(e))
    recorded = run.get("data", "images") or []
    specs = settings.images or ([recorded] if isinstance(recorded, str) else recorded)
    try:
        roots = ImageRoots([root for root in (reachable_root(spec, base) for spec in specs) if root])
        return _photograph(roots.open(image), image)
    except (CacheError, OSError):
        return empty(f"{image}: not found")


def show_parts(run: Run, settings: Settings) -> str:
    def line(part: dict[str, Any]) -> list[object]:
        parameters, trainable = part.get("parameters", 0), part.get("trainable", 0)
        share = 100 * trainable / parameters if parameters else 0
        return [
            part.get("part", ""),
            f"{parameters:,}",
            f"{trainable:,}",
            Markup(f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'),
        ]

    if not run.parts:
        return block("What trained", note("stage.json is missing or damaged."))
    total = {"part": "all", **{k: sum(p.get(k, 0) for p in run.parts) for k in ("parameters", "trainable")}}
    rows = [line(part) for part in (*run.parts, total)]
    return block("What trained", table(("part", "parameters", "trainable", "share"), rows, numbers=(1, 2)))


def show_settings(run: Run, settings: Settings) -> str:
    used = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "not recorded"
    recipe = fold("Resolved recipe", f"<pre>{_escape(run.recipe_text)}</pre>") if run.recipe_text else ""
    return block("Settings", facts([("Run folder", str(run.folder)), ("Versions", used)]) + recipe)


Block = Callable[[Run, Settings], str]
BLOCKS: tuple[Block, ...] = (
    show_summary,
    show_faults,
    show_facts,
    show_losses,
    show_embedding_losses,
    show_predictions,
    show_answers,
    show_pace,
    show_parts,
    show_settings,
)


def render(runs: Sequence[Run], settings: Settings) -> str:
    """The page of some runs."""
    models = list(dict.fromkeys(f"{Path(m).name}" for r in runs if (m := r.get("model", "llm"))))
    title = STAGE_NAMES.get(runs[0].stage or "", "Training run") if len(runs) == 1 else f"{len(runs)} training runs"
    head = f"<h1>{_escape(title)}</h1><p class=lead>{_escape(', '.join(models))}</p>"
    sections = []
    for i, run in enumerate(runs):
        content = "".join(show(run, settings) for show in BLOCKS)
        if len(runs) > 1:
            name = f"<h2>{_escape(run.name)}</h2><p class=lead>{_escape(STAGE_NAMES.get(run.stage or '', ''))}</p>"
            content = f'<section id="run-{i}">{name}{content}</section>'
        sections.append(content)
    if len(runs) > 1:
        head += compare(runs)
    made = f"olavlm-report, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, olavlm {versions()['olavlm']}"
    return page(title, head + "".join(sections) + f"<footer>{_escape(made)}</footer>")


def compare(runs: Sequence[Run]) -> str:
    """All runs in a table, and the losses of those of one stage in one chart."""
    rows = []
    for i, run in enumerate(runs):
        last = run.metrics[-1] if run.metrics else {}
        times = [m["step_ms"] for m in run.metrics if "step_ms" in m]
        flags = f"{len(run.faults)} to look at" if run.faults else "none"
        rows.append([
            Markup(f'<a href="#run-{i}">{_escape(run.name)}</a>'), run.stage or "?", number(last.get("step")),
            number(last.get("loss/total")), number(last.get("loss/text")),
            _duration(statistics.median(times)) if times else number(None), flags,
        ])  # fmt: skip
    head = ("run", "stage", "steps", "last total loss", "last text loss", "step time", "faults")
    content = table(head, rows, numbers=(2, 3, 4, 5))
    charts = []
    for stage in dict.fromkeys(run.stage for run in runs):
        alike = [run for run in runs if run.stage == stage]
        if len(alike) > 1:
            for key, name, unit in (("loss/total", "Total", ""), ("loss/text", "Text", "nats per token")):
                curves = [run.curve(key, run.name) for run in alike]
                charts.append(chart(f"{name} loss, {stage}", curves, unit=unit, mark_zeros=True))
    return content + (f'<div class="block">{_charts(charts)}</div>' if charts else "")


if __name__ == "__main__":
    sys.exit(main())
