"""How large a run is. Which form it was is kept beside what it made: figures of two forms are of two experiments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .arms import ARMS, DISTILLED, SINGLE
from .plan import BLOCK

TEACHERS = ("depth", "seg", "gen")
PROBES, ANSWERS = "probes", "answers"


@dataclass(frozen=True)
class Form:
    """Everything that sizes follow from."""

    name: str
    scenes: int
    """Pictures to train on."""
    held_out: int
    """Pictures that are asked about, and probed on."""
    models: str
    """`--size` of the small models."""
    tasks: tuple[str, ...]
    """Teachers that are extracted, and distilled or fed."""
    seeds: int
    arms: tuple[str, ...]
    """Those run unless others are named."""
    pt_epochs: float
    ift_epochs: float
    probe_epochs: float
    probe_tasks: tuple[str, ...]
    probe_batch: int
    probe_lr: float
    measured: tuple[str, ...] = (PROBES, ANSWERS)
    """Of trained models: probes of the two arms of figure 3, answers to the held-out questions of all."""
    llm: str = ""
    """A language model in place of the world's own: a hub id, or a folder by its full path."""
    blocks: int = 6
    """Of the language model."""

    def settings(self) -> dict[str, Any]:
        """What two runs in one folder must have in common; seeds, arms and what is measured may be added to."""
        added = ("seeds", "arms", "measured") if self.llm else ("seeds", "arms", "measured", "llm", "blocks")
        return {name: value for name, value in asdict(self).items() if name not in added}


FORMS = {
    form.name: form
    for form in (
        Form(
            name="quick",
            scenes=75 * BLOCK,
            held_out=10 * BLOCK,
            models="standard",
            tasks=("depth",),
            seeds=3,
            arms=(SINGLE, DISTILLED),
            pt_epochs=2.25,
            ift_epochs=0.75,
            probe_epochs=1.5,
            probe_tasks=("depth",),
            probe_batch=8,
            probe_lr=8e-3,
            measured=(PROBES,),
        ),
        Form(
            name="full",
            scenes=300 * BLOCK,
            held_out=20 * BLOCK,
            models="standard",
            tasks=TEACHERS,
            seeds=5,
            arms=tuple(ARMS),
            pt_epochs=0.7,
            ift_epochs=2.0,
            probe_epochs=4.0,
            probe_tasks=("depth", "seg", "gen"),
            probe_batch=16,
            probe_lr=8e-3,
        ),
        Form(
            name="toy",
            scenes=BLOCK,
            held_out=BLOCK,
            models="toy",
            tasks=TEACHERS,
            seeds=2,
            arms=(SINGLE, DISTILLED),
            pt_epochs=0.5,
            ift_epochs=0.5,
            probe_epochs=0.5,
            probe_tasks=("depth",),
            probe_batch=32,
            probe_lr=8e-3,
        ),
    )
}  # fmt: skip
"""quick: figure 3 of depth on two cores in less than 25 minutes. full: all tables, some twelve hours of two cores.
toy: that it runs; says nothing."""
