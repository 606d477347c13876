"""The shipped recipes as text: whole ones with what they are, rows of the paper's tables with what they change."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from olavlm.student.recipes import shipped_recipes, table_rows


def list_recipes() -> str:
    """One recipe a line, by the name that `--config` takes."""
    rows = table_rows()
    whole = {name: file for name, file in shipped_recipes().items() if name not in rows}
    width = max(map(len, [*whole, *rows]))
    lines = [f"{name:<{width}}  {_first_comment(file.read_text(encoding='utf-8'))}" for name, file in whole.items()]
    for table, members in groupby(rows.values(), lambda row: row.name.partition("/")[0]):
        of_table = list(members)
        lines += ["", f"{table}: {of_table[0].title}"]
        for row in of_table:
            changes = " ".join(_flat(row.overrides)) or "as it is"
            lines.append(f"{row.name:<{width}}  {row.base}: {changes}")
    return "\n".join(lines)


def _first_comment(text: str) -> str:
    return text.partition("\n")[0].removeprefix("#").strip()


def _flat(content: dict[str, Any], above: str = "") -> list[str]:
    """section.field=value of each field."""
    words = []
    for key, value in content.items():
        if isinstance(value, dict):
            words += _flat(value, f"{above}{key}.")
        else:
            words.append(f"{above}{key}={_plain(value)}")
    return words


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "").replace(" ", "")
