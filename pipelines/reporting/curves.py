"""What went on step by step: losses, learning rate, what probes reached, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from olavlm.pipelines.layer_plot import Line

from .chart import NUM_COLOURS, Curve, chart, multiples
from .layer_chart import layer_chart
from .page import block, charts, fold
from .runs import PROBES, Run
from .settings import Settings

MOMENTS = (("at the end", 1.0), ("halfway", 0.5), ("at first", 0.0))


def show_losses(run: Run, settings: Settings) -> str:
    """Total and text loss over steps."""
    total = chart("Total loss", [run.curve("loss/total", "total")], unit="weighted sum", mark_zeros=True)
    drawn = [
        total if run.terms else "",  # without embedding losses it is the text loss
        chart("Text loss", [run.curve("loss/text", "text")], unit="nats per token", mark_zeros=True),
        chart("Learning rate", [run.curve("lr", "learning rate")], smoothed=False),
    ]
    if "grad_norm" in run.keys:
        drawn.append(chart("Gradient norm, before clipping", [run.curve("grad_norm", "norm")]))
    return block("Losses", charts(drawn), "Smoothed, over the faint raw values of every step.")


def show_embedding_losses(run: Run, settings: Settings) -> str:
    """The terms of the embedding losses over steps, by task and layer."""
    content = _by_layer(run, "Smooth-L1", "loss/{task}/{layer}/smooth_l1", "mean over features")
    content += _by_layer(run, "Contrastive", "loss/{task}/{layer}/contrastive", "nats")
    content += _by_layer(run, "Cosine with the target", "cosine/{task}/{layer}", "training images")
    scales = [key for key in run.keys if key.startswith("scale/")]
    names = [key.partition("/")[2] for key in scales]
    content += charts([chart("Factor on similarities, exp(s)", run.curves(scales, names), smoothed=False)])
    if run.stage == PROBES:
        about = "What each probe makes of its layer, in training. The total is the sum of all smooth-L1."
        return block("Probes in training", content, about)
    weight, use = run.get("losses", "contrastive_weight"), run.get("losses", "contrastive")
    about = "Predicted against teacher features, by task and decoder layer, ahead of their weights. "
    if weight is not None:
        about += f"In the total, contrastive terms weigh {weight if use else 0} beside smooth-L1."
    return block("Embedding losses", content, about.strip())


def _by_layer(run: Run, title: str, key: str, unit: str) -> str:
    """Charts of a metric that each task has at each layer.

    Of few layers a chart a task over steps. Of many it is over layers, at three moments, and the steps are folded, a
    small chart a layer.
    """
    few, many, folded = [], [], ""
    is_loss = key.startswith("loss/")
    for task, layers in run.terms.items():
        found = [(x, name) for x in layers if (name := key.format(task=task, layer=x)) in run.keys]
        curves = [run.curve(name, f"layer {x}") for x, name in found]
        if len(curves) <= NUM_COLOURS:
            few.append(chart(f"{title}, {task}", curves, unit=unit, mark_zeros=is_loss))
            continue
        lines = _moments(dict(zip([x for x, _ in found], curves, strict=True)))
        many.append(layer_chart(f"{title}, {task}", lines, unit))
        folded += f"<h4>{escape(task)}</h4>{multiples(curves, f'{title}, {task}')}"
    return charts(few) + charts(many) + (fold(f"{title}: every layer over steps", folded) if folded else "")


def _moments(curves: Mapping[int, Curve]) -> list[Line]:
    """The values of curves by layer, the last ones first; each a mean over a twentieth of the curve."""
    lines = []
    for name, place in MOMENTS:
        layers, values = [], []
        for layer, curve in curves.items():
            width = max(1, len(curve.y) // 20)
            start = round(place * (len(curve.y) - width))
            value = float(np.mean(curve.y[start : start + width]))
            if math.isfinite(value):
                layers.append(layer)
                values.append(value)
        if layers:
            lines.append(Line(name, layers, values, values, values))
    return lines


def show_pace(run: Run, settings: Settings) -> str:
    """Milliseconds a step, and what they went to."""
    parts = {"step_ms": "step", "data_wait_ms": "of which waiting for data", "h2d_ms": "copying to the device"}
    drawn = [chart("Time a step", _present(run, parts), unit="ms", log=True)]
    if run.global_batch:
        x, y = run.curve("step_ms").x, run.curve("step_ms").y
        rate = [1000 * run.global_batch / v if v else math.nan for v in y]
        drawn.append(chart("Throughput", [Curve("all processes", x, rate)], unit="samples/s"))
    loads = [key for key in run.keys if key.startswith("load_") and key.endswith("_ms")]
    names = {key: key.removeprefix("load_").removesuffix("_ms").replace("_", " ") for key in loads}
    drawn.append(chart("Work of the loaders for a step", _present(run, names), unit="ms, sum over loaders", log=True))
    return block("Pace", charts(drawn))


def _present(run: Run, names: Mapping[str, str]) -> list[Curve]:
    keys: Sequence[str] = [key for key in names if key in run.keys]
    return run.curves(keys, [names[key] for key in keys])
