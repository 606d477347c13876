"""Metrics out: one JSON object a step in `metrics.jsonl`, always; TensorBoard if wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """Anything that takes a step's scalars."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`. On resume, lines of steps that will be done again are taken out first."""

    def __init__(self, file: Path, resume_step: int) -> None:
        kept = []
        if file.exists():
            for line in file.read_text().splitlines():
                try:
                    step = json.loads(line)["step"]
                except (json.JSONDecodeError, KeyError):
                    continue  # the line that a kill cut short
                if step <= resume_step:
                    kept.append(line)
        file.write_text("".join(f"{line}\n" for line in kept))
        self._file = file.open("a", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under `folder`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The steps of a `metrics.jsonl`, in order."""
    return [json.loads(line) for line in file.read_text().splitlines()]
