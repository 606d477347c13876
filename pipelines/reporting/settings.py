"""What the command line says beside the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """For all runs alike."""

    store: str | None = None
    """instead of the recipe's"""
    images: list[str] | None = None
    """instead of the recipe's"""
    samples: int = 4
    """photographs with targets and predictions, of each run"""
    decode: Sequence[tuple[str, str | None]] = ()
    """names of decoders, each with a model or None"""
