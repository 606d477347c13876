"""Line charts over steps, as inline SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

from .page import number

_WIDTH, _HEIGHT = 400, 224  # of a chart; the page decides how many stand side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 20, 34
_BUCKETS = 300  # points of a drawn curve, at most
_SMALL = (132, 56)  # of a chart of many
_SMALL_BUCKETS = 60
_SMOOTHED_FROM = 12  # steps; a shorter curve is drawn as it is, with a dot a step
_CUT_FROM = 100  # steps; the frame of a longer curve leaves its extreme hundredths out
NUM_COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """A named series: y, NaN and infinities allowed, over x ascending."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    log: bool = False,
    smoothed: bool = True,
    mark_zeros: bool = False,
) -> str:
    """A line chart over steps, or '' without a curve that has a value.

    Curves are smoothed over their faint raw values, and the legend gives their `closing_mean`; without `smoothed` both
    are as they are. Values that are not finite, with `mark_zeros` also those that are zero, are crosses on the step
    axis. Values beyond the frame are counted below it, for a single spike must not flatten the rest. `log` is for a
    logarithmic y axis.
    """
    prepared = [_Prepared.of(c, smoothed, mark_zeros) for c in curves if len(c.x)]
    if not prepared:
        return ""
    low, high = _y_range(prepared, log)
    x_low, x_high = (pick(p.x_range[i] for p in prepared) for i, pick in enumerate((min, max)))
    x_span = x_high - x_low

    def to_x(x: float) -> float:
        share = (x - x_low) / x_span if x_span else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def to_y(y: float) -> float:
        if log:
            share = math.log(max(y, low / 10) / low) / math.log(high / low)
        else:
            share = (y - low) / (high - low)
        return _HEIGHT - _BOTTOM - min(1.5, max(-0.5, share)) * (_HEIGHT - _TOP - _BOTTOM)

    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    ticks = _log_ticks(low, high) if log else _ticks(low, high, 5)
    for value, text in zip(ticks, _tick_texts(ticks), strict=True):
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    x_ticks = [x for x in _ticks(x_low, x_high, 5) if x == round(x)] if x_span else [x_low]
    for value, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
        parts.append(f'<text x="{to_x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end">step</text>')
    parts.append(f'<text x="{_LEFT}" y="10">{escape(unit + (", log scale" if log else ""))}</text>')
    faint, bold, marks = [], [], []
    for i, p in enumerate(prepared):
        colour = f"c{i % NUM_COLOURS}"
        if p.smoothed is not None:
            kind, ends = ("band", "Z") if p.is_band else ("raw", "")
            faint.append(f'<path class="{kind} {colour}" d="{_path(p.raw_x, p.raw_y, to_x, to_y)}{ends}"/>')
        line = p.bucket_y if p.smoothed is None else p.smoothed
        bold.append(f'<path class="line {colour}" d="{_path(p.bucket_x, line, to_x, to_y)}"/>')
        if len(p.values) < _SMOOTHED_FROM:
            points = zip(p.bucket_x, p.bucket_y, strict=True)
            bold += [
                f'<circle class="dot {colour}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="2.2"/>'
                for x, y in points
                if math.isfinite(y)
            ]
        marks += [f'<path class="mark" d="M{to_x(x) - 4:.1f} {bottom - 4}l8 8m0 -8l-8 8"/>' for x in p.bad]
    frame = f'x="{_LEFT}" y="{_TOP - 4}" width="{right - _LEFT}" height="{bottom - _TOP + 8}"'
    box = f'viewBox="{_LEFT} {_TOP - 4} {right - _LEFT} {bottom - _TOP + 8}"'
    parts += [f"<svg {frame} {box}>", *faint, *bold, "</svg>", *marks]  # a nested svg clips what is beyond the frame
    legend = "".join(
        f'<span><i class="key c{i % NUM_COLOURS}"></i>{escape(p.name)} <b>{number(p.end)}</b></span>'
        for i, p in enumerate(prepared)
    )
    beyond = sum(p.outside(low, high) for p in prepared)
    below = (
        f'<div class="beyond">{beyond} {"value" if beyond == 1 else "values"} beyond the frame</div>' if beyond else ""
    )
    spoken = "; ".join(f"{p.name} ends at {number(p.end)}" for p in prepared)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}: {spoken}")}">'
        f"{''.join(parts)}</svg>{below}</figure>"
    )


def multiples(curves: Sequence[Curve], title: str) -> str:
    """Small charts of many curves with the same axes, each smoothed under its name and `closing_mean`."""
    width, height = _SMALL
    thinned = [_thinned(curve, _SMALL_BUCKETS) for curve in curves]
    finite = np.concatenate([y[np.isfinite(y)] for _, y in thinned])
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    span = high - low or 1.0
    first, last = (pick(x for curve in curves for x in curve.x) for pick in (min, max))
    cells = []
    for curve, (x, y) in zip(curves, thinned, strict=True):
        path = _path(
            x,
            y,
            lambda at: (at - first) / ((last - first) or 1) * width,
            lambda value: height - 3 - (value - low) / span * (height - 6),
        )
        end = number(closing_mean(curve.y)[0])
        cells.append(
            f'<figure><figcaption>{escape(curve.name)} <b>{end}</b></figcaption><svg viewBox="0 0 {width} {height}" '
            f'role="img" aria-label="{escape(f"{title}, {curve.name}: ends at {end}")}">'
            f'<path class="axis" d="M0 {height}H{width}"/><path class="line c0" d="{path}"/></svg></figure>'
        )
    scale = f"All from {number(low)} to {number(high)}, over steps {number(first)} to {number(last)}."
    return f'<div class="multiples">{"".join(cells)}</div><p class="beyond">{scale}</p>'


def _thinned(curve: Curve, count: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` points, means over buckets of finite values, NaN where a bucket has none."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    parts = _buckets(len(x), count)
    fine = [part[np.isfinite(y[part])] for part in parts]
    means = [y[part].mean() if len(part) else math.nan for part in fine]
    return np.array([x[part].mean() for part in parts]), np.array(means)


def _buckets(length: int, count: int) -> list[np.ndarray]:
    """Indices in at most `count` parts, as like as can be: among parts of one and of two, a band would come and go."""
    size = math.ceil(length / count)
    return np.array_split(np.arange(length), math.ceil(length / size))


@dataclass(frozen=True)
class _Prepared:
    """A curve of at most `_BUCKETS` points, however many steps it has."""

    name: str
    x_range: tuple[float, float]
    values: np.ndarray
    """every value, as given"""
    raw_x: np.ndarray
    raw_y: np.ndarray
    """the raw curve; of a long one the outline of a band, the least value of each bucket and back the greatest"""
    is_band: bool
    bucket_x: np.ndarray
    bucket_y: np.ndarray
    """means over buckets, NaN where a bucket has no finite value"""
    smoothed: np.ndarray | None
    """None for a curve that is drawn as it is"""
    bad: list[float]
    """x of values to mark, at most 60 of them"""
    end: float

    @classmethod
    def of(cls, curve: Curve, smoothed: bool, mark_zeros: bool) -> _Prepared:
        x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
        fine = np.where(np.isfinite(y), y, np.nan)
        bad = x[~np.isfinite(y) | (mark_zeros & (y == 0))]
        raw_x, raw_y, bucket_x, bucket_y = x, fine, x, fine
        if len(x) > _BUCKETS:
            parts = [p for p in _buckets(len(x), _BUCKETS) if np.isfinite(fine[p]).any()]
            bucket_x = np.array([x[p].mean() for p in parts])
            bucket_y = np.array([np.nanmean(fine[p]) for p in parts])
            raw_x = np.concatenate([bucket_x, bucket_x[::-1]])
            raw_y = np.array([np.nanmin(fine[p]) for p in parts] + [np.nanmax(fine[p]) for p in parts[::-1]])
        return cls(
            name=curve.name,
            x_range=(float(x[0]), float(x[-1])),
            values=y,
            raw_x=raw_x,
            raw_y=raw_y,
            is_band=len(x) > _BUCKETS,
            bucket_x=bucket_x,
            bucket_y=bucket_y,
            smoothed=smooth(bucket_y) if smoothed and len(x) >= _SMOOTHED_FROM else None,
            bad=bad[np.linspace(0, len(bad) - 1, min(60, len(bad))).astype(int)].tolist(),
            end=closing_mean(y)[0] if smoothed else float(y[-1]),
        )

    def outside(self, low: float, high: float) -> int:
        finite = self.values[np.isfinite(self.values)]
        return int(((finite < low) | (finite > high)).sum())


def closing_mean(values: Sequence[float]) -> tuple[float, int]:
    """The mean of the last twentieth of a curve, and of how many values it is; NaN if one of them is."""
    count = max(1, len(values) // 20)
    return float(np.mean(np.asarray(values[-count:], np.float64))), count


def smooth(values: np.ndarray, width: float | None = None) -> np.ndarray:
    """Gaussian mean over neighbours, NaN left out; `width` is the standard deviation in points, by default a 60th."""
    width = max(1.0, len(values) / 60) if width is None else width
    reach = min(math.ceil(3 * width), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)
    weight = np.convolve(finite.astype(float), kernel, "same")
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    return np.where(weight > 1e-9, total / np.maximum(weight, 1e-9), np.nan)


def _y_range(curves: Iterable[_Prepared], log: bool) -> tuple[float, float]:
    """Range of the lines as a whole, and of all raw values but the extreme hundredths."""
    lows, highs = [], []
    for c in curves:
        line = c.bucket_y if c.smoothed is None else c.smoothed
        for values, cut in ((line, 0), (c.values, 1 if len(c.values) >= _CUT_FROM else 0)):
            values = values[np.isfinite(values) & ((values > 0) | (not log))]
            if len(values):
                lows.append(float(np.percentile(values, cut)))
                highs.append(float(np.percentile(values, 100 - cut)))
    if not lows:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(lows), max(highs)
    if log:
        low, high = low / 1.3, high * 1.3
        return (low, high) if high / low >= 10 else (low / 2, high * 2)
    varies = high - low > 1e-9 * max(abs(low), abs(high))  # beyond the rounding of means
    pad = 0.06 * (high - low) if varies else 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.25 * high else low - pad), high + pad


def _ticks(low: float, high: float, count: int) -> list[float]:
    values = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(v) for v in values if low - slack <= v <= high + slack]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= 6:
            break
    return ticks


def _tick_texts(values: Sequence[float]) -> list[str]:
    largest = max(map(abs, values), default=0)
    if largest and (largest < 1e-2 or largest >= 1e7):
        pairs = [f"{v:.2e}".split("e") for v in values]
        return ["0" if not v else f"{float(m):g}e{int(e)}" for v, (m, e) in zip(values, pairs, strict=True)]
    if largest >= 1e4:
        return ["0" if not v else f"{v / 1000:g}k" for v in values]
    return [f"{v:.6g}" for v in values]


def _path(x: np.ndarray, y: np.ndarray, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    words, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b):
            pen = "M"
            continue
        words.append(f"{pen}{to_x(a):.1f} {to_y(b):.1f}")
        pen = "L"
    return "".join(words)
