"""Says when training waits for its data, and on what the loader processes spend their time."""

from __future__ import annotations

import os
from collections import deque

from olavlm.student.config import Recipe

WINDOW = 20  # steps that are looked at together
THRESHOLD = 0.10  # of their time is waited: said
GROWTH = 1.5  # times what was said last: said again

WAITED, TOOK = "data_wait_ms", "step_ms"
_LOADED = "load_{}_ms"
_PARTS = {
    "images": "images",
    "encoder_features": "features of the base encoder",
    "targets": "targets",
    "text": "text",
}


class DataWatch:
    """Watches the metrics of one process's steps.

    Args:
        recipe: says what there is to change.
        processes_here: trainers on this machine, which share its cores.
    """

    def __init__(self, recipe: Recipe, processes_here: int = 1) -> None:
        self.recipe, self.processes_here = recipe, processes_here
        self._steps: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._first = True
        self._said = 0.0

    def see(self, values: dict[str, float]) -> str | None:
        """After each step, with its metrics: a line to be shown, if training waits and it was not said yet."""
        if self._first:  # its data could not be loaded ahead
            self._first = False
            return None
        self._steps.append(values)
        if len(self._steps) < WINDOW:
            return None
        sums = {name: sum(step.get(name, 0.0) for step in self._steps) for name in values}
        share = sums[WAITED] / sums[TOOK]
        if share <= max(THRESHOLD, GROWTH * self._said):
            return None
        self._said = share
        self._steps.clear()  # what is said next is of other steps
        return f"training waits for data: {share:.0%} of the last {WINDOW} steps; {self._cause(sums)}"

    def _cause(self, sums: dict[str, float]) -> str:
        spent = {part: sums.get(_LOADED.format(part), 0.0) for part in _PARTS}
        total = sum(spent.values())
        if not total:
            return "loaders report nothing"
        part = max(spent, key=spent.__getitem__)
        who = "loaders spend" if self.recipe.data.workers else "loading, in the training process itself, spends"
        return f"{who} {spent[part] / total:.0%} on {_PARTS[part]}: {', or '.join(self._remedies(part))}"

    def _remedies(self, part: str) -> list[str]:
        data, targets = self.recipe.data, self.recipe.targets
        remedies = []
        cores = (os.cpu_count() or 1) // self.processes_here
        if data.workers < max(1, cores):
            remedies.append(f"more data.workers (now {data.workers}, {cores} cores a process)")
        if part == "images":
            remedies.append("data.encoder_features, which are read in place of images")
        if part == "targets" and targets.source == "online":
            remedies.append("targets.source cache")
        elif part in ("targets", "encoder_features"):
            store = targets.store if part == "targets" else data.encoder_features
            remote = "://" in str(store)
            if remote and targets.local_cache is None:
                remedies.append("targets.local_cache, if they are read more than once")
            remedies.append("a store nearby" if remote else "a faster disk")
            remedies.append("features in int8 (olavlm-cache convert --dtype int8)")
        return remedies or ["faster cores"]
