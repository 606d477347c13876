"""What the committed results say, as the numbers that `page.py` counts with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ..extract import facts as extraction
from ..extract.arithmetic import PEAK_FLOPS, UTILISATION
from ..figures import Measurement, Steps, from_json
from ..readme import results
from .arithmetic import TFLOP
from .sizes import CACHED, ONE, ONLINE, SIZES, TOKENS

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One committed run of `step`: device-seconds an image, in its first setting."""

    name: str
    """Of the results file."""
    hardware: str
    gpu: bool
    title: str
    """Shapes and setting."""
    seconds: dict[str, float]
    """By arm."""
    extraction: float | None
    """Once, for all teachers; None where no committed extraction ran on such a device."""
    memory: dict[str, float] = field(default_factory=dict)
    """MB of a step at its peak, by arm."""

    def added(self, arm: str) -> float:
        """What an online arm adds to the step with cached targets."""
        return self.seconds[arm] - self.seconds[CACHED]


@dataclass(frozen=True)
class Facts:
    runs: list[Run]
    tflop: dict[str, float]
    """An image at the paper's shapes with gradient checkpointing, counted: `TOKENS` and `CACHED`."""
    teachers_gflop: float
    """An image, all three."""
    prepare_seconds: float
    """Of one core, to prepare an image for the three teachers once it is decoded."""
    counted_in: str
    """Name of the results file with the FLOPs."""
    extracted_in: str
    reading: dict[str, float]
    """Bytes a second at which the measured machine's disk gave random rows: depth and gen, page cache dropped."""

    def gpu_seconds(self, gflop: float) -> float:
        """On the GPU that docs/scale.md assumes."""
        return gflop * 1e9 / (PEAK_FLOPS * UTILISATION)


def load() -> Facts:
    """Raises RuntimeError if what the page needs is not among the committed results."""
    found = results(HERE)
    extracted = extraction.load()
    counted = {name: run for name, run in found.items() if "arithmetic" in run["figures"]}
    if not counted:
        raise RuntimeError("no committed result has FLOPs: python -m benchmarks.train arithmetic --name NAME")
    name, run = next(iter(counted.items()))
    (lines,) = from_json(run["figures"]["arithmetic"])
    tflop = {arm: median(lines.values[f"{arm}, with gradient checkpointing"][TFLOP]) for arm in (TOKENS, CACHED)}
    prepared = [f"prepare for {teacher}" for teacher in ("depth", "seg", "gen")]
    return Facts(
        runs=[_run(n, r, extracted) for n, r in found.items() if "step" in r["figures"]],
        tflop=tflop,
        teachers_gflop=sum(extracted.cpu.gflop.values()),
        prepare_seconds=sum(extracted.prepare_ms[step] for step in prepared) / 1e3,
        counted_in=name,
        extracted_in=extracted.cpu.name,
        reading=_reading(),
    )


def _run(name: str, run: dict, extracted: extraction.Facts) -> Run:
    steps = next(f for f in from_json(run["figures"]["step"]) if isinstance(f, Steps))
    machine = run["machine"]
    gpu = machine.get("gpu")
    large = SIZES[run["size"]].teachers["depth"] == "depth-large"
    extraction_seconds = None
    if large and gpu:
        same = [device for device in extracted.gpus if device.hardware.startswith(gpu)]
        extraction_seconds = 1 / same[0].together if same else None
    elif large:  # one worker a core
        extraction_seconds = 1 / (extracted.cpu.together * machine["cores"])
    memory = {}
    for figure in from_json(run["figures"].get("memory", [])):
        if isinstance(figure, Measurement) and not figure.limits and not memory:
            memory = {arm: median(next(iter(columns.values()))) for arm, columns in figure.values.items()}
    return Run(
        name=name,
        hardware=gpu or f"{machine['cores']} cores of {machine['cpu']}",
        gpu=bool(gpu),
        title=steps.title,
        seconds={arm: 1 / steps.rate(arm) for arm in (TOKENS, CACHED, ONLINE, ONE)},
        extraction=extraction_seconds,
        memory=memory,
    )


def _reading() -> dict[str, float]:
    figures = [f for run in results(HERE.parent / "cache").values() for f in from_json(run["figures"].get("read", []))]
    cold = {f.title.split(", ")[1].split()[0]: f for f in figures if f.title.endswith("page cache dropped")}
    return {key: f.bytes / f.rows * f.rate("olavlm") for key, f in cold.items()}
