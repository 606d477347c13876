"""Targets and predictions of predictors, or of probes, as colours of features: needs data, targets, base models."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from olavlm.cache import CacheError
from olavlm.cache.display import PcaColours, bar_limit, fills_grid, token_map, vector_bars
from olavlm.student.errors import StudentError
from olavlm.teachers import TeacherError

from .decoded import DECODED_ABOUT, decoded_figures, open_decoders
from .page import block, empty, note, photograph, picture
from .runs import PROBES, Run
from .settings import Settings

if TYPE_CHECKING:
    from olavlm.teachers.decoders import Decoder

    from .predictions import SampleView, TaskView

BARS = (230, 64)  # pixels, of a one-token target


def show_predictions(run: Run, settings: Settings) -> str:
    """Targets and predictions of some photographs as pictures, layer by layer."""
    distils = run.stage == "pt" and run.get("tasks") and "pt" in (run.get("losses", "stages") or [])
    if not settings.samples or not (distils or (run.stage == PROBES and run.finished)):
        return ""
    decoders, undecoded = {}, ""
    try:
        decoders = open_decoders(settings.decode)
    except (TeacherError, OSError, ImportError) as e:
        undecoded = note(f"Not decoded: {' '.join(str(e).split())}")
    try:
        samples = _samples(run, settings)
        content = undecoded + "".join(_sample(sample, decoders) for sample in samples)
    except (StudentError, CacheError, TeacherError, ImportError, OSError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        content = note(f"No pictures: {reason}")
    return block(
        "Targets and predictions",
        content,
        f"What the teachers see in a photograph, and what each {'probe' if run.stage == PROBES else 'predictor'} makes "
        "of the language model's states at its layer. The colours are the three principal components of the target's "
        "tokens, and predictions are coloured in that same basis and scale: equal colours are equal features. Beside "
        "it stands the cosine of the whole prediction with its target, and in brackets the mean with the targets of "
        "the other photographs here." + (DECODED_ABOUT if decoders else ""),
    )


def _samples(run: Run, settings: Settings) -> list[SampleView]:
    chosen = {"num_samples": settings.samples, "store": settings.store, "images": settings.images}
    if run.stage == PROBES:
        from .probe_predictions import predict_by_probes

        return predict_by_probes(run.folder, run.recipe["probe"], **chosen)
    from .predictions import predict

    return predict(run.folder, **chosen)


def _sample(sample: SampleView, decoders: Mapping[str, Decoder]) -> str:
    def decode(view: TaskView) -> str:
        decoder = decoders.get(view.name)
        return "" if decoder is None else decoded_figures(view, sample.photograph, decoder)

    caption = f"<small>{escape(sample.text)}</small>" if sample.text else ""
    return (
        f'<div class="sample"><figure>{photograph(sample.photograph, sample.image)}'
        f"<figcaption><b>{escape(sample.image)}</b>{caption}</figcaption></figure>"
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
        f'<div class="task"><h4>{escape(view.name)}</h4>'
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
