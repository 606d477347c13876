"""Make every fault, count what it cost, and write results.json and docs/faults.md (see `__init__.py`)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..machine import describe
from .catalogue import CATALOGUE, Control, Entry
from .damages import run_damages
from .kills import Fault
from .lab import Lab, Missed, NotPossible, disk_not_waited_for
from .outcome import Outcome
from .table import DOCUMENT, RESULTS, complaints, render

MISSES = 50  # draws that miss, for one that strikes
UNTIL_A_LOSS = 100  # trials after which a control arm that has lost nothing gives up


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description="Prove the commit protocol by faults: make each many times, and count what it cost.",
        epilog="example: python -m benchmarks.faults --seed 1 --times 40 --damages 2000",
    )
    p.add_argument("--seed", type=int, default=1, help="all that is drawn is drawn from it (default: 1)")
    p.add_argument("--times", type=int, default=40, help="trials a fault (default: 40); a quarter of it a control arm")
    p.add_argument("--damages", type=int, default=2000, help="random damages to finished stores (default: 2000)")
    p.add_argument("--quick", action="store_true", help="3 trials a fault and 60 damages, under a minute")
    p.add_argument("--only", metavar="WORDS", help="only the faults whose names hold these words")
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results go (default, of a whole run: results.json)"
    )
    p.add_argument("--scratch", type=Path, help="where the small stores are made (default: /dev/shm, or else /tmp)")
    return p


def main() -> None:
    options = arguments().parse_args()
    if options.quick:
        options.times, options.damages = 3, 60
    pa.set_cpu_count(1)  # tables this small only wait for threads
    began = time.perf_counter()
    scratch = options.scratch or (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="olavlm-faults-", dir=scratch) as folder:
        entries = [e for e in CATALOGUE if not options.only or options.only in e.name]
        lab = Lab(Path(folder), options.seed, scenes=1 if options.quick else 2)
        with disk_not_waited_for():
            lab.prepare()
        faults = [_row(lab, entry, options.times) for entry in entries]
        damages = None
        if not options.only:
            with disk_not_waited_for():
                damages = run_damages(lab.folder, options.seed, options.damages, _say)
    results = {
        "command": " ".join(["python -m benchmarks.faults", *sys.argv[1:]]),
        "seconds": round(time.perf_counter() - began),
        "seed": options.seed,
        "machine": describe(scratch, ("numpy", "pyarrow", "zarr")),
        "faults": faults,
        "damages": damages,
    }
    file = options.json or (None if options.quick or options.only else RESULTS)
    if file:
        file.write_text(json.dumps(results, indent=1) + "\n")
    if file == RESULTS:
        DOCUMENT.write_text(render(results))
    wrong = complaints(results)
    print("\n".join(wrong) or "nothing was lost; every control arm lost something")
    sys.exit(bool(wrong))


def _row(lab: Lab, entry: Entry, times: int) -> dict:
    with contextlib.nullcontext() if entry.real_fsync else disk_not_waited_for():
        lab.begin_row()
        protected = _tried(lab, entry.name, entry.fault, times * entry.weight)
        points = len(lab.points)
        lab.begin_row()
        control = _control(lab, entry.name, entry.control, max(2, times // 4))
    _say(f"{entry.name}: {_short(protected)}; without {control['without']}: {_short(control)}")
    about = {"name": entry.name, "how": entry.how, "undone_allowed": entry.undone_allowed, "seed": lab.seed}
    return {**about, "points": points, **protected, "control": control}


def _control(lab: Lab, name: str, control: Control, times: int) -> dict:
    what = (control.without.__doc__ or "").strip()
    with control.without():
        found = _tried(lab, f"{name}, control", control.fault, times, until_a_loss=True)
    return {"without": control.without.__name__, "what": what, "how": control.how, **found}


def _tried(lab: Lab, name: str, fault: Fault, times: int, until_a_loss: bool = False) -> dict:
    """Sums over `times` trials that struck, or over more until one has lost something."""
    total, losing, tried, missed, examples = Counter(), 0, 0, 0, []
    for draw in range((MISSES + 1) * max(times, UNTIL_A_LOSS)):
        if tried >= times and (losing or not until_a_loss or tried >= UNTIL_A_LOSS):
            break
        try:
            outcome = fault(lab, np.random.default_rng([lab.seed, *name.encode(), draw]))
        except Missed:
            missed += 1
            continue
        except NotPossible as e:
            return {"times": 0, "skipped": str(e)}
        tried += 1
        losing += outcome.lost
        total.update({key: getattr(outcome, key) for key in Outcome.counts()})
        if outcome.lost and len(examples) < 3:
            examples.append({"draw": draw, "note": outcome.note})
    counts = {key: int(total[key]) for key in Outcome.counts()}
    return {"times": tried, "drawn": tried + missed, "losing_times": losing, **counts, "examples": examples}


def _short(found: dict) -> str:
    if "skipped" in found:
        return f"skipped ({found['skipped']})"
    return f"{found['losing_times']} of {found['times']} times something was lost"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
