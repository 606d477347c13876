"""Numbers and foreign text as messages show them."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, safe on a terminal: what is no visible character (escapes, bidi marks) as `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def storage(count: float) -> str:
    """Bytes on a disk, in decimal units: `1.65 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
