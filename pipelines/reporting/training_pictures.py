"""Pictures that training left, of samples that it did not train on: RUN/pictures/step-000100/NAME.png."""

from __future__ import annotations

from html import escape
from pathlib import Path

from PIL import Image

from olavlm.cache import BadImage, decode_rgb

from .page import block, empty, fold, picture
from .runs import Run
from .settings import Settings

NUM_SHOWN = 4
"""Samples."""
SIDE, EARLIER_SIDE = 1000, 640
"""Pixels of a picture's longer side, at most: of the last step, and of those before."""


def show_training_pictures(run: Run, settings: Settings) -> str:
    """Those of the last step; beneath each, folded, the sample at the first step and at one halfway."""
    steps = picture_steps(run.folder)
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    halfway = min(steps, key=lambda step: abs(step - (first + last) / 2))
    content = ""
    for file in steps[last][:NUM_SHOWN]:
        content += _figure(file, last, SIDE)
        before = {
            step: same
            for step in sorted({first, halfway} - {last})
            if (same := next((other for other in steps[step] if other.name == file.name), None))
        }
        if before:
            drawn = "".join(_figure(same, step, EARLIER_SIDE) for step, same in before.items())
            content += fold(f"{file.stem}: how it came to be, step {' and '.join(map(str, before))}", drawn)
    total = len(steps[last])
    some = f" {NUM_SHOWN} of {total} samples are shown." if total > NUM_SHOWN else ""
    return block("Pictures of training", content, f"Held-out samples, drawn in training at step {last:,}.{some}")


def picture_steps(folder: Path) -> dict[int, list[Path]]:
    """By step the pictures there are, in order of their names; steps without one are left out."""
    found = {}
    for made in (folder / "pictures").glob("step-*"):
        number = made.name.removeprefix("step-")
        if number.isdigit() and (files := sorted(made.glob("*.png"))):
            found[int(number)] = files
    return dict(sorted(found.items()))


def _figure(file: Path, step: int, side: int) -> str:
    try:
        image = decode_rgb(file.read_bytes(), file.name)
    except (BadImage, OSError) as e:
        shown = empty(str(e))
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        shown = picture(image, f"{file.stem} at step {step}: its target and its predictions by layer", css="sheet")
    name = escape(f"{file.stem}, step {step:,}")
    return (
        f'<figure class="drawn"><div class="scroll" tabindex="0" role="region" aria-label="{name}">{shown}</div>'
        f"<figcaption>{name}</figcaption></figure>"
    )
