"""olavlm-report: one HTML page about one run or several: what ran, how it went, what predictors and probes make of it.

    olavlm-report runs/llama3-8b-clip-l/pt runs/llama3-8b-clip-l/ift --output report.html
    olavlm-report probes/ift probes/baseline probes/eval --output probes.html

On a laptop, after `olavlm-train pt --config tiny`:

    olavlm-report runs/tiny/pt

The page is one file and asks for nothing from outside. Ahead stand what compares the runs and the scores of their
probes; then each run, made of blocks, each a function of the run that gives HTML, or '' when there is nothing to show;
`BLOCKS` is their order. What cannot be had any more (a store, a base model) is said in its place.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path

from olavlm.cache import files

from .cli import JobFailed, command, natural, quiet_models, versions
from .reporting.answers import show_answers
from .reporting.benchmark_scores import show_benchmark_scores
from .reporting.chart import chart, closing_mean
from .reporting.curves import show_embedding_losses, show_losses, show_pace
from .reporting.decoded import decoder_choice
from .reporting.evaluation_scores import show_evaluation
from .reporting.features import show_predictions
from .reporting.overview import show_facts, show_faults, show_parts, show_settings, show_summary
from .reporting.page import Markup, block, charts, duration, number, page, table
from .reporting.probe_scores import EVAL, SCORES, Evaluation, joined, read_scores, show_scores
from .reporting.runs import PROBES, Run, read_run
from .reporting.settings import Settings
from .reporting.training_pictures import show_training_pictures

STAGE_NAMES = {
    "pt": "Pre-training (PT)",
    "vpt": "Visual pre-training (VPT)",
    "ift": "Instruction finetuning (IFT)",
    PROBES: "Probes",
}
COMPARED = (("loss/total", "Total loss", "weighted sum"), ("loss/text", "Text loss", "nats per token"))


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-report",
        description="Write one self-contained HTML page about one run or several.",
        epilog="example: olavlm-report runs/tiny/pt runs/tiny/ift --output report.html",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path,
                   help="folder of olavlm-train or olavlm-probe train, or scores of olavlm-probe eval")  # fmt: skip
    p.add_argument("--output", metavar="FILE.html", type=Path,
                   help="default: report.html in the run folder, of several runs in the folder they share")  # fmt: skip
    p.add_argument("--store", help="feature store with the targets (default: the recipe's)")
    p.add_argument("--images", nargs="+", action="extend", metavar="[PREFIX=]DIR|ZIP|URL",
                   help="image roots (default: the recipe's)")  # fmt: skip
    p.add_argument("--samples", type=natural, default=4, metavar="N",
                   help="photographs with targets and predictions (default 4; 0 loads no model)")  # fmt: skip
    p.add_argument("--decode", nargs="+", action="extend", default=[], type=decoder_choice, metavar="NAME[=MODEL]",
                   help="draw them by these teachers' own decoders too: depth, seg, gen; MODEL: hub id or "
                   "folder")  # fmt: skip
    return p


@command("olavlm-report")
def main(argv: list[str] | None = None) -> int:
    """Write the page; what about the runs needs a look is on it, and on standard error."""
    args = arguments().parse_args(argv)
    quiet_models()
    folders = list(dict.fromkeys(folder.absolute() for folder in args.runs))
    shared = Path(os.path.commonpath([f.parent for f in folders] if len(folders) > 1 else folders))
    runs, evaluations = read_folders(folders, shared)
    output: Path = args.output or shared / "report.html"
    if output.is_dir():
        raise JobFailed(f"--output {output} is a folder; name a file in it")
    html = render(runs, evaluations, Settings(args.store, args.images, args.samples, args.decode))
    output.parent.mkdir(parents=True, exist_ok=True)
    files.replace(output, html.encode(errors="xmlcharrefreplace"))  # half of a surrogate pair is no text
    print(f"report: {output} ({len(html) / 1000:,.0f} kB)")
    for run in runs:
        for fault in run.faults:
            print(f"{run.name}: {fault}", file=sys.stderr)
    return 0


def read_folders(folders: Sequence[Path], shared: Path) -> tuple[list[Run], list[Evaluation]]:
    """The runs, under names beneath the folder that they share, and the scores in and beside them."""
    runs, evaluations = [], []
    for folder in folders:
        if (folder / SCORES).is_file():
            evaluations.append(read_scores(folder / SCORES))
            continue
        run = read_run(folder, str(folder.relative_to(shared)) if len(folders) > 1 else folder.name)
        if (file := folder / EVAL / SCORES).is_file():
            try:
                evaluations.append(read_scores(file))
            except JobFailed as e:  # the run was asked for, and not these
                run = replace(run, odd_files=[str(e)])
        runs.append(run)
    return runs, joined(evaluations)


Block = Callable[[Run, Settings], str]
BLOCKS: tuple[Block, ...] = (
    show_summary,
    show_faults,
    show_facts,
    show_losses,
    show_embedding_losses,
    show_training_pictures,
    show_evaluation,
    show_benchmark_scores,
    show_predictions,
    show_answers,
    show_pace,
    show_parts,
    show_settings,
)


def render(runs: Sequence[Run], evaluations: Sequence[Evaluation], settings: Settings) -> str:
    """The page of some runs and scores."""
    models = [f"{m} with {r.get('model', 'encoder')}" for r in runs if (m := r.get("model", "llm"))]
    models += [str(model) for run in runs if run.stage == PROBES and (model := run.asked("model"))]
    title = "Probe scores" if not runs else f"{len(runs)} runs"
    if len(runs) == 1:
        title = STAGE_NAMES.get(runs[0].stage or "", "Training run")
    head = f"<h1>{escape(title)}</h1><p class=lead>{escape(', '.join(dict.fromkeys(models)))}</p>"
    if len(runs) > 1:
        head += f"<section><h2>Compared</h2>{compare(runs)}</section>"
    if evaluations:
        head += f"<section><h2>Probes, layer by layer</h2>{show_scores(evaluations)}</section>"
    sections = []
    for i, run in enumerate(runs):
        stage = STAGE_NAMES.get(run.stage or "", "") if len(runs) > 1 else ""
        name = f"<h2>{escape(run.name)}</h2>" + (f"<p class=lead>{escape(stage)}</p>" if stage else "")
        content = "".join(show(run, settings) for show in BLOCKS)
        sections.append(f'<section id="run-{i}">{name}{content}</section>')
    made = f"olavlm-report, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, olavlm {versions()['olavlm']}"
    return page(
        ": ".join(filter(None, (title, ", ".join(run.name for run in runs)))),
        head + "".join(sections) + f"<footer>{escape(made)}</footer>",
    )


def compare(runs: Sequence[Run]) -> str:
    """All runs in a table, and the losses of those of one stage in one chart."""
    rows = []
    for i, run in enumerate(runs):
        losses = [number(closing_mean(y)[0]) if (y := run.curve(key).y) else number(None) for key, *_ in COMPARED]
        times, waits = run.curve("step_ms").y, run.curve("data_wait_ms").y
        median = statistics.median(times) if times else None
        rows.append([
            Markup(f'<a href="#run-{i}">{escape(run.name)}</a>'),
            run.stage or "?",
            number(run.metrics[-1]["step"] if run.metrics else 0),
            *losses,
            duration(median) if median else number(None),
            number(1000 * run.global_batch / median if median and run.global_batch else None, 3),
            f"{100 * sum(waits) / sum(times):.1f} %" if sum(times) and len(waits) == len(times) else number(None),
            f"{len(run.faults)} to look at" if run.faults else "none",
        ])  # fmt: skip
    losses = (name.lower() for _, name, _ in COMPARED)
    head = ("run", "stage", "steps", *losses, "step time", "samples/s", "waiting for data", "faults")
    content = table("Runs", head, rows, numbers=range(2, 8))
    drawn = []
    for stage in dict.fromkeys(run.stage for run in runs):
        alike = [run for run in runs if run.stage == stage]
        if len(alike) > 1:
            for key, name, unit in COMPARED:
                curves = [run.curve(key, run.name) for run in alike]
                drawn.append(chart(f"{name}, {stage}", curves, unit=unit, mark_zeros=True))
    return content + block("Losses of each stage", charts(drawn))


if __name__ == "__main__":
    sys.exit(main())
