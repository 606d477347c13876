"""Charts over layers with their intervals, in the page's own colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from olavlm.pipelines.layer_plot import HEIGHT, WIDTH, Line, panel

from .chart import NUM_COLOURS
from .page import number


def layer_chart(title: str, lines: Sequence[Line], unit: str, order: Sequence[str] = ()) -> str:
    """A line each with its band, or '' without one.

    Args:
        order: names whose places say their colours, where charts side by side lack some of each other's lines.
    """
    if not lines:
        return ""
    names = list(order or dict.fromkeys(line.name for line in lines))
    styles = {name: place % NUM_COLOURS for place, name in enumerate(names)}
    legend = "".join(
        '<span><svg class="dash" viewBox="0 0 26 6" aria-hidden="true">'
        f'<path class="line s{styles[line.name]}" d="M0 3h26"/></svg> '
        f"{escape(line.name)}</span>"
        for line in lines
    )
    spoken = "; ".join(map(_spoken, lines))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {spoken}")}">'
        f"{panel('', lines, styles, unit)}</svg></figure>"
    )


def _spoken(line: Line) -> str:
    places = range(len(line.means))
    least, greatest = (pick(places, key=line.means.__getitem__) for pick in (min, max))
    return (
        f"{line.name} is highest at layer {line.layers[greatest]} with {number(line.means[greatest])}, lowest at layer "
        f"{line.layers[least]} with {number(line.means[least])}"
    )
