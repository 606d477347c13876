"""A table of text: for the terminal, aligned, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 120
"""Characters of a line that a terminal shows as one."""

INDENT = 10
"""Characters ahead of numbers whose labels are above them."""


@dataclass
class Sheet:
    """Cells are text; the first `labels` columns are words, the others numbers."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]]
    labels: int = 1
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Ends with a line break. Of a table wider than WIDTH, labels stand on a line above their numbers."""
        every = range(len(self.head))
        head, *rows = [[self._aligned(line, every)] for line in (self.head, *self.rows)]
        if max(len(line) for (line,) in (head, *rows)) > WIDTH:
            head, *rows = map(self._folded, (self.head, *self.rows))
        lines = [*head, *(line for row in rows for line in row)]
        lines.insert(len(head), "-" * max(map(len, lines)))
        width = max(100, len(lines[len(head)]))
        notes = [textwrap.fill(note, width, initial_indent="  ", subsequent_indent="    ") for note in self.notes]
        return "\n".join([self.title, *lines, *notes]) + "\n"

    def _folded(self, row: Sequence[str]) -> list[str]:
        """One line if the labels are short, else two."""
        words = ", ".join(filter(None, row[: self.labels]))
        numbers = self._aligned(row, range(self.labels, len(row)))
        if len(words) <= INDENT - 2:
            return [f"{words:{INDENT}}{numbers}"]
        return [words, " " * INDENT + numbers]

    def _aligned(self, row: Sequence[str], columns: range) -> str:
        widths = [max(len(line[i]) for line in (self.head, *self.rows)) for i in columns]
        return "  ".join(self._padded(i, row[i], width) for i, width in zip(columns, widths, strict=True)).rstrip()

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
