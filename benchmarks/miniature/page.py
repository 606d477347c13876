"""The page of a run: what was found, figure 3, the tables, and pictures. One file, which asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from olavlm.pipelines.layer_plot import Line
from olavlm.pipelines.reporting.layer_chart import layer_chart
from olavlm.pipelines.reporting.page import (
    block,
    charts,
    duration,
    facts,
    fold,
    note,
    page,
    picture,
    source,
    table,
    tiles,
)

from ..figures import Count, Figures, ItemPairs, Seeds, from_json, number
from .arms import ARMS, DISTILLED, SINGLE
from .findings import distilled_columns, findings, signed
from .forms import Form
from .pictures import Shown
from .shortcuts import interval

LEAD = (
    "The claim of OLA-VLM (arXiv 2412.09585), in a world small enough to hold: an LLM that is made to predict the "
    "features of vision teachers while it learns to caption sees better inside, and answers better. Pictures of solids "
    "are ray-cast, small teachers in the true architectures learn the world's truth, and every step is a command of "
    "this project. What came out stands here, whatever it is."
)
TOY = "The toy form shows that everything runs. Nothing was trained long enough for its figures to mean anything."
PROBES_ABOUT = (
    "A probe learns to read the teacher's features from the states of one layer of the frozen model; its cosine with "
    "them on pictures that nothing was trained on says how well the layer represents them. Lines are means over "
    "seeds, bands their 95 % intervals (Student's t); what counts is above a prediction that is the same for every "
    "picture, the mean of the pictures to train on. What tells the arms apart is the paired difference below: the "
    "arms of a seed share their data, its order, and what their probes start from. World, questions, teachers and the "
    "models that training starts from are the same in all seeds: intervals say nothing of other ones."
)
ARMS_ABOUT = (
    "PT, the first stage, trains on captions what joins the encoder and the language model; IFT, the second, trains "
    "the language model, too, on dialogues. Single encoder is LLaVA-1.5. Feature concat and token concat are fed the "
    "teachers' features, in training and in use: in the channels of the image's tokens, or as further tokens. "
    "Distilled sees the encoder alone; in PT the teachers' features are predicted from the states of some of its "
    "layers, for which it has task tokens of its own, which stay in IFT and in use."
)
ANSWERS_ABOUT = (
    "Accuracy in percent on held-out questions, asked and judged by olavlm-eval as CV-Bench is. Means over seeds, 95 % "
    "intervals in brackets; differences are of the seeds that both arms have. Intervals are of other seeds of "
    "training: of these questions, {questions} a task, another choice would move an accuracy near 50 by as much as "
    "{error:.1f} points. Each is one by itself, uncorrected for how many there are.{blind}"
)
AGAIN_ABOUT = "As above; differences are of the seeds that both arms have."
ITEMS_ABOUT = "Questions that only one of two models has right, a pair a seed, and McNemar's exact p value."
PICTURES_ABOUT = (
    "Pictures that nothing was trained on, first seed. Every map but the truth is drawn by the depth teacher's own "
    "decoder: of the teacher's features above, and of their mean over the pictures to train on, which is the same for "
    "every picture; below of what probes read in a layer, which tells of a picture only where it differs from that "
    "mean's. Red is close, and each map spans the colours by itself. The decoder reads four layers, and is given one, "
    "four times; it learned from four, and in some of the batches from their mean, four times."
)


TABLES = {
    "table 1": "Table 1: what answers gain",
    "what is counted": "Count, by what is counted",
    "table 4": "Table 4: in which stages there are losses",
    "table 5": "Table 5: how many task tokens",
}


def page_of(run: Mapping[str, Any], shown: Sequence[Shown], commands: Sequence[str] = ()) -> str:
    """The HTML file.

    Args:
        run: as results/*.json has it.
        shown: pictures, if there are any.
        commands: what was done, as a user would type it.
    """
    figures = {name: from_json(found) for name, found in run["figures"].items()}
    parts = [
        f"<h1>The paper in miniature</h1><p class=lead>{escape(LEAD)}</p>",
        note(TOY) if run["size"] == "toy" else "",
        _tiles(figures, run),
        block("What was found", _sentences(findings(figures, run["form"].get("blocks", Form.blocks), run["blind"]))),
        block("What is compared", f"<p>{escape(ARMS_ABOUT)}</p>"),
        _probes(figures),
        *(_answers(figures, name, run) for name in TABLES),
        _items(figures),
        _pictures(shown),
        _how(figures, run, commands),
    ]
    return page("The paper in miniature", "".join(parts))


def _sentences(found: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in found) + "</ul>" if found else ""


def _tiles(figures: Mapping[str, list[Figures]], run: Mapping[str, Any]) -> str:
    distilled, triples = ARMS[DISTILLED].title, []
    for chart in figures.get("figure 3", ()):
        if isinstance(chart, Seeds) and distilled in chart.over and "depth" in chart.title:
            stage = "PT" if "after PT" in chart.title else "IFT"
            for column in distilled_columns("depth", run["form"].get("blocks", Form.blocks)):
                found = chart.difference(distilled, column)
                name = f"depth, {column}, after {stage}"
                triples.append((name, f"{found.mean:+.4f}", f"distilled minus single: {signed(found, 4)}"))
    for table_1 in figures.get("table 1", ()):
        if isinstance(table_1, Seeds) and distilled in table_1.over and "Overall" in table_1.columns:
            found = table_1.difference(distilled, "Overall")
            triples.append(
                ("answers, overall", f"{found.mean:+.1f}", f"points, distilled minus single: {signed(found, 1)}")
            )
    triples.append((f"form {run['size']}", duration(1000 * run["seconds"]), f"on {run['machine']['cores']} cores"))
    return tiles(triples)


def _probes(figures: Mapping[str, list[Figures]]) -> str:
    order = [ARMS[name].title for name in (SINGLE, DISTILLED)]
    drawn, tables = [], []
    for chart in figures.get("figure 3", ()):
        order += [arm for arm in chart.values if arm not in order]
        title = chart.title.partition(",")[0]
        drawn.append(layer_chart(title, [_line(chart, arm) for arm in chart.values], "cosine", order))
        tables.append(_table(chart, title))
    content = charts(drawn) + fold("As numbers, and differences", "".join(tables))
    return block("Figure 3: what the layers know", content, PROBES_ABOUT) if drawn else ""


def _line(chart: Seeds, arm: str) -> Line:
    """Without a band where there is one seed."""
    found = [chart.interval(arm, column) for column in chart.columns]
    lows = [i.low if i.values > 1 else i.mean for i in found]
    highs = [i.high if i.values > 1 else i.mean for i in found]
    return Line(arm, [int(c.split()[-1]) for c in chart.columns], [i.mean for i in found], lows, highs)


def _table(figure: Seeds, title: str) -> str:
    rows = []
    for arm in figure.values:
        intervals = [figure.interval(arm, column) for column in figure.columns]
        rows.append([arm, intervals[0].values, *map(figure.written, intervals)])
    for arm, other in figure.over.items():
        intervals = [figure.difference(arm, column) for column in figure.columns]
        rows.append([f"{arm} minus {other}", intervals[0].values, *(signed(i, figure.digits) for i in intervals)])
    numbers = range(1, 2 + len(figure.columns))
    return table(title, ["", "seeds", *figure.columns], rows, numbers=numbers, shown=True)


def _answers(figures: Mapping[str, list[Figures]], name: str, run: Mapping[str, Any]) -> str:
    content = "".join(_table(figure, figure.title) for figure in figures.get(name, ()))
    told = ", ".join(f"{task} {percent:.1f}" for task, percent in run["blind"].items())
    blind = f" Without seeing any depth, places, seen sizes and shapes answer at least {told}." if told else ""
    questions = run["form"]["held_out"]
    about = ANSWERS_ABOUT.format(questions=questions, error=100 * interval(0.5, questions), blind=blind)
    return block(TABLES[name], content, about if name == next(iter(TABLES)) else AGAIN_ABOUT)


def _items(figures: Mapping[str, list[Figures]]) -> str:
    drawn = []
    for pairs in figures.get("item by item", ()):
        assert isinstance(pairs, ItemPairs)
        rows = [
            [name, found[0][0], *(f"{a} : {b}, p {p:.2g}" for (_, a, b), p in zip(found, pairs.p[name], strict=True))]
            for name, found in pairs.counts.items()
        ]
        head = ["", "questions", *(f"seed {seed}" for seed in pairs.seeds)]
        title = f"{pairs.title}: only {pairs.first} : only {pairs.second}"
        drawn.append(table(title, head, rows, numbers=range(1, len(head)), shown=True))
    return block("Question by question", "".join(drawn), ITEMS_ABOUT)


def _pictures(shown: Sequence[Shown]) -> str:
    samples = []
    for one in shown:
        ahead = {"truth": one.truth, **one.teacher}
        rows = [_maps("the world", ahead, one.name)]
        rows += [_maps(run, layers, one.name) for run, layers in one.layers.items()]
        told = f"<figcaption>{escape(one.name)}: {escape(one.caption)}</figcaption>"
        photograph = f"<figure>{picture(one.photograph, f'photograph of {one.caption}')}{told}</figure>"
        samples.append(f'<div class="sample">{photograph}<div class="tasks">{"".join(rows)}</div></div>')
    title = "Depth, from the LLM's layers" if any(one.layers for one in shown) else "The world, and depth"
    return block(title, "".join(samples), PICTURES_ABOUT)


def _maps(title: str, maps: Mapping[str, Any], name: str) -> str:
    figures = "".join(
        f"<figure>{picture(image, f'{name}, {title}: depth, {words}')}<figcaption>{escape(words)}</figcaption></figure>"
        for words, image in maps.items()
    )
    columns = f'style="--n:{len(maps)};--m:{min(3, len(maps))}"'
    return f'<div class="task"><h4>{escape(title)}</h4><div class="maps" {columns}>{figures}</div></div>'


def _how(figures: Mapping[str, list[Figures]], run: Mapping[str, Any], commands: Sequence[str]) -> str:
    machine = run["machine"]
    pairs = [
        ("measured", f"{machine['date']}, commit {machine['commit']}"),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB"),
        ("load", f"{machine['load']:g} when it began"),
        ("versions", ", ".join(f"{name} {version or 'absent'}" for name, version in machine["versions"].items())),
        *((name.replace("_", " "), _value(value)) for name, value in run["form"].items()),
    ]
    notes = dict.fromkeys(note for found in figures.values() for figure in found for note in figure.notes)
    scores = "".join(_scores(figure) for figure in figures.get("models", ()) if isinstance(figure, Count))
    content = facts(pairs) + "".join(f"<p>{escape(text)}</p>" for text in notes)
    content += fold("What the small models score", scores) if scores else ""
    content += fold("The commands", source("\n".join(commands), "commands")) if commands else ""
    return block("How", content)


def _scores(model: Count) -> str:
    rows = [[what, number(value)] for columns in model.values.values() for what, value in columns.items()]
    return table(model.title.replace("`", ""), ["", ""], rows, numbers=[1], shown=True)


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
