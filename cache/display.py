"""How stores show themselves: the HTML of the notebook reprs, and the door to previews, comparisons and tables.

Inline styles without text colours, and greys that are half transparent, are legible on light and dark. Pictures have
the size they are shown in, so that a page that drops styles, as code forges do, still shows them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .colours import (
    NEGATIVE,
    POSITIVE,
    TIMES,
    PcaColours,
    bar_limit,
    fills_grid,
    heat_map,
    token_map,
    vector_bars,
)
from .comparison import Agreement, Comparison, compare
from .errors import CacheError
from .frames import failures_frame, outcome, plan_frame
from .preview import (
    SIDE,
    enlarged,
    panel,
    photograph,
    preview,
    sheet,
    why,
)
from .wording import counted, printable, storage

if TYPE_CHECKING:
    from .features import TeacherFeatures
    from .store import FeatureStore

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "SIDE",
    "TIMES",
    "Agreement",
    "Comparison",
    "PcaColours",
    "bar_limit",
    "compare",
    "enlarged",
    "failures_frame",
    "fills_grid",
    "panel",
    "plan_frame",
    "preview",
    "sheet",
    "store_html",
    "teacher_html",
    "token_map",
    "vector_bars",
]

COMPARED_SIDE = 168  # of a picture in a comparison, in pixels
_LEAST_SPAN = 0.05  # of the cosines in a heat map: what differs less is one colour
_FRAME = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;max-width:75em"
_RULE = "border-top:1px solid rgba(127,127,127,.35)"
_CELL = f"text-align:left;vertical-align:top;white-space:nowrap;padding:4px 14px 4px 0;background:none;{_RULE}"
_TABLE = "border-collapse:collapse;margin:6px 0 0;font:inherit;color:inherit"
_PRE = "margin:4px 0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;color:inherit;background:none"
_WRAPPED = "white-space:normal;overflow-wrap:anywhere;min-width:9em"
_FAINT = "opacity:.7"


def store_html(store: FeatureStore) -> str:
    """A self-contained HTML fragment: the plan, and of each teacher shape, dtype, size, coverage and card."""
    lines = []
    for key in store.teachers:
        try:
            features = store[key]
            _, tokens, dim = features.shape
            cells = [f"{tokens} {TIMES} {dim}", _storage(features), storage(features.ledger().bytes)]
            cells += [_coverage(features), f'<div style="{_WRAPPED};max-width:34em">{_card(features.card)}</div>']
        except (CacheError, OSError) as e:
            cells = ["", "", "", _note(why(e), "40em"), ""]
        lines.append([f"<b>{_text(key)}</b>", *cells])
    heads = ("key", f"tokens {TIMES} dim", "dtype", "size", "coverage", "card")
    plan = store.rows
    about = f"plan {plan.hash[:12]}, {plan.num_images:,} images, {counted(len(plan.segments), 'segment')}"
    body = _table(heads, lines) if lines else f'<div style="{_FAINT}">olavlm-extract adds features of a teacher.</div>'
    return (
        f'<div style="{_FRAME}"><b>FeatureStore</b> <code>{_text(store.path)}</code>'
        f'<div style="{_FAINT}">{about if plan.num_images else "no plan"}, {counted(len(lines), "teacher")}</div>'
        f"{body}</div>"
    )


def teacher_html(features: TeacherFeatures) -> str:
    """A self-contained HTML fragment: one teacher's shape, dtype, size, coverage and card."""
    rows, tokens, dim = features.shape
    return (
        f'<div style="{_FRAME}"><b>TeacherFeatures</b> <code>{_text(features.key)}</code>'
        f'<div style="{_FAINT}">{rows:,} plan rows {TIMES} {tokens} tokens {TIMES} {dim} dim, {_storage(features)}, '
        f"{storage(features.ledger().bytes)}, {features.layout.shard_rows} rows a shard</div>"
        f'<div style="margin:6px 0">{_coverage(features)}</div>{_card(features.card, is_open=True)}</div>'
    )


def comparison_html(comparison: Comparison) -> str:
    """A self-contained HTML fragment: both photographs, and each teacher's tokens in one basis, fitted on A's."""
    names = [
        f'<div style="{_WRAPPED};max-width:{COMPARED_SIDE}px"><b>{letter}</b> {_text(image)}</div>'
        f'<div style="font-weight:400;{_FAINT}">row {row}</div>'
        for letter, image, row in zip("AB", comparison.images, comparison.rows, strict=True)
    ]
    photographs = [photograph(comparison.store, image, None, COMPARED_SIDE) for image in comparison.images]
    shown = [
        _note(p) if isinstance(p, str) else _picture(p, image, photo=True)
        for p, image in zip(photographs, comparison.images, strict=True)
    ]
    lines = [["", *shown, "", ""]] + [_agreement_cells(agreement) for agreement in comparison.values()]
    return (
        f'<div style="{_FRAME}"><b>Comparison</b> <span style="{_FAINT}">colours of A and B in one basis, fitted on A'
        f"</span>{_table(('', *names, '', ''), lines)}</div>"
    )


def _agreement_cells(agreement: Agreement) -> list[str]:
    """Name, A, B, where they differ, and the numbers."""
    key, grid, tokens = agreement.key, agreement.grid, agreement.tokens
    known = [x for x in tokens if x is not None]
    name, drawn, differ, legend = f"<b>{_text(key)}</b>", [None, None], None, ""
    if known:
        name += f'<div style="{_FAINT}">{known[0].shape[0]} {TIMES} {known[0].shape[1]}</div>'
    if known and len(known[0]) == 1:
        size, limit = (COMPARED_SIDE, COMPARED_SIDE // 2), bar_limit(*known)
        drawn = [x if x is None else vector_bars(x[0], size, limit) for x in tokens]
        if not agreement.problem:
            differ, legend = vector_bars(tokens[1][0] - tokens[0][0], size, limit), "B \N{MINUS SIGN} A, the same scale"
    elif known:
        colours = PcaColours.fit(known[0])
        drawn = [x if x is None else enlarged(token_map(x, grid, colours), COMPARED_SIDE) for x in tokens]
        if agreement.worst_token is not None:
            high = float(np.nanmax(agreement.token_cosine))
            low = min(agreement.worst, high - _LEAST_SPAN)
            differ = enlarged(heat_map(agreement.token_cosine, grid, (low, high)), COMPARED_SIDE)
            scale = _picture(heat_map(np.linspace(0, 1, 64), None, (0, 1)).resize((64, 8)), "dark to light")
            legend = f"cosine {low:.2f} {scale} {high:.2f}"
    cells = [
        _note(problem) if problem else _picture(x, f"{key} of {letter}")
        for problem, x, letter in zip(agreement.problems, drawn, "AB", strict=True)
    ]
    against = "" if differ is None else f"{_picture(differ, f'{key}, A against B')}<div>{legend}</div>"
    return [name, *cells, against, "" if agreement.problem else _numbers(agreement)]


def _numbers(agreement: Agreement) -> str:
    return "".join(
        f'<div><span style="{_FAINT}">{escape(name)}</span> {value}</div>' for name, value in agreement.figures()
    )


def _note(text: str, width: str = f"{COMPARED_SIDE}px") -> str:
    return f'<div style="{_WRAPPED};max-width:{width}">{_text(text)}</div>'


def _picture(picture: Image.Image, name: str, *, photo: bool = False) -> str:
    """An image with its bytes inside, at the size it has."""
    kind, options = ("jpeg", {"quality": 85}) if photo else ("png", {"optimize": True})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return (
        f'<img src="{source}" width="{picture.width}" height="{picture.height}" alt="{_text(name)}" '
        'style="display:inline;margin:0;max-width:none">'
    )


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    first = "".join(f'<th style="{_CELL};font-weight:600;border-top:0">{head}</th>' for head in heads)
    rest = ("".join(f'<td style="{_CELL}">{cell}</td>' for cell in line) for line in lines)
    body = "".join(f'<tr style="background:none">{line}</tr>' for line in (first, *rest))
    return f'<table style="{_TABLE}">{body}</table>'


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _storage(features: TeacherFeatures) -> str:
    layout = features.layout
    return layout.dtype + (f", {layout.compress}" if layout.compress != "none" else "")


def _coverage(features: TeacherFeatures) -> str:
    coverage, damaged = features.coverage(), len(features.ledger().damaged)
    parts = [(coverage.valid, f"rgb{POSITIVE}"), (coverage.quarantined, f"rgb{NEGATIVE}")]
    bars = "".join(
        f'<div style="width:{100 * n / max(1, coverage.images):.3f}%;min-width:2px;background:{colour}"></div>'
        for n, colour in parts
        if n
    )
    reasons = ", ".join(f"{n:,} {outcome(reason)}" for reason, n in sorted(coverage.reasons.items()))
    text = (
        f"{coverage.covered:,} of {coverage.images:,} images: {coverage.valid:,} valid, "
        f"{coverage.quarantined:,} quarantined"
        + (f" ({reasons})" if reasons else "")
        + (f", {coverage.missing:,} missing" if coverage.missing else "")
        + (f", {counted(damaged, 'shard')} damaged" if damaged else "")
    )
    return (
        '<div style="display:flex;width:16em;height:8px;margin:5px 0 3px;border-radius:3px;overflow:hidden;'
        f'background:rgba(127,127,127,.3)">{bars}</div>'
        f"{_note(text, '40em')}"
    )


def _card(card: dict, *, is_open: bool = False) -> str:
    lines = "\n".join(f"{_text(name)}: {_text(json.dumps(value, ensure_ascii=False))}" for name, value in card.items())
    title = " ".join(str(card[name]) for name in ("name", "model") if card.get(name)) or "card"
    return (
        f"<details{' open' if is_open else ''}><summary>{_text(title)}</summary>"
        f'<pre style="{_PRE}">{lines}</pre></details>'
    )
