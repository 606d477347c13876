"""The report's page: values to HTML.

A page is one file and asks for nothing: pictures are data URLs, charts are inline SVG, and both follow the reader's
light or dark setting (`style.py`).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from .style import STYLE

PHOTOGRAPH_SIDE = 480  # pixels, at most
WARNINGS_OPEN = 12


def number(value: float | None, digits: int = 4) -> str:
    """A number to read: few digits, thousands apart, a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(milliseconds: float) -> str:
    """Milliseconds to read, in the unit that suits them."""
    seconds = milliseconds / 1000
    if seconds < 1:
        return f"{number(milliseconds, 3)} ms"
    if seconds < 120:
        return f"{number(seconds, 3)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers with runs of them joined, such as 1-3, 8."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def picture(image: Image.Image, alt: str, *, pixels: bool = False, css: str = "") -> str:
    """An image as it stands in the page: PNG, or JPEG if it is a photograph (RGB, and not `pixels`).

    `pixels` are for pictures of few, large pixels, which are enlarged without blur.
    """
    is_photograph = image.mode == "RGB" and not pixels
    stream = io.BytesIO()
    image.save(stream, **({"format": "JPEG", "quality": 85} if is_photograph else {"format": "PNG", "optimize": True}))
    kind = "jpeg" if is_photograph else "png"
    names = " ".join(filter(None, ("pixels" if pixels else "", css)))
    return (
        f'<img src="data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}" alt="{escape(alt)}" '
        f'width="{image.width}" height="{image.height}"' + (f' class="{names}"' if names else "") + ">"
    )


def photograph(image: Image.Image | None, name: str, why: str = "the photograph cannot be read") -> str:
    """A photograph at a size for the page, or the place of one, with the reason."""
    if image is None:
        return empty(why)
    small = image.copy()
    small.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
    return picture(small, name)


def empty(text: str) -> str:
    """The place of a picture that is not to be had, with the reason."""
    return f'<div class="empty">{escape(text)}</div>'


def note(text: str) -> str:
    """A paragraph apart."""
    return f'<p class="note">{escape(text)}</p>'


def warning(lines: Sequence[str]) -> str:
    """Sentences that must not be missed, of very many the first ones open; '' without one."""
    items = [f"<li>{escape(line)}</li>" for line in lines]
    first, rest = "".join(items[:WARNINGS_OPEN]), "".join(items[WARNINGS_OPEN:])
    more = fold(f"{len(items) - WARNINGS_OPEN} more", f'<ul class="fault">{rest}</ul>') if rest else ""
    return f'<ul class="fault" role="alert">{first}</ul>{more}' if first else ""


def table(
    name: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Sequence[int] = (),
    shown: bool = False,
) -> str:
    """A table; columns in `numbers` are set to the right. A cell is text, or `Markup`.

    `name` is for who hears the page, and for who sees it if `shown`.
    """

    def cell(tag: str, i: int, value: object) -> str:
        text = value.html if isinstance(value, Markup) else escape(str(value))
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{' class=num' if i in numbers else ''}>{text}</{tag}>"

    lines = ["".join(cell("td", i, v) for i, v in enumerate(row)) for row in rows]
    heads = "".join(cell("th", i, h) for i, h in enumerate(head))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    caption = f"<caption>{escape(name)}</caption>" if shown else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table>{caption}'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


@dataclass(frozen=True)
class Markup:
    """HTML that is not to be escaped."""

    html: str


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, as a list in columns."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
        + "</dl>"
    )


def tiles(triples: Iterable[tuple[str, str, str]]) -> str:
    """The few numbers to see first: name, value, and a word about it."""
    cells = "".join(
        f"<div><span>{escape(name)}</span><strong>{escape(value)}</strong><small>{escape(word)}</small></div>"
        for name, value, word in triples
    )
    return f'<div class="tiles">{cells}</div>'


def fold(title: str, content: str) -> str:
    """Content behind its title, closed at first."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def source(text: str, name: str) -> str:
    """Text as it is, that can be scrolled by keyboard too."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(name)}">{escape(text)}</pre>'


def block(title: str, content: str, about: str = "") -> str:
    """A titled part of a section; '' without content."""
    about = f'<p class="about">{escape(about)}</p>' if about else ""
    return f"<div class=block><h3>{escape(title)}</h3>{about}{content}</div>" if content else ""


def page(title: str, body: str) -> str:
    """The whole file. Its policy forbids the browser any request."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def charts(drawn: Iterable[str]) -> str:
    """Figures side by side, as many as the page is wide; '' without one."""
    content = "".join(drawn)
    return f'<div class="charts">{content}</div>' if content else ""
