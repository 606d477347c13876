"""Where the images of a store were when it was filled, and where they can be reached now.

Extractions leave their arguments in STORE/runs; what they were started with, such as a relative path, is read from
there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import files
from .errors import DatasetError
from .images import ImageRoots, split_root

if TYPE_CHECKING:
    from .store import FeatureStore


@dataclass(frozen=True)
class RecordedRoot:
    """An image root `[PREFIX=]LOCATION` of an extraction into a store."""

    spec: str
    """As it is on record."""
    here: str | None
    """As it can be reached now; None if it is gone."""


def recorded_roots(store: FeatureStore) -> list[RecordedRoot]:
    """The image roots of all extractions into `store`, those of the newest first, each once; [] if none is known.

    A data set that grew may have its images in several. Relative ones are looked for here, and where that extraction
    was started.
    """
    found: dict[str, RecordedRoot] = {}
    folder = store.path / "runs"
    for name in reversed(files.names(folder)):
        if not name.endswith(".json"):
            continue
        try:
            arguments = json.loads(files.read(folder / name))["arguments"]
            specs, recorded = list(map(str, arguments["images"])), str(arguments.get("store", ""))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        base = started_in(store.path, recorded) if isinstance(store.path, Path) else None  # a URL is nobody's folder
        for spec in specs:
            root = RecordedRoot(spec, reachable_root(spec, base))
            found.setdefault(root.here or root.spec, root)
    return list(found.values())


def extracted_from(store: FeatureStore) -> list[str]:
    """Those of `recorded_roots` that still exist."""
    return [root.here for root in recorded_roots(store) if root.here is not None]


def started_in(folder: Path, recorded: str) -> Path | None:
    """The working directory from which `recorded`, a relative path, led to `folder`; None if it cannot be told."""
    parts, whole = Path(recorded).parts, folder.absolute().parts
    if not parts or Path(recorded).is_absolute() or ".." in parts or whole[-len(parts) :] != parts:
        return None
    return Path(*whole[: -len(parts)])


def reachable_root(spec: str, base: Path | None) -> str | None:
    """A recorded image root `[PREFIX=]LOCATION` as it can be reached, from `base` or else from here, where a folder of
    the same name may hold other images; None if it is gone."""
    prefix, location = split_root(spec)
    candidates = [location] if base is None else [str(base / location), location]
    for candidate in candidates:
        try:
            ImageRoots([candidate])
        except (DatasetError, OSError, ImportError, ValueError):
            continue
        return f"{prefix}={candidate}" if prefix else candidate
    return None
