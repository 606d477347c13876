"""Run folders to report on, and a reader of pages."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from olavlm.pipelines.report import main

TERMS = [f"loss/{task}/{x}/{kind}" for task, x in (("depth", 2), ("seg", 3)) for kind in ("smooth_l1", "contrastive")]
RECIPE = """
model: {llm: some/llm, encoder: "<b>encoder</b>", order: [gen, depth, seg]}
data: {file: pt.json, images: images}
tasks: {depth: {layers: [2], weight: 0.5}, seg: {layers: [3], weight: 0.5}}
losses: {stages: [pt], contrastive: true, contrastive_weight: 0.3}
targets: {store: nowhere, source: cache}
train: {output_dir: runs/pt, batch_size: 4, accumulation: 2, epochs: 1, lr: 0.001, mixed_precision: bf16}
"""


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, steps=..., stage=..., **metrics) -> a run folder; a metric may be a function of the step."""

    def make(name="pt", steps=30, stage="pt", **metrics):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        values = {"loss/text": 2.0, "lr": 1e-3, "epoch": 0.5, "step_ms": 100.0, "data_wait_ms": 2.0}
        if stage == "pt":
            values |= dict.fromkeys(TERMS, 0.5) | {"valid/depth": 8, "valid/seg": 8, "scale/depth": 7.4}
        values |= {"loss/total": 3.0} | metrics
        with (folder / "metrics.jsonl").open("w") as f:
            for step in range(1, steps + 1):
                line = {k: v(step) if callable(v) else v for k, v in values.items()}
                f.write(json.dumps({"step": step, **{k: v for k, v in line.items() if v != "absent"}}) + "\n")
        (folder / "recipe.yaml").write_text(RECIPE)
        parts = [
            {"part": "llm", "parameters": 4000, "trainable": 0},
            {"part": "projector", "parameters": 9, "trainable": 9},
        ]
        (folder / "stage.json").write_text(json.dumps({"stage": stage, "processes": 2, "parts": parts}))
        (folder / "versions.json").write_text(json.dumps({"olavlm": "0.1.0", "torch": "9.9"}))
        (folder / "adapter.json").write_text("{}")
        return folder

    return make


class Page(HTMLParser):
    """A page whose tags close in order and whose attributes ask for nothing; `text`, `tags`, and text by class.

    Its headings leave no level out, and whoever cannot see its pictures is told of them.
    """

    VOID = frozenset({"meta", "link", "img", "line", "path", "circle", "br"})

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.text, self.by_class = html, [], [], "", {}
        self.feed(html)
        assert not self.open, self.open
        for tag, attrs in self.tags:
            assert tag not in ("script", "iframe", "object", "video", "audio", "base", "form")
            for name in ("src", "href", "srcset", "data", "xlink:href", "action", "poster"):
                assert name not in attrs or attrs[name].startswith(("data:", "#")), (tag, attrs)
            assert tag != "img" or attrs["alt"], attrs
            assert attrs.get("role") != "img" or attrs["aria-label"], attrs
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(deeper <= level + 1 for level, deeper in pairwise(levels)), levels
        assert not re.search(r"@import|url\(|https?://|//[a-z]", re.sub(r"base64,[^\"]*", "", html))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append((tag, attrs.get("class", "")))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag, (opened, tag)

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            return
        self.text += data
        for _, names in self.open:
            for name in names.split():
                self.by_class[name] = self.by_class.get(name, "") + data


@pytest.fixture
def report(tmp_path, capsys):
    """report(*words) -> the page that the command writes."""

    def write(*words):
        output = tmp_path / "out" / "report.html"
        assert main([*map(str, words), "--output", str(output)]) == 0
        assert str(output) in capsys.readouterr().out
        return Page(output.read_text())

    return write


@pytest.fixture
def read_page():
    """read_page(html) -> what it holds; an AssertionError if it is not as pages have to be."""
    return Page
