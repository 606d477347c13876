"""A table of text: for the terminal, aligned, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Sheet:
    """Cells are text; the first `labels` columns are words, the others numbers."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]]
    labels: int = 1
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Ends with a line break."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        lines = ["  ".join(self._padded(i, line[i], widths[i]) for i in range(len(widths))).rstrip() for line in lines]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        width = max(100, len(lines[1]))
        notes = [textwrap.fill(note, width, initial_indent="  ", subsequent_indent="    ") for note in self.notes]
        return "\n".join([self.title, *lines, *notes]) + "\n"

    def _padded(self, column: int, cell: str, width: int) -> str:
        return cell.ljust(width) if column < self.labels else cell.rjust(width)

    def markdown(self) -> str:
        """With the title as a heading of the second level; ends with a line break."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.head))]
        table = [f"| {' | '.join(map(_escaped, line))} |" for line in (self.head, rule, *self.rows)]
        notes = ["", *(f"- {_escaped(note)}" for note in self.notes)] if self.notes else []
        return "\n".join([f"## {_escaped(self.title)}", "", *table, *notes]) + "\n"


def _escaped(cell: str) -> str:
    """On one line, and no mark-up."""
    return "".join(f"\\{c}" if c in r"\|*_`<[" else c for c in " ".join(cell.split()))
