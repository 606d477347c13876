"""olavlm-report: one HTML page about one run or several: what ran, how the losses went, what the predictors predict.

    olavlm-report runs/llama3-8b-clip-l/pt runs/llama3-8b-clip-l/ift --output report.html

On a laptop, after `olavlm-train pt --config tiny`:

    olavlm-report runs/tiny/pt

The page is one file and asks for nothing from outside. It is made of blocks, each a function of a run that gives
HTML, or '' when there is nothing to show; `BLOCKS` is their order. What cannot be had any more (a store, a base model)
is said in its place.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape as _escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from olavlm.cache import BadImage, CacheError, ImageRoots, decode_rgb
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
from olavlm.student.errors import StudentError
from olavlm.teachers import TeacherError

from .cli import JobFailed, command, quiet_models, versions
from .decoded import DECODED_ABOUT, decoded_figures, decoder_choice, open_decoders
from .page import (
    Curve,
    Markup,
    block,
    chart,
    closing_mean,
    empty,
    facts,
    fold,
    note,
    number,
    page,
    picture,
    table,
    tiles,
    warning,
)
from .runs import Run, read_run

if TYPE_CHECKING:
    from olavlm.teachers.decoders import Decoder

    from .predictions import SampleView, TaskView

STAGE_NAMES = {"pt": "Pre-training (PT)", "vpt": "Visual pre-training (VPT)", "ift": "Instruction finetuning (IFT)"}
PHOTOGRAPH_SIDE = 480  # pixels, at most
BARS = (230, 64)  # pixels, of a one-token target
COMPARED = (("loss/total", "Total loss", "weighted sum"), ("loss/text", "Text loss", "nats per token"))


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
    p.add_argument("--decode", nargs="+", action="extend", default=[], type=decoder_choice, metavar="NAME[=MODEL]",
                   help="draw them by these teachers' own decoders too: depth, seg, gen; MODEL: hub id or "
                   "folder")  # fmt: skip
    return p


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


@command("olavlm-report")
def main(argv: list[str] | None = None) -> int:
    """Write the page; what about the runs needs a look is on it, and on standard error."""
    args = arguments().parse_args(argv)
    quiet_models()
    folders = list(dict.fromkeys(folder.absolute() for folder in args.runs))
    shared = Path(os.path.commonpath([f.parent for f in folders] if len(folders) > 1 else folders))
    runs = [read_run(f, str(f.relative_to(shared)) if len(folders) > 1 else f.name) for f in folders]
    output: Path = args.output or shared / "report.html"
    if output.is_dir():
        raise JobFailed(f"--output {output} is a folder; name a file in it")
    html = render(runs, Settings(args.store, args.images, args.samples, args.decode))
    output.parent.mkdir(parents=True, exist_ok=True)
    private = output.with_name(f".{output.name}.{os.getpid()}")
    private.write_text(html, encoding="utf-8")
    private.replace(output)
    print(f"report: {output} ({len(html) / 1000:,.0f} kB)")
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
    decode: Sequence[tuple[str, str | None]] = ()
    """Names of decoders, each with a model or None."""


# Blocks: (run, settings) -> HTML.


def show_summary(run: Run, settings: Settings) -> str:
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
    triples.append(("Text loss", *ending("loss/text")))
    epoch = f"{number(last['epoch'], 3)} of {number(run.get('train', 'epochs'), 3)} epochs" if "epoch" in last else ""
    triples.append(("Steps", number(last["step"]), epoch))
    if times:
        median = statistics.median(times)
        triples.append(("Step time", _duration(median), f"median; {_duration(sum(times))} in all"))
        if run.global_batch:
            rate = number(1000 * run.global_batch / median, 3)
            triples.append(("Samples a second", rate, f"global batch {run.global_batch}"))
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
    return warning(run.faults)


def show_facts(run: Run, settings: Settings) -> str:
    tasks = run.get("tasks") or {}
    distils = run.stage in (run.get("losses", "stages") or []) and tasks
    batch = (run.get("train", "batch_size"), run.get("train", "accumulation"), run.processes)
    fusion = run.get("model", "fusion") or "none"
    targets = "teachers in the loop" if run.get("targets", "source") == "online" else run.get("targets", "store")
    pairs = [
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
        ("Learning rate", f"{number(run.get('train', 'lr'))} at its peak" if run.get("train", "lr") else None),
        ("Precision", {"no": "float32", "bf16": "bfloat16 autocast"}.get(str(run.get("train", "mixed_precision")))),
        ("Seed", run.get("train", "seed")),
    ]
    shown = facts((name, str(value)) for name, value in pairs if value is not None)
    return shown if run.recipe else shown + note("recipe.yaml is missing or damaged: what was asked for is not known.")


def _joined(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _task(task: dict[str, Any]) -> str:
    layers = ", ".join(map(str, task.get("layers") or [])) or "none"
    return f"layers {layers}; weight {task.get('weight')}"


def show_losses(run: Run, settings: Settings) -> str:
    total = chart("Total loss", [run.curve("loss/total", "total")], unit="weighted sum", mark_zeros=True)
    charts = [
        total if run.terms else "",  # without embedding losses it is the text loss
        chart("Text loss", [run.curve("loss/text", "text")], unit="nats per token", mark_zeros=True),
        chart("Learning rate", [run.curve("lr", "learning rate")], smoothed=False),
    ]
    if "grad_norm" in run.keys:
        charts.append(chart("Gradient norm, before clipping", [run.curve("grad_norm", "norm")]))
    return block("Losses", _charts(charts), "Smoothed, over the faint raw values of every step.")


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
    content += _charts([chart("Factor on similarities, exp(s)", run.curves(scales, names), smoothed=False)])
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
    from .predictions import predict

    decoders, undecoded = {}, ""
    try:
        decoders = open_decoders(settings.decode)
    except (TeacherError, OSError, ImportError) as e:
        undecoded = note(f"Not decoded: {' '.join(str(e).split())}")
    try:
        samples = predict(run.folder, num_samples=settings.samples, store=settings.store, images=settings.images)
        content = undecoded + "".join(_sample(sample, decoders) for sample in samples)
    except (StudentError, CacheError, TeacherError, ImportError, OSError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        content = note(f"No pictures: {reason}")
    return block(
        "Targets and predictions",
        content,
        "What the teachers see in a photograph, and what each predictor makes of the language model's states at its "
        "layer. The colours are the three principal components of the target's tokens, and predictions are coloured in "
        "that same basis and scale: equal colours are equal features. Beside it stands the cosine of the whole "
        "prediction with its target, and in brackets the mean with the targets of the other photographs here."
        + (DECODED_ABOUT if decoders else ""),
    )


def _sample(sample: SampleView, decoders: Mapping[str, Decoder]) -> str:
    def decode(view: TaskView) -> str:
        decoder = decoders.get(view.name)
        return "" if decoder is None else decoded_figures(view, sample.photograph, decoder)

    caption = f"<small>{_escape(sample.text)}</small>" if sample.text else ""
    return (
        f'<div class="sample"><figure>{_photograph(sample.photograph, sample.image)}'
        f"<figcaption><b>{_escape(sample.image)}</b>{caption}</figcaption></figure>"
        f'<div class="tasks">{"".join(_task_view(view, decode(view)) for view in sample.tasks)}</div></div>'
    )


def _task_view(view: TaskView, decoded: str = "") -> str:
    draw = _bars if view.tokens == 1 else _map
    figures = []
    if view.target is None:
        figures.append(f"<figure>{empty(view.why)}<figcaption>target</figcaption></figure>")
    else:
        figures.append(f"<figure>{draw(view, view.target, 'target')}<figcaption>target</figcaption></figure>")
        for layer, prediction in view.predictions.items():
            name = f"layer {layer}"
            drawn = draw(view, prediction, name) if np.isfinite(prediction).all() else empty("not finite")
            caption = f"<figcaption>{name}{_cosine(view.cosines[layer])}</figcaption>"
            figures.append(f"<figure>{drawn}{caption}</figure>")
        if not view.predictions:
            figures.append(f"<figure>{empty('the image did not reach the model')}</figure>")
    layout = "strips" if view.tokens == 1 else "maps"
    columns = max(2, len(figures))
    return (
        f'<div class="task"><h4>{_escape(view.name)}</h4>'
        f'<div class="{layout}" style="--n:{columns};--m:{min(columns, 4)}">{"".join(figures)}</div>{decoded}</div>'
    )


def _cosine(pair: tuple[float, float | None]) -> str:
    own, others = pair
    return f" <span><b>{own:.2f}</b>" + (f" ({others:.2f})" if others is not None else "") + "</span>"


def _map(view: TaskView, values: np.ndarray, name: str) -> str:
    shown = token_map(values, view.grid, PcaColours.fit(view.target))
    if not fills_grid(len(values), view.grid):
        shown = shown.resize((shown.width, max(1, shown.width // 4)), Image.Resampling.NEAREST)
    return picture(shown, f"{view.name}, {name}: tokens as colours", pixels=True)


def _bars(view: TaskView, values: np.ndarray, name: str) -> str:
    bars = vector_bars(values[0], BARS, bar_limit(view.target))
    return picture(bars, f"{view.name}, {name}: values as bars", css="bars")


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
    return block("Answers", f'<div class="answers">{figures}</div>' if figures else "", "By the trained model.")


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
    models = list(dict.fromkeys(f"{m} with {r.get('model', 'encoder')}" for r in runs if (m := r.get("model", "llm"))))
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
    return page(
        f"{title}: {', '.join(run.name for run in runs)}",
        head + "".join(sections) + f"<footer>{_escape(made)}</footer>",
    )


def compare(runs: Sequence[Run]) -> str:
    """All runs in a table, and the losses of those of one stage in one chart."""
    rows = []
    for i, run in enumerate(runs):
        losses = [number(closing_mean(y)[0]) if (y := run.curve(key).y) else number(None) for key, *_ in COMPARED]
        times = run.curve("step_ms").y
        rows.append([
            Markup(f'<a href="#run-{i}">{_escape(run.name)}</a>'),
            run.stage or "?",
            number(run.metrics[-1]["step"] if run.metrics else 0),
            *losses,
            _duration(statistics.median(times)) if times else number(None),
            f"{len(run.faults)} to look at" if run.faults else "none",
        ])  # fmt: skip
    head = ("run", "stage", "steps", *(name.lower() for _, name, _ in COMPARED), "step time", "faults")
    content = table(head, rows, numbers=(2, 3, 4, 5))
    charts = []
    for stage in dict.fromkeys(run.stage for run in runs):
        alike = [run for run in runs if run.stage == stage]
        if len(alike) > 1:
            for key, name, unit in COMPARED:
                curves = [run.curve(key, run.name) for run in alike]
                charts.append(chart(f"{name}, {stage}", curves, unit=unit, mark_zeros=True))
    return content + (f'<div class="block">{_charts(charts)}</div>' if charts else "")


if __name__ == "__main__":
    sys.exit(main())
