"""Scores over layers as one SVG file: a panel a task, a line a model with its interval (the paper's figure 3).

The file asks for nothing and follows the reader's light or dark setting; lines differ in colour and in dashes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT, _GAP = 340, 250, 28  # of a panel, and between panels
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 30, 42
_LEGEND_LINE, _LETTER = 20, 7.0  # pixels: of the legend's rows, and of a letter, a little generous
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 4")
_LIGHT = ("#0b6cb5", "#cf5a00", "#00795c", "#ab4a93", "#8a7000", "#566173")
_DARK = ("#5fb0f5", "#f2a154", "#46c9a2", "#dd93cf", "#e6cf57", "#a9b4c6")


@dataclass(frozen=True)
class Line:
    """A model's scores by layer, ascending, with the bounds of their intervals."""

    name: str
    layers: Sequence[int]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def layer_plot(panels: Mapping[str, Sequence[Line]], *, y_title: str, note: str = "") -> str:
    """The SVG file. A line's name stands for the same model in every panel; `note` is a sentence at the foot."""
    names = list(dict.fromkeys(line.name for lines in panels.values() for line in lines))
    styles = {name: number % len(_LIGHT) for number, name in enumerate(names)}
    width = round(max(len(panels) * (WIDTH + _GAP) - _GAP, _LETTER * len(note)) + 24)
    legend, rows = _legend(names, styles, width)
    top = 16 + rows * _LEGEND_LINE
    height = top + HEIGHT + (26 if note else 8)
    drawn = [
        f'<g transform="translate({12 + i * (WIDTH + _GAP)} {top})">{panel(task, lines, styles, y_title)}</g>'
        for i, (task, lines) in enumerate(panels.items())
    ]
    foot = f'<text x="12" y="{height - 9}">{escape(note)}</text>' if note else ""
    spoken = "; ".join(f"{task}: {_spoken(lines)}" for task, lines in panels.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(y_title)} by layer</title><desc>{escape(spoken)}</desc><style>{_style()}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>{legend}{"".join(drawn)}{foot}</svg>\n'
    )


def _spoken(lines: Sequence[Line]) -> str:
    best = [(line, max(range(len(line.means)), key=line.means.__getitem__)) for line in lines]
    return ", ".join(f"{line.name} is best at layer {line.layers[i]} with {line.means[i]:.3f}" for line, i in best)


def _legend(names: Sequence[str], styles: Mapping[str, int], width: float) -> tuple[str, int]:
    """Keys side by side, on as many rows as they need."""
    parts, x, row = [], 12.0, 0
    for name in names:
        needed = 36 + _LETTER * len(name) + 18
        if x > 12 and x + needed > width:
            x, row = 12.0, row + 1
        y = 18 + row * _LEGEND_LINE
        parts.append(f'<path class="line s{styles[name]}" d="M{x:.0f} {y - 4}h26"/>')
        parts.append(f'<text class="ink" x="{x + 32:.0f}" y="{y}">{escape(name)}</text>')
        x += needed
    return "".join(parts), row + 1


def panel(task: str, lines: Sequence[Line], styles: Mapping[str, int], y_title: str) -> str:
    """One plot as the content of an SVG, `WIDTH` by `HEIGHT`. `styles` gives each name its class, of s0 to s5.

    The style sheet defines these, and line, band, bar, dot, grid and axis.
    """
    layers = [layer for line in lines for layer in line.layers]
    low, high = min(v for line in lines for v in line.lows), max(v for line in lines for v in line.highs)
    pad = 0.06 * (high - low) or 0.05
    low, high, first, last = low - pad, high + pad, min(layers), max(layers)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def to_x(layer: float) -> float:
        share = (layer - first) / (last - first) if last > first else 0.5
        return _LEFT + 8 + share * (right - _LEFT - 16)

    def to_y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - _TOP)

    title = f'<tspan class="name">{escape(task)}</tspan> {escape(y_title)}'.strip()
    parts = [f'<text x="{_LEFT}" y="14">{title}</text>']
    for value in _ticks(low, high, 5):
        parts.append(f'<path class="grid" d="M{_LEFT} {to_y(value):.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{to_y(value) + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in _ticks(first, last, 8, integer=True):
        parts.append(f'<text x="{to_x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.0f}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{right}" y="{bottom + 32}" text-anchor="end">layer</text>')
    for line in lines:
        style = f"s{styles[line.name]}"
        there = _points(line.layers, line.highs, to_x, to_y)
        back = _points(line.layers[::-1], line.lows[::-1], to_x, to_y)
        parts.append(f'<path class="band {style}" d="M{"L".join([*there, *back])}Z"/>')
    for line in lines:
        style = f"s{styles[line.name]}"
        points = _points(line.layers, line.means, to_x, to_y)
        parts.append(f'<path class="line {style}" d="M{"L".join(points)}"/>')
        for x, mean, bottom_of, top_of in zip(line.layers, line.means, line.lows, line.highs, strict=True):
            parts.append(f'<path class="bar {style}" d="M{to_x(x):.1f} {to_y(bottom_of):.1f}V{to_y(top_of):.1f}"/>')
            parts.append(f'<circle class="dot {style}" cx="{to_x(x):.1f}" cy="{to_y(mean):.1f}" r="2.4"/>')
    return "".join(parts)


def _points(
    layers: Sequence[int], values: Sequence[float], to_x: Callable[[float], float], to_y: Callable[[float], float]
) -> list[str]:
    return [f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in zip(layers, values, strict=True)]


def _ticks(low: float, high: float, count: int, *, integer: bool = False) -> list[float]:
    if low == high:
        return [low]
    values = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)
    return [float(v) for v in values if low - 1e-9 <= v <= high + 1e-9]


def _style() -> str:
    def colours(palette: Sequence[str]) -> str:
        return "".join(f".s{i}{{--s:{colour}}}" for i, colour in enumerate(palette))

    dashes = "".join(f".line.s{i}{{stroke-dasharray:{d}}}" for i, d in enumerate(DASHES) if d)
    return (
        "svg{--paper:#fff;--ink:#1d2126;--soft:#626b77;--rule:#dde1e6;color-scheme:light dark}"
        f"{colours(_LIGHT)}@media (prefers-color-scheme:dark){{"
        f"svg{{--paper:#15171b;--ink:#e4e6ea;--soft:#9ba2ad;--rule:#343943}}{colours(_DARK)}}}"
        'text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft);'
        "font-variant-numeric:tabular-nums}text.ink{fill:var(--ink)}tspan.name{fill:var(--ink);font-weight:600}"
        ".paper{fill:var(--paper)}.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}"
        ".line{fill:none;stroke:var(--s);stroke-width:1.9;stroke-linejoin:round}"
        f".band{{fill:var(--s);opacity:.18}}.bar{{stroke:var(--s);opacity:.6}}.dot{{fill:var(--s)}}{dashes}"
    )
