"""The experiments as a list of commands of the product, each with what must be there first and how it is known to be
done: by what the command itself leaves last, so that a run that was killed goes on where it stopped.

Paths are relative to the run's folder, in which the commands are run:

    world/  models/  features/                          pictures and questions, checkpoints, the teachers' features
    runs/ARM/seed-S/pt  runs/ARM/seed-S/ift             run folders of olavlm-train
    runs/ARM/seed-S/STAGE/probes                        run folders of olavlm-probe, with eval/ in them
    runs/ARM/seed-S/ift/benchmarks                      what olavlm-eval leaves
    report.html                                         olavlm-report of the first seed
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .arms import ARMS, DISTILLED, SINGLE, Arm, distilled_layers, papers_rate
from .forms import ANSWERS, PROBES, TEACHERS, Form

OWN, EXTRACT, TRAIN, PROBE, EVAL, REPORT = (
    "python -m benchmarks.miniature", "olavlm-extract", "olavlm-train", "olavlm-probe", "olavlm-eval", "olavlm-report"
)  # fmt: skip
MODELS = ("llm", "seg", "depth", "encoder", "gen")
"""Those that take long first, so that workers end together."""
STAGES = ("pt", "ift")
BENCHMARK = "cv_bench"


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    """Names of the steps ahead of it."""
    done: Callable[[], bool]
    """Whether it has nothing left to do."""
    alone: bool = False
    """Whether it fills the machine by itself."""

    @property
    def line(self) -> str:
        """As a user types it in the run's folder, where Python finds this repository."""
        return f"{self.command} {shlex.join(self.words)}"

    @property
    def kind(self) -> str:
        """Its name without seed and arm: steps of one kind take equally long."""
        return self.name.rpartition("/")[2]


def run_folder(arm: str, seed: int, stage: str) -> Path:
    """Of olavlm-train, below the run's folder."""
    return Path("runs", arm, f"seed-{seed}", stage)


def plan(root: Path, form: Form, arms: Sequence[str], seeds: Sequence[int]) -> list[Step]:
    """All steps, in an order in which each comes behind what it needs: seed by seed, so that whole seeds are done."""
    steps = [*_world(root, form), *_features(root, form)]
    shown = [arm for arm in (SINGLE, DISTILLED) if arm in arms] or list(arms[:1])
    for seed in seeds:
        for arm in arms:
            steps += _trained(root, form, ARMS[arm], seed)
        if PROBES in form.measured:
            for arm in shown:
                steps += _probed(root, form, arm, seed)
    runs = [run_folder(arm, seeds[0], stage) for arm in shown for stage in STAGES]
    needs = [f"seed {seeds[0]}/{arm}/{stage}" for arm in shown for stage in STAGES]
    if PROBES in form.measured:
        runs = [folder for run in runs for folder in (run, run / "probes")]
        needs += [f"{name} probed" for name in needs]
    words = (*map(str, runs), "--output", "report.html")
    return [*steps, Step("report", REPORT, words, tuple(needs), lambda: _shows(root / "report.html", root, runs))]


def _shows(report: Path, root: Path, runs: Sequence[Path]) -> bool:
    """Whether a report was made since all of its runs ended."""
    ends = [root / run / ("eval/scores.json" if run.name == "probes" else "stage.json") for run in runs]
    return report.is_file() and all(
        end.is_file() and end.stat().st_mtime_ns <= report.stat().st_mtime_ns for end in ends
    )


def _world(root: Path, form: Form) -> Iterator[Step]:
    sizes = ("--scenes", str(form.scenes), "--held-out", str(form.held_out))
    yield Step("world", OWN, ("world", "--dir", "world", *sizes), (), (root / "world" / "world.json").is_file, True)
    for name in MODELS if not form.llm else [name for name in MODELS if name != "llm"]:
        words = ("models", "--dir", "models", "--size", form.models, "--only", name)
        yield Step(f"model {name}", OWN, words, (), (root / "models" / name / "miniature.json").is_file)


def _features(root: Path, form: Form) -> Iterator[Step]:
    """What is distilled and probed, of all pictures at once; of depth the last layer, too, which probes predict."""
    data = ("--data", "world/pt.json", "world/held_out.json", "--images", "world/images", "--store", "features")
    rows = form.scenes + form.held_out
    teachers = [word for name in form.tasks for word in ("--teacher", f"{name}=models/{name}")]
    needs = ("world", *(f"model {name}" for name in form.tasks))
    yield Step("features", EXTRACT, (*teachers, *data), needs, lambda: covered(root, rows, form.tasks), True)
    last = ("--teacher", "depth=models/depth", "--recipe", "last", *data)
    yield Step("features to probe", EXTRACT, last, ("features",), lambda: covered(root, rows, ["depth-last"]), True)


def covered(root: Path, rows: int, keys: Sequence[str]) -> bool:
    """Whether the run's store has these features of so many pictures, all of them."""
    from olavlm.cache import CacheError, FeatureStore

    try:
        store = FeatureStore(root / "features")
        return len(store.plan) >= rows and all(store[key].coverage().missing == 0 for key in keys)
    except (CacheError, KeyError, OSError):
        return False  # not made yet


def _trained(root: Path, form: Form, arm: Arm, seed: int) -> Iterator[Step]:
    base = f"seed {seed}/{arm.name}"
    epochs = {"pt": form.pt_epochs, "ift": form.ift_epochs}
    left_out = [name for name in TEACHERS if name not in form.tasks]
    tasks = [word for name in left_out for word in (f"--tasks.{name}", "null")]
    tasks += ["--model.order", f"[{', '.join(form.tasks)}]"] if left_out else []
    for stage in STAGES:
        run = run_folder(arm.name, seed, stage)
        own = ("model llm",) if not form.llm else ()
        words = [stage, "--config", str(arm.recipe), "--train.output_dir", str(run), "--train.seed", str(seed)]
        words += ["--train.epochs", f"{epochs[stage]:g}", *tasks, *_of_llm(form, arm, stage)]
        needs = ("features", "model encoder", *own)
        if stage != "pt":
            words += ["--init.from", str(run_folder(arm.name, seed, "pt"))]
            needs = (f"{base}/pt",)
        yield Step(f"{base}/{stage}", TRAIN, tuple(words), needs, _finished(root / run))
    if ANSWERS in form.measured:
        run = run_folder(arm.name, seed, "ift")
        words = (str(run), "--tasks", BENCHMARK, "--data", f"{BENCHMARK}=world/cv_bench", "--batch-size", "64")
        yield Step(f"{base}/answers", EVAL, words, (f"{base}/ift",), (root / run / "benchmarks/scores.json").is_file)


def _of_llm(form: Form, arm: Arm, stage: str) -> Iterator[str]:
    """What another language model changes: its place, its rates, which are the paper's, and the layers to distil at."""
    if form.llm:
        yield from ("--model.llm", form.llm, "--train.lr", f"{papers_rate(stage):g}")
        for task in form.tasks if arm.name != SINGLE else ():  # which has no tasks
            yield from (f"--tasks.{task}.layers", str(distilled_layers(task, form.blocks)))


def _finished(run: Path) -> Callable[[], bool]:
    def finished() -> bool:
        file = run / "stage.json"
        return file.is_file() and bool(json.loads(file.read_text()).get("finished"))

    return finished


def _probed(root: Path, form: Form, arm: str, seed: int) -> Iterator[Step]:
    data = ("--images", "world/images", "--store", "features", "--workers", "0")
    for stage in STAGES:
        base, run = f"seed {seed}/{arm}/{stage}", run_folder(arm, seed, stage)
        probes = run / "probes"
        words = ("train", "--model", str(run), "--data", "world/pt.json", *data, "--tasks", ",".join(form.probe_tasks))
        words += ("--output", str(probes), "--seed", str(seed), "--epochs", f"{form.probe_epochs:g}")
        words += ("--batch-size", str(form.probe_batch), "--micro-batch", str(form.probe_batch))
        words += ("--lr", f"{form.probe_lr:g}", "--save-every", "100")
        needs = (base, "features to probe")
        yield Step(f"{base} probes", PROBE, words, needs, (root / probes / "probes.json").is_file)
        words = ("eval", str(probes), "--data", "world/held_out.json", *data, "--batch-size", "32")
        scores = root / probes / "eval" / "scores.json"
        yield Step(f"{base} probed", PROBE, words, (f"{base} probes",), scores.is_file)
