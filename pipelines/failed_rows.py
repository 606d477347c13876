"""Quarantined rows, as the commands name them."""

from __future__ import annotations

from collections.abc import Sequence

from olavlm.cache import TeacherFeatures
from olavlm.cache.wording import printable

SHOWN = 20  # findings and failures printed a teacher; --json has them all


def failed_rows(group: TeacherFeatures) -> dict[int, dict]:
    """By row: row, image, reason and detail."""
    return {row: {"row": row, "image": e.image, "reason": e.reason, "detail": e.detail} for row, e in group.failures()}


def named(key: str, rows: Sequence[dict]) -> list[str]:
    """The first ones, a line each."""
    rest = [f"  ... and {len(rows) - SHOWN} more; --json lists them all"] if len(rows) > SHOWN else []
    return [f"  {key} row {r['row']} {printable(r['image'])}: {r['reason']}" for r in rows[:SHOWN]] + rest
