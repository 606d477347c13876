"""The report's page: values to HTML, and curves to SVG. What is on the page is `report.py`'s affair.

A page is one file and asks for nothing: pictures are data URLs, charts are inline SVG that takes its colours from the
style sheet, so both follow the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

_WIDTH, _HEIGHT = 400, 224  # of a chart; the page decides how many stand side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 20, 34
_BUCKETS = 500  # points of a drawn curve, at most
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
            parts = [p for p in np.array_split(np.arange(len(x)), _BUCKETS) if np.isfinite(fine[p]).any()]
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
    """Of the lines as a whole, and of all raw values but the extreme hundredths."""
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
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
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


def picture(image: Image.Image, alt: str, *, pixels: bool = False, css: str = "") -> str:
    """An image as it stands in the page: PNG, or JPEG if it is a photograph (RGB, and not `pixels`).

    `pixels` are for pictures of few, large pixels, which are enlarged without blur.
    """
    photograph = image.mode == "RGB" and not pixels
    stream = io.BytesIO()
    image.save(stream, **({"format": "JPEG", "quality": 85} if photograph else {"format": "PNG", "optimize": True}))
    kind = "jpeg" if photograph else "png"
    names = " ".join(filter(None, ("pixels" if pixels else "", css)))
    return (
        f'<img src="data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}" alt="{escape(alt)}" '
        f'width="{image.width}" height="{image.height}"' + (f' class="{names}"' if names else "") + ">"
    )


def empty(text: str) -> str:
    """The place of a picture that is not to be had, with the reason."""
    return f'<div class="empty">{escape(text)}</div>'


def note(text: str) -> str:
    """A paragraph apart."""
    return f'<p class="note">{escape(text)}</p>'


def warning(lines: Sequence[str]) -> str:
    """Sentences that must not be missed; '' without one."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="fault" role="alert">{items}</ul>' if items else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table; columns in `numbers` are set to the right. A cell is text, or `Markup`."""

    def cell(tag: str, i: int, value: object) -> str:
        text = value.html if isinstance(value, Markup) else escape(str(value))
        return f"<{tag}{' class=num' if i in numbers else ''}>{text}</{tag}>"

    lines = ["".join(cell("td", i, v) for i, v in enumerate(row)) for row in rows]
    heads = "".join(cell("th", i, h) for i, h in enumerate(head))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


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
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


_DARK = """--paper:#15171b;--raised:#1d2026;--ink:#e4e6ea;--soft:#9ba2ad;--rule:#343943;
--fault:#ff8f73;--fault-back:#3a211c;--c0:#5fb0f5;--c1:#f2a154;--c2:#46c9a2;--c3:#dd93cf;--c4:#e6cf57;--c5:#a9b4c6"""
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--raised:#f5f6f8;--ink:#1d2126;--soft:#626b77;--rule:#dde1e6;
--fault:#a5320f;--fault-back:#fdeee9;--c0:#0b6cb5;--c1:#cf5a00;--c2:#00795c;--c3:#ab4a93;--c4:#8a7000;--c5:#566173}
@media (prefers-color-scheme:dark){:root{DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:36px clamp(14px,3vw,36px) 80px}
h1{font-size:28px;line-height:1.2;letter-spacing:-.015em;margin:0 0 4px;font-weight:650}
h2{font-size:22px;letter-spacing:-.01em;margin:0 0 2px;font-weight:650;overflow-wrap:anywhere}
h3{font-size:16px;margin:0 0 8px;font-weight:650}
h4{font-size:13.5px;margin:0 0 6px;font-weight:600}
section{margin-top:44px;padding-top:26px;border-top:1px solid var(--rule)}
.block{margin-top:34px}
.lead,.about,.beyond,figcaption small,footer{color:var(--soft)}
.lead{margin:0 0 14px;overflow-wrap:anywhere}.about{margin:-4px 0 12px;max-width:76ch;font-size:14px}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin-top:14px}a{color:var(--c0)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:10px;margin:16px 0}
.tiles>div{background:var(--raised);border-radius:8px;padding:11px 14px}
.tiles span,.tiles small{display:block;color:var(--soft);font-size:12.5px;line-height:1.35}
.tiles strong{display:block;font-size:22px;font-weight:600;line-height:1.35;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:0 32px;margin:14px 0 0}
.facts>div{display:flex;gap:12px;padding:5px 0;border-bottom:1px solid var(--rule);font-size:14px}
dt{flex:0 0 124px;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}
.fault,.note{margin:8px 0;padding:8px 13px;border-left:3px solid var(--fault);background:var(--fault-back);
border-radius:0 6px 6px 0;font-size:14px;overflow-wrap:anywhere}
.fault{list-style:none}.fault li{padding:2px 0 2px 24px;text-indent:-24px}
.fault li::before{content:"\\26A0\\FE0E";display:inline-block;width:24px;text-indent:0;color:var(--fault)}
.note{border-color:var(--rule);background:var(--raised)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:26px 28px}
.charts+.charts{margin-top:26px}
figure{margin:0;min-width:0}figcaption{font-size:13.5px;font-weight:600}
.chart>svg{display:block;width:100%;height:auto;overflow:visible}
.chart text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
path.mark{stroke:var(--fault);stroke-width:2.2}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
path{fill:none;stroke:var(--s);stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}
.band{stroke:none;fill:var(--s);opacity:.2}.line{stroke-width:1.9}
.dot{fill:var(--s)}
.legend{display:flex;flex-wrap:wrap;gap:0 16px;font-weight:400;color:var(--soft);font-size:12.5px;min-height:20px}
.legend b{color:var(--ink);font-weight:500;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:var(--s)}
.c0{--s:var(--c0)}.c1{--s:var(--c1)}.c2{--s:var(--c2)}.c3{--s:var(--c3)}.c4{--s:var(--c4)}.c5{--s:var(--c5)}
.beyond{font-size:12px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
th,td{text-align:left;padding:6px 22px 6px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:500;color:var(--soft);font-size:13px}
.num{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:inline-block;height:8px;width:110px;background:var(--rule);border-radius:3px;overflow:hidden;
vertical-align:1px}
.bar i{display:block;height:100%;background:var(--c0)}
details{margin-top:10px}summary{cursor:pointer;font-weight:500}
pre{margin:10px 0 0;padding:14px 16px;background:var(--raised);border-radius:8px;overflow-x:auto;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
img{display:block;max-width:100%;height:auto;border-radius:4px}
img.pixels{image-rendering:pixelated;width:100%;height:auto;border-radius:3px}
img.bars{width:100%;border-radius:0}
.empty{display:flex;align-items:center;justify-content:center;text-align:center;aspect-ratio:1;padding:10px;border-radius:4px;
font-size:12px;line-height:1.35;color:var(--soft);border:1px dashed var(--rule);overflow-wrap:anywhere;
background:repeating-linear-gradient(45deg,transparent 0 9px,var(--raised) 9px 12px)}
.sample{display:grid;grid-template-columns:minmax(150px,210px) 1fr;gap:20px 28px;padding:20px 0;
border-top:1px solid var(--rule)}
.sample:first-of-type{border-top:0}
.sample>figure figcaption{font-weight:400;margin-top:6px;overflow-wrap:anywhere}
.sample>figure img{width:100%;max-height:260px;object-fit:contain;object-position:left top}
figcaption small{display:block;font-size:12.5px;line-height:1.4;font-weight:400}
.tasks{display:flex;flex-wrap:wrap;gap:20px 28px;align-items:flex-start}
.maps{display:grid;grid-template-columns:repeat(var(--n),minmax(64px,108px));gap:8px}
.maps figcaption,.strips figcaption{font-weight:400;font-size:12.5px;line-height:1.35;margin-top:4px}
.maps figcaption b,.strips figcaption b{font-weight:600;font-variant-numeric:tabular-nums}
.maps figcaption span{display:block}
.strips{display:grid;gap:8px;width:168px;max-width:100%}.strips .empty{aspect-ratio:auto;min-height:48px}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:24px 32px}
.answer{display:grid;grid-template-columns:minmax(96px,150px) 1fr;gap:16px;align-items:start}
.answer p{margin:0 0 8px;overflow-wrap:anywhere}.answer .asked{color:var(--soft)}
footer{margin-top:56px;padding-top:16px;border-top:1px solid var(--rule);font-size:13px}
@media (max-width:640px){.sample{grid-template-columns:1fr}.sample>figure{max-width:260px}.block{margin-top:28px}
.maps{grid-template-columns:repeat(var(--m),minmax(0,1fr));width:100%}.task{width:100%}.strips{width:100%}h1{font-size:24px}}
@media print{section{break-inside:auto}figure,.sample,.answer{break-inside:avoid}}
""".replace("DARK", _DARK).strip()
