"""Pages of documentation that benchmarks write: text and tables as one Markdown file, with its lines filled anew."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

WIDTH = 120


def filled(parts: Iterable[str]) -> str:
    """The parts as one text, with paragraphs and the items of lists filled anew: numbers differ in length."""
    paragraphs = "".join(parts).rstrip("\n").split("\n\n")
    return "\n\n".join(p if p.startswith(("|", "    ")) else _fill(p) for p in paragraphs) + "\n"


def _fill(paragraph: str) -> str:
    items = re.split(r"\n(?=\d+\. |- )", paragraph)
    indent = (2 if paragraph.startswith("- ") else 3) * " " if len(items) > 1 else ""
    options = {"width": WIDTH, "break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return "\n".join(textwrap.fill(" ".join(item.split()), **options) for item in items)
