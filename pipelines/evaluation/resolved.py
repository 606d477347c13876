"""eval.json: what an evaluation was run with, in full, and whether another run may go on with its predictions.

Predictions of two models, or of two versions of a dataset, in one folder would make a score of neither. How fast and
how far a run goes (`--batch-size`, `--device`, `--limit`, the number of processes) may change.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from olavlm.pipelines.cli import JobFailed, versions

from .backends import TEACHER, Backend, is_secret
from .datasets import BenchmarkRows

FILE = "eval.json"
MODEL, TASKS = "model", "tasks"
"""The two parts that predictions depend on."""

PACE = ("batch_size", "device", "device_map", "num_concurrent", "max_retries", "retry_backoff_s", "timeout")
"""Arguments of models that change no answer; nor does the place of a teacher, whose features must be the same."""


def resolve(backend: Backend, rows: Mapping[str, BenchmarkRows], seed: int, **others: Any) -> dict[str, Any]:
    """The content of eval.json; `others` are options that predictions do not depend on."""
    own = {k: v for k, v in backend.own.items() if not is_secret(k)}
    return {
        MODEL: {
            "checkpoint": backend.checkpoint,
            "identity": identity(backend.checkpoint) if "base_url" not in own else None,
            "backend": backend.name,
            "dtype": backend.options.get("dtype", "auto"),
            "arguments": {k: v for k, v in own.items() if not _is_pace(k)},
            "seed": seed,
        },
        TASKS: {
            name: {
                "repository": of.task.published.repository,
                "split": of.task.published.split,
                "max_new_tokens": of.task.max_new_tokens,
                **of.fingerprint(),
            }
            for name, of in rows.items()
        },
        "device": backend.device,
        "batch_size": backend.options.get("batch_size"),
        "pace": {k: v for k, v in own.items() if _is_pace(k)},
        **others,
        "versions": all_versions(),
    }


def identity(checkpoint: str) -> str | None:
    """What tells a checkpoint from others of its name: SHA-256 of a folder's weights, commit of a hub id."""
    folder = Path(checkpoint)
    if folder.is_dir():
        from olavlm.teachers.checkpoint import weights_digest

        weights = tuple(sorted(folder.glob("*.safetensors")))
        return f"sha256 {weights_digest(weights)}" if weights else None
    from transformers import AutoConfig

    try:
        commit = AutoConfig.from_pretrained(checkpoint)._commit_hash
    except (OSError, ValueError):  # another library's checkpoint, of a --backend that knows it
        return None
    return f"commit {commit}" if commit else None


def read(folder: Path) -> dict[str, Any] | None:
    """What an evaluation in a folder was run with; None if there is none. JobFailed if it is damaged."""
    file = folder / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found, MODEL: dict(found[MODEL]), TASKS: dict(found[TASKS])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise JobFailed(f"{file} is damaged ({e!r}); give another --output, or remove the folder") from None


def joined(
    before: Mapping[str, Any] | None, now: dict[str, Any], answered: Collection[str], folder: Path
) -> dict[str, Any]:
    """What is to be written: this run, and the tasks of those before.

    Args:
        before, now: contents of eval.json.
        answered: tasks of which there are predictions; without any, what stopped before its first answer binds nobody.
        folder: for the error.

    Raises:
        JobFailed: the predictions in the folder are of another model, or other rows; what differs is named. Or nobody
            knows of which model.
    """
    if not answered:
        return now
    if before is None:
        raise JobFailed(f"{folder} holds predictions, and no {FILE} that says of which model; give another --output")
    before = {**before, TASKS: {name: of for name, of in before[TASKS].items() if name in answered}}
    model = {part: dict(of[MODEL]) for part, of in (("before", before), ("now", now))}
    if model["before"].get("identity") == model["now"]["identity"] is not None:  # the same weights somewhere else
        for part in model.values():
            part.pop("checkpoint", None)
    differing = list(differences(model["before"], model["now"], MODEL))
    for name in before[TASKS].keys() & now[TASKS].keys():
        differing += differences(before[TASKS][name], now[TASKS][name], name)
    if differing:
        raise JobFailed(
            f"{folder} holds predictions of something else: {'; '.join(differing[:4])}; give another --output, or "
            "remove that folder"
        )
    return {**now, TASKS: {**before[TASKS], **now[TASKS]}}


def differences(before: Any, now: Any, name: str) -> Iterator[str]:
    """What differs between two pieces of JSON, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}")
    elif before != now:
        yield f"{name} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:24]}..."


def _is_pace(argument: str) -> bool:
    return argument in PACE or argument.startswith(TEACHER)


def all_versions() -> dict[str, str]:
    """Versions of Python, this package, the libraries that decide results, and lmms-eval if it is there."""
    return versions() | {name: found for name in ("lmms-eval",) if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
