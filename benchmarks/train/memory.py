"""The most memory that a step of each arm takes, in processes of their own; and what the losses add to it."""

from __future__ import annotations

from ..cache import fresh
from ..figures import Measurement
from .scene import Scene

MOST = 1.5
"""Bytes that the losses add over those of predictions and targets."""
ADDED, BOTH = "added MB", "predictions and targets MB"
TASKS = f"{__package__}.tasks"


def measure(scene: Scene, device: str) -> list[Measurement]:
    figures = []
    for checkpointing in scene.size.checkpointing:
        figures += _measured(scene, device, checkpointing)
    return figures


def _measured(scene: Scene, device: str, checkpointing: bool) -> list[Measurement]:
    how = f"{'with' if checkpointing else 'without'} gradient checkpointing"
    values, losses, notes = {}, {}, []
    for arm in scene.size.memory_arms:
        options = {"size": scene.size_name, "arm": arm, "device": device, "checkpointing": checkpointing}
        found = fresh.run("memory", TASKS, folder=str(scene.folder), **options)
        if "out_of_memory" in found:
            notes.append(f"*{arm}* did not fit: {found['out_of_memory']}")
            continue
        columns = {column: [value] for column, value in found["step"].items()}
        values[arm] = columns
        if "losses" in found:
            losses[arm] = {column: [value] for column, value in found["losses"].items()}
    title = f"{scene.size.llm.title}, {scene.size.batch} images a step, {how}"
    figures = [Measurement(title, values, notes=notes)]
    if losses:
        limits = {"added over them": MOST}
        figures.append(Measurement(f"what the losses add to a whole step, {how}", losses, limits=limits))
    return figures
