"""Runs the experiments' steps on a few workers, from wherever an earlier run stopped.

python -m benchmarks.miniature run --form quick --dir mini      figure 3 with three seeds; `mini/index.html`

DIR/form.json        sizes, which every run in the folder shares
DIR/journal.jsonl    what was done, when, where and how long it took: a line a step, and one where a run begins and ends
DIR/logs/            what each command printed
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from multiprocessing import connection
from pathlib import Path
from statistics import median
from time import perf_counter, time
from typing import Any

from olavlm.cache import files
from olavlm.pipelines.cli import JobFailed, UsageError, natural, positive
from olavlm.teachers import miniature

from ..machine import describe
from .arms import ARMS, DISTILLED, SINGLE
from .forms import ANSWERS, FORMS, PROBES, Form
from .models import NAMES, RECORD, SIZES
from .steps import Step, plan
from .workers import Worker

FOLDER = Path(__file__).parent
FORM_FILE, JOURNAL, LOGS = "form.json", "journal.jsonl", "logs"
RESULTS, PAGE = "results.json", "index.html"
READY = {name: miniature.folder(name) if name in miniature.NAMES else FOLDER / "trained" / name for name in NAMES}
"""A run's models/, kept to be lent to others: the teachers with the package."""
PACKAGES = ("torch", "transformers", "accelerate", "ray", "zarr", "lmms-eval", "pillow", "numpy")
GB_A_WORKER = 3
_TAIL = 12


class RunError(JobFailed):
    """A run that cannot begin, or go on."""


def name_of_results(text: str) -> str:
    """A file's name, as the type of an argument."""
    if not text or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"{text} is not the name of a file")
    return text


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dir", type=Path, default=Path("miniature_run"), help="folder of everything (%(default)s)")
    p.add_argument("--form", choices=list(FORMS), default="quick", help="how large (%(default)s)")
    p.add_argument("--seeds", type=positive, metavar="N", help="how many (default: the form's)")
    p.add_argument("--first-seed", type=natural, default=0, metavar="N", help="the others follow it (%(default)s)")
    p.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    p.add_argument("--llm", metavar="MODEL", help="another language model, such as HuggingFaceTB/SmolLM2-135M-Instruct")
    p.add_argument("--measure", nargs="+", choices=[PROBES, ANSWERS], help="of trained models (default: the form's)")
    p.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a core, if memory allows)")
    p.add_argument(
        "--train-models", action="store_true", help="train the small models, which come ready, in a new folder"
    )
    p.add_argument(
        "--name", type=name_of_results, help="keep the figures as results/NAME.json, beside its seeds; render README.md"
    )
    p.add_argument("--list", action="store_true", help="print the commands, done or not, and run nothing")
    p.add_argument("--page", action="store_true", help="make the page of what is done, also while a run is at work")


def chosen(args: argparse.Namespace) -> tuple[Form, list[str], list[int]]:
    """Form, arms and seeds. UsageError for arguments that cannot be, together; RunError for an `--llm` that is none."""
    form = FORMS[args.form]
    seeds = form.seeds if args.seeds is None else args.seeds
    if args.llm:
        form = replace(form, **_other_llm(args.llm))
    if args.measure:
        form = replace(form, measured=tuple(dict.fromkeys(args.measure)))
    arms = [name for name in ARMS if name in (args.arms or form.arms)]
    if unmeasured := [name for name in arms if name not in (SINGLE, DISTILLED) and form.measured == (PROBES,)]:
        raise UsageError(f"{', '.join(unmeasured)}: trained, and not probed as figure 3 is; add --measure {ANSWERS}")
    return form, arms, list(range(args.first_seed, args.first_seed + seeds))


def _other_llm(model: str) -> dict[str, str | int]:
    """Its place and its blocks. RunError for one that cannot be read."""
    from transformers import AutoConfig

    place = str(Path(model).absolute()) if Path(model).is_dir() else model
    try:
        return {"llm": place, "blocks": AutoConfig.from_pretrained(place).num_hidden_layers}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"--llm {model}: no language model can be read there: {error}") from None


def run(args: argparse.Namespace) -> None:
    """Do what is not done yet of what `args` ask for.

    Raises:
        UsageError: arguments that cannot be.
        RunError: a folder of another form or in use, a step that failed.
    """
    form, arms, seeds = chosen(args)
    root: Path = args.dir
    if args.list:
        for step in plan(root, form, arms, seeds):
            print(f"{'done' if step.done() else '    '}  {step.line}")
        return
    steps = plan(root, form, arms, seeds)
    if args.page and not any(step.done() for step in steps):
        raise RunError(f"{root}: nothing is done there yet; run it without --page")
    root.mkdir(parents=True, exist_ok=True)
    with nullcontext() if args.page else _held(root):
        check_form(root, form)
        if not args.page:
            if args.train_models:
                refuse_lent(root)
            else:
                lend_models(root, form)
            if form.llm:
                fetch_llm(form.llm)
            execute(root, steps, args.workers or default_workers())
        publish(root, form, arms, seeds, commands_of(steps, root), args.name)


def commands_of(steps: Sequence[Step], root: Path) -> list[str]:
    """What was done of the steps, as a user would type it; models that came ready were trained by such commands."""
    done = [step.line.replace(f"{FOLDER.parents[1]}/", "$REPO/") for step in steps if step.done()]
    left = f"; {len(steps) - len(done)} more are still to be run" if len(done) < len(steps) else ""
    return [f"# REPO is the repository; in {root.name}/, with PYTHONPATH=$REPO{left}", *done]


def publish(
    root: Path, form: Form, arms: Sequence[str], seeds: Sequence[int], commands: Sequence[str], name: str | None
) -> None:
    """Figures and page of what is in the folder; kept with the benchmark, too, under a name."""
    # Here, for a first step is to begin at once.
    from olavlm.pipelines.cli import quiet_models

    from ..figures import to_json
    from ..readme import rendered
    from .joining import joined
    from .page import page_of
    from .pictures import draw_pictures
    from .results import collect

    quiet_models()
    found = collect(root, form, arms, seeds)
    found["figures"] = {title: to_json(figures) for title, figures in found["figures"].items()}
    shown = draw_pictures(root, form, [arm for arm in (SINGLE, DISTILLED) if arm in arms], seeds[0])
    keep(root / RESULTS, found)
    (root / PAGE).write_text(page_of(found, shown, commands), encoding="utf-8")
    print(f"{root / RESULTS}, {root / PAGE}")
    if name:
        kept = FOLDER / "results" / f"{name}.json"
        if kept.is_file():
            found = joined(json.loads(kept.read_text()), found)
        keep(kept, found)
        kept.with_suffix(".html").write_text(page_of(found, shown, commands), encoding="utf-8")
        (FOLDER / "README.md").write_text(rendered(FOLDER))


def keep(file: Path, content: Any) -> None:
    """As JSON, the whole file or, to a kill, none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.replace(file, (json.dumps(content, indent=1) + "\n").encode())


def check_form(root: Path, form: Form) -> None:
    """RunError if the folder is of another form."""
    file, now = root / FORM_FILE, json.loads(json.dumps(form.settings()))
    if not file.is_file():
        keep(file, now)
    elif (there := json.loads(file.read_text())) != now:
        keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        changed = ", ".join(f"{key} {there.get(key)}, not {now.get(key)}" for key in keys)
        raise RunError(f"{root} holds a run with {changed}; name another folder with --dir")


def lend_models(root: Path, form: Form, ready: Mapping[str, Path] = READY) -> list[str]:
    """Copy those of the small models that come ready, by the very efforts that would train them; their names."""
    lent = []
    for name in NAMES:
        record, folder = ready[name] / RECORD, root / "models" / name
        asked = {"size": form.models, "seed": 0, **asdict(SIZES[form.models].efforts[name])}
        if record.is_file() and json.loads(record.read_text())["trained"] == asked and not folder.exists():
            part = folder.with_name(f".{name}")  # a folder with a record is taken for whole, so it appears as one
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(ready[name], part)
            part.rename(folder)
            lent.append(name)
    if lent:
        print(
            f"{', '.join(lent)}: trained before, and kept here; --train-models trains them in a new folder", flush=True
        )
    return lent


def refuse_lent(root: Path, ready: Mapping[str, Path] = READY) -> None:
    """RunError if the folder has models that `lend_models` put there: they would not be trained anew."""
    for name in NAMES:
        here, kept = root / "models" / name / RECORD, ready[name] / RECORD
        if here.is_file() and kept.is_file() and here.read_bytes() == kept.read_bytes():
            raise RunError(f"--train-models: {here.parent} came ready; name a new folder with --dir")


def fetch_llm(model: str) -> None:
    """Put a model of the hub where workers, which are offline, find it. RunError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if Path(model).is_dir():
        return
    try:
        snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RunError(f"--llm {model}: it cannot be fetched: {error}") from None


def default_workers() -> int:
    """One a core, where each can have `GB_A_WORKER` of memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return max(1, min(len(os.sched_getaffinity(0)), int(memory // GB_A_WORKER)))


def execute(root: Path, steps: Sequence[Step], count: int) -> None:
    """The steps that are not done, each behind what it needs, on so many workers."""
    (root / LOGS).mkdir(exist_ok=True)
    done = {step.name for step in steps if step.done()}
    print(f"{len(steps)} steps, {len(done)} of them done; {count} workers; commands are run in {root}", flush=True)
    journal, began = Journal(root), time()
    journal.add({"began": {"began": began, "workers": count, "machine": describe(root, PACKAGES)}})
    workers: list[Worker] = []
    try:
        with _stopped_as_by_ctrl_c():
            if len(done) < len(steps):
                _Schedule(root, steps, done, journal, workers, count).run()
    finally:
        for worker in workers:
            worker.stop()
        journal.add({"run": {"began": began, "seconds": time() - began}})


class Journal:
    """What was done, and how long it took."""

    def __init__(self, root: Path) -> None:
        self.file = root / JOURNAL

    def add(self, line: dict) -> None:
        with self.file.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill tore the last line, which must not take this one with it
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")

    def lines(self) -> list[dict]:
        """All, each under its kind; a line that a kill tore is left out."""
        found = []
        for text in self.file.read_text().splitlines() if self.file.is_file() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def steps(self) -> list[dict]:
        return [line["step"] for line in self.lines() if "step" in line]

    def runs(self) -> list[dict]:
        """When each began, with how many workers, on which machine, how many steps it did and how long it was at work:
        one that was killed until its last step."""
        runs: list[dict] = []
        for line in self.lines():
            if "began" in line:
                runs.append({**line["began"], "steps": 0, "seconds": 0.0})
            elif "step" in line and runs:
                runs[-1]["steps"] += 1
                runs[-1]["seconds"] = line["step"]["ended"] - runs[-1]["began"]
            elif "run" in line and runs:
                runs[-1]["seconds"] = line["run"]["seconds"]
        return runs


class _Schedule:
    """Hands steps to workers, in order, as soon as what they need is done."""

    def __init__(
        self, root: Path, steps: Sequence[Step], done: set[str], journal: Journal, workers: list[Worker], count: int
    ) -> None:
        self.root, self.done, self.journal, self.workers, self.count = root, done, journal, workers, count
        self.total, self.todo = len(steps), [step for step in steps if step.name not in done]
        self.busy: dict[Worker, tuple[Step, float]] = {}

    def run(self) -> None:
        while self.todo or self.busy:
            while (step := self._next()) is not None:
                self._begin(step)
            if not self.busy:
                raise RunError(f"{self.todo[0].name} needs {', '.join(self.todo[0].needs)}, which nothing does")
            for ready in connection.wait([worker.connection for worker in self.busy]):
                self._end(next(worker for worker in self.busy if worker.connection is ready))

    def _next(self) -> Step | None:
        running = [step for step, _ in self.busy.values()]
        if len(running) == self.count or any(step.alone for step in running):
            return None
        ready = next((step for step in self.todo if self.done.issuperset(step.needs)), None)
        return None if ready is None or (ready.alone and running) else ready

    def _begin(self, step: Step) -> None:
        idle = next((worker for worker in self.workers if worker not in self.busy), None)
        if idle is None:
            idle = Worker(self.root)
            self.workers.append(idle)
        self.todo.remove(step)
        self.busy[idle] = step, perf_counter()
        print(f"$ {step.line}", flush=True)
        idle.run(step.command, step.words, self._log(step))

    def _end(self, worker: Worker) -> None:
        status, (step, began) = worker.status(), self.busy.pop(worker)
        if status != 0 or not step.done():
            how = "died" if status is None else f"ended with status {status}"
            how = "left something undone" if status == 0 else how
            tail = "\n".join(self._log(step).read_text(errors="replace").splitlines()[-_TAIL:])
            print(f"{self._log(step)} ends:\n{tail}\n", file=sys.stderr)
            raise RunError(f"{step.name} {how}; its command: {step.line}")
        self.done.add(step.name)
        seconds = perf_counter() - began
        done = {"name": step.name, "kind": step.kind, "seconds": round(seconds, 2), "ended": time()}
        self.journal.add({"step": done})
        print(f"  {step.name}: {seconds:.0f} s; {len(self.done)} of {self.total}{self._left()}", flush=True)

    def _left(self) -> str:
        """When steps of all kinds that are to come have been timed, the time that they will take."""
        known: dict[str, list[float]] = {}
        for line in self.journal.steps():
            known.setdefault(line["kind"], []).append(line["seconds"])
        left = [*self.todo, *(step for step, _ in self.busy.values())]
        if not left or any(step.kind not in known for step in left):
            return ""
        seconds = sum(median(known[step.kind]) for step in left) / self.count
        return f", about {seconds / 60:.0f} min left"

    def _log(self, step: Step) -> Path:
        return (self.root / LOGS / f"{step.name.replace('/', '.').replace(' ', '-')}.log").absolute()


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """RunError while another run is at work in the folder."""
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another run is at work in {root}; wait for it, or name another folder") from None
        yield


@contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt, too, so that workers are stopped."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as e:
        raise RunError(f"stopped by {e or 'SIGINT'}; the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
