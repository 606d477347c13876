"""Stores to look at: previews of rows, and reprs for notebooks.

    >>> store = FeatureStore("features")
    >>> store.preview("coco/000001.jpg").save("preview.png")

Tokens become colours by their first three principal components, as is customary for dense features. `PcaColours` is
fitted on one set of tokens and can colour others in the same basis, which is how a prediction is put beside its target.
What cannot be shown (a quarantined or missing row, a photograph that is gone) is an empty panel that says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import BadImage, CacheError, CorruptFeatures, DatasetError, MissingFeatures
from .images import ImageRoots

if TYPE_CHECKING:
    from .store import FeatureStore, TeacherFeatures

SIDE = 280  # of a panel, in pixels
TIMES = "\N{MULTIPLICATION SIGN}"
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)  # blue and vermilion, told apart by every kind of colour vision
_MARGIN, _LINE, _FONT_SIZE = 16, 19, 13
_INK, _SOFT_INK, _PAPER, _EMPTY, _HATCH = (
    (34, 34, 34),
    (105, 105, 105),
    (255, 255, 255),
    (242, 242, 242),
    (224, 224, 224),
)
_PERCENTILES = (2, 98)
_FLAT = 1e-3  # a component this much smaller than the first is rounding noise, and stays grey


@dataclass(frozen=True)
class PcaColours:
    """Red, green and blue as the first three principal components of one image's tokens.

    The sign of a component is fixed by its largest loading being positive, and 0 to 255 spans the 2nd to the 98th
    percentile of the tokens it was fitted on, so the same features always give the same colours.
    """

    mean: np.ndarray
    """(dim,) float64"""
    components: np.ndarray
    """(3, dim) float64, orthonormal rows; a row of zeros where the tokens have no such component"""
    low: np.ndarray
    """(3,) float64, the score that is 0"""
    high: np.ndarray
    """(3,) float64, the score that is 255"""

    @classmethod
    def fit(cls, tokens: np.ndarray) -> PcaColours:
        """The basis of `tokens` (tokens, dim), any float dtype; ValueError if they are not finite."""
        x = _finite(tokens)
        mean = x.mean(axis=0)
        x = x - mean
        tall = x.shape[0] >= x.shape[1]
        values, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)  # the smaller of the two, ascending
        size = np.sqrt(np.maximum(values[::-1][:3], 0))
        vectors = vectors[:, ::-1][:, :3].T
        components = np.zeros((3, x.shape[1]))
        for i in range(len(size)):
            if size[i] > max(_FLAT * size[0], 1e-12):
                row = vectors[i] if tall else vectors[i] @ x / size[i]
                components[i] = row * np.sign(row[np.abs(row).argmax()])
        low, high = np.percentile(x @ components.T, _PERCENTILES, axis=0)
        return cls(mean, components, low, high)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Colours uint8 (tokens, 3) of tokens (tokens, dim) in this basis; ValueError if they are not finite."""
        scores = (_finite(tokens) - self.mean) @ self.components.T
        span = self.high - self.low
        flat = span <= 1e-12
        share = np.where(flat, 0.5, (scores - self.low) / np.where(flat, 1, span))
        return np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _finite(tokens: np.ndarray) -> np.ndarray:
    x = np.asarray(tokens, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"tokens of shape {x.shape}: only finite (tokens, dim) features have colours")
    return x


def token_map(tokens: np.ndarray, grid: Sequence[int] | None, colours: PcaColours | None = None) -> Image.Image:
    """Tokens (tokens, dim) as a picture of one RGB pixel a token, `grid` = (rows, columns), row-major.

    `colours` are those of the tokens themselves by default. Tokens that do not fill `grid` (a class token kept, or no
    grid on the card) are one row of pixels.
    """
    rows, columns = grid if fills_grid(len(tokens), grid) else (1, len(tokens))
    pixels = (colours or PcaColours.fit(tokens))(tokens)
    return Image.fromarray(pixels.reshape(rows, columns, 3))


def fills_grid(tokens: int, grid: Sequence[int] | None) -> bool:
    """Whether `grid` (rows, columns) is the place of each of so many tokens."""
    return grid is not None and len(grid) == 2 and math.prod(grid) == tokens


def vector_bars(vector: np.ndarray, size: tuple[int, int], limit: float | None = None) -> Image.Image:
    """A vector (dim,) as bars up (blue) and down (vermilion) from the middle: RGBA of `size`, transparent behind.

    `limit` is the value of a full bar, by default `bar_limit(vector)`. A column of several dimensions spans them all.
    """
    values = np.asarray(vector, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("a vector with values that are not finite cannot be drawn")
    width, height = size
    limit = limit or bar_limit(values)
    middle = height // 2
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    edges = np.linspace(0, len(values), width + 1)
    for x in range(width):
        part = values[int(edges[x]) : max(math.ceil(edges[x + 1]), int(edges[x]) + 1)]
        up, down = (round(min(1.0, max(0.0, v) / limit) * (middle - 1)) for v in (part.max(), -part.min()))
        if up:
            draw.line((x, middle - up, x, middle - 1), fill=POSITIVE)
        if down:
            draw.line((x, middle + 1, x, middle + down), fill=NEGATIVE)
    draw.line((0, middle, width, middle), fill=(128, 128, 128))
    return picture


def bar_limit(*vectors: np.ndarray) -> float:
    """The 99.5th percentile of the values' sizes, so that one extreme dimension does not flatten the others."""
    sizes = np.abs(np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in vectors]))
    return float(np.percentile(sizes, 99.5)) or 1.0


def preview(store: FeatureStore, image: str | int, roots: Sequence[str] | None = None) -> Image.Image:
    """A picture (RGB) of one plan row: the photograph, and each teacher's tokens as PCA colours, labelled.

    Args:
        image: an image path of the plan, or a row.
        roots: image roots as for `ImageRoots`; by default those of the newest extraction into the store.

    Raises:
        MissingFeatures: the image or row is not in the plan.
        DatasetError: one of `roots` does not exist.
    """
    row = store.rows.row_of(image) if isinstance(image, str) else int(image)
    name = store.rows.image_of(row)
    panels = [_panel(_photograph(store, name, roots), name, f"row {row}")]
    for key in store.teachers:
        try:
            features = store[key]
            shape = f"{features.shape[1]} {TIMES} {features.shape[2]}"
            panels.append(_panel(_teacher_picture(features, row), key, shape))
        except (CacheError, ValueError) as e:
            panels.append(_panel(_why(e), key, "no features to show"))
    width = len(panels) * (SIDE + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, panels[0].height + 2 * _MARGIN), _PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (_MARGIN + i * (SIDE + _MARGIN), _MARGIN))
    return sheet


def _teacher_picture(features: TeacherFeatures, row: int) -> Image.Image:
    tokens = features[row]
    if len(tokens) == 1:
        return vector_bars(tokens[0], (SIDE, SIDE // 2))
    grid = features.card.get("grid")
    small = token_map(tokens, grid)
    if not fills_grid(len(tokens), grid):
        return small.resize((SIDE, SIDE // 4), Image.Resampling.NEAREST)
    scale = SIDE / max(small.size)
    return small.resize([max(1, round(scale * n)) for n in small.size], Image.Resampling.NEAREST)


def _photograph(store: FeatureStore, name: str, roots: Sequence[str] | None) -> Image.Image | str:
    if roots is None:
        roots = extracted_from(store)
    if not roots:
        return "photograph not found: no image root of the extraction is here; give roots=[...]"
    try:
        picture = ImageRoots(roots).open(name)
    except BadImage as e:
        return f"photograph: {e.reason}" + (f" ({e.detail})" if e.detail else "")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


def _why(error: Exception) -> str:
    if isinstance(error, BadImage):
        return f"quarantined: {error.reason}" + (f" ({error.detail})" if error.detail else "")
    if isinstance(error, MissingFeatures):
        return "missing: not extracted yet"
    if isinstance(error, CorruptFeatures):
        return f"damaged: {error}"
    return str(error)


def extracted_from(store: FeatureStore) -> list[str]:
    """The image roots of the newest extraction into `store` that still exist, [] if none is known.

    Relative ones are looked for here, and where that extraction was started.
    """
    for file in sorted((store.path / "runs").glob("*.json"), reverse=True):
        try:
            arguments = json.loads(file.read_text())["arguments"]
            specs, recorded = list(arguments["images"]), str(arguments.get("store", ""))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found = [reachable_root(str(spec), started_in(store.path, recorded)) for spec in specs]
        return [spec for spec in found if spec is not None]
    return []


def started_in(folder: Path, recorded: str) -> Path | None:
    """The working directory from which `recorded`, a relative path, led to `folder`; None if it cannot be told."""
    parts, whole = Path(recorded).parts, folder.absolute().parts
    if not parts or Path(recorded).is_absolute() or ".." in parts or whole[-len(parts) :] != parts:
        return None
    return Path(*whole[: -len(parts)])


def reachable_root(spec: str, base: Path | None) -> str | None:
    """A recorded image root `[PREFIX=]LOCATION` as it can be reached, from here or from `base`; None if it is gone."""
    prefix, eq, location = spec.partition("=")
    if not eq or "://" in prefix or Path(spec).exists():
        prefix, eq, location = "", "", spec
    candidates = [location] if base is None else [location, str(base / location)]
    for candidate in candidates:
        try:
            ImageRoots([candidate])
        except (DatasetError, OSError, ImportError, ValueError):
            continue
        return f"{prefix}{eq}{candidate}"
    return None


def _panel(content: Image.Image | str, title: str, subtitle: str) -> Image.Image:
    """A picture, or hatching with the text that says why there is none, centred above two lines of label."""
    panel = Image.new("RGB", (SIDE, SIDE + 8 + 2 * _LINE), _PAPER)
    draw = ImageDraw.Draw(panel)
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
        panel.paste(content, corner, content if content.mode == "RGBA" else None)
    for line, text in enumerate((title, subtitle)):
        text = _fit(text, font, SIDE)
        draw.text((0, SIDE + 6 + _LINE * line), text, _SOFT_INK if line else _INK, font)
    return panel


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Pillow's own font knows ASCII alone."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or its end behind three dots: of a path, the end tells it apart."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 8) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fit(line, font, width) for line in lines[:most]]


# Notebook reprs. Inline styles without text colours, and greys that are half transparent: legible on light and dark.

_FRAME = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;max-width:75em"
_RULE = "border-top:1px solid rgba(127,127,127,.35)"
_CELL = f"text-align:left;vertical-align:top;white-space:nowrap;padding:4px 14px 4px 0;{_RULE}"
_TABLE = "border-collapse:collapse;margin-top:6px;font:inherit;color:inherit"
_PRE = "margin:4px 0;white-space:pre-wrap;font-size:12px;color:inherit;background:none"
_FAINT = "opacity:.7"


def store_html(store: FeatureStore) -> str:
    """A self-contained HTML fragment: the plan, and of each teacher shape, dtype, size, coverage and card."""
    heads = ("key", f"tokens {TIMES} dim", "dtype", "size", "coverage", "card")
    lines = [f'<th style="{_CELL};font-weight:600;border-top:0">{h}</th>' for h in heads]
    body = [f"<tr>{''.join(lines)}</tr>"]
    for key in store.teachers:
        try:
            features = store[key]
            _, tokens, dim = features.shape
            cells = [f"<b>{escape(key)}</b>", f"{tokens} {TIMES} {dim}", str(features.dtype), _size(features)]
            cells += [_coverage(features), _card(features.card)]
        except CacheError as e:
            cells = [f"<b>{escape(key)}</b>", *[""] * 3, f"cannot be read: {escape(str(e))}", ""]
        body.append("<tr>" + "".join(f'<td style="{_CELL}">{c}</td>' for c in cells) + "</tr>")
    plan = store.rows
    about = f"plan {plan.hash[:12]}, {plan.num_images:,} images, {_plural(len(plan.segments), 'segment')}"
    return (
        f'<div style="{_FRAME}"><b>FeatureStore</b> <code>{escape(str(store.path))}</code>'
        f'<div style="{_FAINT}">{about}, {_plural(len(store), "teacher")}</div>'
        f'<table style="{_TABLE}">{"".join(body)}</table></div>'
    )


def teacher_html(features: TeacherFeatures) -> str:
    """A self-contained HTML fragment: one teacher's shape, dtype, size, coverage and card."""
    rows, tokens, dim = features.shape
    return (
        f'<div style="{_FRAME}"><b>TeacherFeatures</b> <code>{escape(features.key)}</code>'
        f'<div style="{_FAINT}">{rows:,} plan rows {TIMES} {tokens} tokens {TIMES} {dim}, {features.dtype}, '
        f"{_size(features)}, {features.layout.shard_rows} rows a shard</div>"
        f'<div style="margin:6px 0">{_coverage(features)}</div>{_card(features.card, is_open=True)}</div>'
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _size(features: TeacherFeatures) -> str:
    """Of the valid rows' features."""
    size = features.coverage().valid * features.layout.row_bytes
    step = min(4, int(math.log10(max(1, size)) // 3))
    return f"{size / 1000**step:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[step]}"


def _coverage(features: TeacherFeatures) -> str:
    coverage = features.coverage()
    parts = [(coverage.valid, f"rgb{POSITIVE}"), (coverage.quarantined, f"rgb{NEGATIVE}")]
    bars = "".join(
        f'<div style="width:{100 * n / max(1, coverage.images):.3f}%;min-width:2px;background:{colour}"></div>'
        for n, colour in parts
        if n
    )
    return (
        '<div style="display:flex;width:16em;height:8px;margin:5px 0 3px;border-radius:3px;overflow:hidden;'
        f'background:rgba(127,127,127,.3)">{bars}</div><div style="white-space:normal">{escape(str(coverage))}</div>'
    )


def _card(card: dict, *, is_open: bool = False) -> str:
    lines = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in card.items())
    title = " ".join(str(card[name]) for name in ("name", "model") if card.get(name)) or "card"
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>"
        f'<pre style="{_PRE}">{escape(lines)}</pre></details>'
    )
