"""What a run's numbers follow from, part by part: a run is resumed under the same parts alone, and a refusal says which
one differs. Kept in each checkpoint's `state.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Identity = Mapping[str, Any]
"""By part, plain JSON values: `stage`, `recipe` (its keys), `global_batch`, `start`, `samples`, `features`."""

_DIFFERS = {
    "stage": "a run of {was}, not of {now}",
    "global_batch": "a run with global batches of {was} samples, and this launch makes {now}: choose train.batch_size "
    "and train.accumulation so that, times the processes, they make {was}",
    "start": "a run that started from other weights than lie there now",
    "samples": "a run on other samples: what its dataset files say has changed",
    "features": "a run on other features: the store was filled anew by other teachers",
}
_NAMED = 3  # keys of another recipe that a refusal names


def difference(was: Identity, now: Identity) -> str | None:
    """What of `now` a run was not run under, to follow "holds"; None if there is nothing.

    Parts that `now` leaves out are not compared.
    """
    now = json.loads(json.dumps(now))
    for part, value in now.items():
        there = was.get(part)
        if there == value:
            continue
        if part == "recipe":
            return f"a run of another recipe ({_other_keys(_flat(there or {}), _flat(value))})"
        return _DIFFERS[part].format(was=there, now=value)
    return None


def start_digest(path: str | None) -> str:
    """Names the weights that a run starts from, by the ends of their files: no resume on top of other ones."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")) if path else ():
        with file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            for offset in (0, max(0, size - 2**20)):
                f.seek(offset)
                digest.update(f.read(2**20))
            digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:16]


def features_digest(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Names the features that a run distils or is fed, by the fingerprints of their teachers."""
    found = {name: card["fingerprint"] for name, card in cards.items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`."""
    flat = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _other_keys(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    named = [f"{key} was {was.get(key)}, here {now.get(key)}" for key in keys[:_NAMED]]
    return "; ".join([*named, *([f"and {len(keys) - _NAMED} more"] if len(keys) > _NAMED else [])])
