"""A picture of one plan row: the photograph beside each teacher's tokens as colours.

    >>> FeatureStore("features").preview("coco/000001.jpg").save("preview.png")

What cannot be shown (a quarantined or missing row, a photograph that is gone) is an empty panel that says why.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .colours import TIMES, token_map, vector_bars
from .errors import BadImage, CacheError, CorruptFeatures, MissingFeatures
from .images import ImageRoots
from .recorded_roots import extracted_from
from .wording import printable

if TYPE_CHECKING:
    from .features import TeacherFeatures
    from .store import FeatureStore

SIDE = 280  # of a panel, in pixels
_MARGIN, _LINE, _FONT_SIZE, _PANELS_A_LINE = 16, 19, 13, 4
_INK, _SOFT_INK, _PAPER, _EMPTY, _HATCH = (
    (34, 34, 34),
    (105, 105, 105),
    (255, 255, 255),
    (242, 242, 242),
    (224, 224, 224),
)


def preview(
    store: FeatureStore, image: str | int, roots: str | os.PathLike | Sequence[str] | None = None
) -> Image.Image:
    """A picture (RGB) of one plan row: the photograph, and each teacher's tokens as PCA colours, labelled.

    Args:
        image: an image path of the plan, or a row.
        roots: image roots as for `ImageRoots`; by default those of the extractions into the store.

    Raises:
        MissingFeatures: the image or row is not in the plan.
        DatasetError: one of `roots` does not exist.
    """
    row, name = row_and_image(store, image)
    panels = [panel(photograph(store, name, roots, SIDE), name, f"row {row}")]
    for key in store.teachers:
        try:
            features = store[key]
            shape = f"{features.shape[1]} {TIMES} {features.shape[2]}"
            panels.append(panel(_teacher_picture(features, row), key, shape))
        except (CacheError, OSError, ValueError) as e:
            panels.append(panel(why(e), key, "no features to show"))
    columns = min(len(panels), _PANELS_A_LINE)
    return sheet([panels[i : i + columns] for i in range(0, len(panels), columns)])


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of panels as one picture (RGB)."""
    across, down = SIDE + _MARGIN, rows[0][0].height + _MARGIN
    whole = Image.new("RGB", (max(map(len, rows)) * across + _MARGIN, len(rows) * down + _MARGIN), _PAPER)
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            whole.paste(one, (_MARGIN + j * across, _MARGIN + i * down))
    return whole


def row_and_image(store: FeatureStore, image: str | int) -> tuple[int, str]:
    row = store.rows.row_of(image) if isinstance(image, str) else operator.index(image)
    return row, store.rows.image_of(row)


def _teacher_picture(features: TeacherFeatures, row: int) -> Image.Image:
    tokens = features[row]
    if len(tokens) == 1:
        return vector_bars(tokens[0], (SIDE, SIDE // 2))
    return enlarged(token_map(tokens, features.card.get("grid")), SIDE)


def enlarged(tokens: Image.Image, side: int) -> Image.Image:
    """A picture of one pixel a token, as large as fits a square; a single row of tokens is a strip."""
    if tokens.height == 1:
        return tokens.resize((side, side // 4), Image.Resampling.NEAREST)
    scale = side / max(tokens.size)
    return tokens.resize([max(1, round(scale * n)) for n in tokens.size], Image.Resampling.NEAREST)


def photograph(
    store: FeatureStore, name: str, roots: str | os.PathLike | Sequence[str] | None, side: int
) -> Image.Image | str:
    """The picture, no larger than `side` squared, or why there is none."""
    if isinstance(roots, (str, os.PathLike)):
        roots = [str(roots)]
    if roots is None:
        roots = extracted_from(store)
    if not roots:
        return "photograph not found: no image root of the extraction is here; give roots=[...]"
    try:
        picture = ImageRoots(roots).open(name)
    except BadImage as e:
        return f"photograph: {e.reason}" + (f" ({e.detail})" if e.detail else "")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def why(error: Exception) -> str:
    if isinstance(error, BadImage):
        return f"quarantined: {error.reason}" + (f" ({error.detail})" if error.detail else "")
    if isinstance(error, MissingFeatures):
        return "missing: not extracted yet"
    if isinstance(error, CorruptFeatures):
        return f"damaged: {error}"
    return f"cannot be read: {error}"


def panel(content: Image.Image | str, title: str, subtitle: str) -> Image.Image:
    """A picture, or hatching with the text that says why there is none, centred above two lines of label.

    The picture is at most `SIDE` pixels wide and high.
    """
    whole = Image.new("RGB", (SIDE, SIDE + 8 + 2 * _LINE), _PAPER)
    draw = ImageDraw.Draw(whole)
    font = _font()
    if isinstance(content, str):
        draw.rectangle((0, 0, SIDE - 1, SIDE - 1), fill=_EMPTY)
        for x in range(-SIDE, SIDE, 14):
            draw.line((x, SIDE - 1, x + SIDE - 1, 0), fill=_HATCH, width=2)
        lines = _wrap(content, font, SIDE - 40)
        top = (SIDE - _LINE * len(lines)) // 2
        draw.rectangle((10, top - 10, SIDE - 11, top + _LINE * len(lines) + 8), fill=_EMPTY)
        for i, line in enumerate(lines):
            draw.text(((SIDE - font.getlength(line)) / 2, top + _LINE * i), line, _INK, font)
    else:
        corner = ((SIDE - content.width) // 2, (SIDE - content.height) // 2)
        whole.paste(content, corner, content if content.mode == "RGBA" else None)
    for line, text in enumerate((title, subtitle)):
        text = _fit(printable(text), font, SIDE)
        draw.text((0, SIDE + 6 + _LINE * line), text, _SOFT_INK if line else _INK, font)
    return whole


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Pillow's own font knows ASCII alone."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or its end behind three dots: of a path, the end tells it apart."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[-width:]
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 8) -> list[str]:
    lines = [""]
    for word in map(printable, text.split()):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fit(line, font, width) for line in lines[:most]]
