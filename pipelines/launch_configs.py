"""The shipped configurations of `accelerate launch`: how training is spread over processes.

accelerate launch --config_file $(olavlm-train accelerate fsdp) --num_processes 8 -m olavlm.pipelines.train ...
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from olavlm.student.errors import RecipeError


def launch_configs() -> dict[str, Path]:
    """The shipped files by name."""
    found = sorted(Path(str(files("olavlm.pipelines") / "accelerate")).glob("*.yaml"))
    return {file.stem: file for file in found}


def config_file(name: str) -> Path:
    """Where a configuration lies; RecipeError for a name that is not shipped."""
    shipped = launch_configs()
    if name not in shipped:
        raise RecipeError(f"launch configuration {name!r} is unknown; choose one of: {', '.join(shipped)}")
    return shipped[name]


def list_configs() -> str:
    """One a line, with what it is for."""
    lines = {name: file.read_text(encoding="utf-8").partition("\n")[0] for name, file in launch_configs().items()}
    return "\n".join(f"{name:<8}{line.removeprefix('#').strip()}" for name, line in lines.items())
