"""Targets and predictions decoded by their teachers' own decoders: figures of the report, as the paper's 6 to 8."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from olavlm.teachers.decoders import DECODERS, load_decoder

from .page import empty, note, picture

if TYPE_CHECKING:
    from PIL import Image

    from olavlm.teachers.decoders import Decoder

    from .predictions import TaskView

SIDE = 280  # of a picture, in pixels
DECODED_ABOUT = (
    " Below them, the same features as the teacher's own decoder draws them. Depth: one feature map in place of the "
    "four that the decoder was trained on, and the colours of each map span its own values. Classes: the decoder "
    "sees the photograph's first three stages beside the features, so a map is not the prediction's alone."
)


def decoder_choice(text: str) -> tuple[str, str | None]:
    """`NAME[=MODEL]` of the command line as name and model."""
    name, _, model = text.partition("=")
    if name not in DECODERS:
        raise argparse.ArgumentTypeError(f"{text}: no such decoder; use one of {', '.join(DECODERS)}")
    return name, model or None


def open_decoders(choices: Sequence[tuple[str, str | None]]) -> dict[str, Decoder]:
    """The decoders of names and models, by task; TeacherError for one that cannot be loaded."""
    return {name: load_decoder(name, model=model) for name, model in choices}


def decoded_figures(view: TaskView, photograph: Image.Image | None, decoder: Decoder) -> str:
    """HTML: target and predictions of a task decoded, and what their colours mean; '' without a target.

    Raises:
        TeacherError: features of another checkpoint than the decoder's.
    """
    from olavlm.teachers.decoders.drawing import draw

    if view.target is None:
        return ""
    if photograph is None:
        return note("Not decoded: the photograph cannot be read.")
    features = {"target": view.target, **{f"layer {layer}": p for layer, p in view.predictions.items()}}
    drawn = draw(decoder, features, photograph, side=SIDE)
    figures = []
    for name in features:
        about = f"{view.name}, {name}, decoded"
        shown = picture(drawn.pictures[name], about) if name in drawn.pictures else empty("not finite")
        figures.append(f"<figure>{shown}<figcaption>{name}, decoded</figcaption></figure>")
    columns = max(2, len(figures))
    legend = f"<figure>{picture(drawn.legend, f'{view.name}: what the colours mean')}</figure>" if drawn.legend else ""
    return f'<div class="maps" style="--n:{columns};--m:{min(columns, 4)}">{"".join(figures)}</div>{legend}'
