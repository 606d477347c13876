"""Runs of a JSON file, one after the other, in the processes that this program was launched in.

    accelerate launch --config_file CONFIG --num_processes 2 tests/student/training/distributed_runs.py JOBS.json

A job is {"stage", "recipe"}: a resolved recipe; or {"probe"}: settings of probes. Starting processes costs seconds, so
that tests share a launch.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from olavlm.pipelines.cli import quiet_models
from olavlm.student.probing.settings import ProbeData, ProbeSettings
from olavlm.student.probing.training import train_probes
from olavlm.student.processes import Process
from olavlm.student.recipes import load_recipe
from olavlm.student.training.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_models()
    gc.freeze()  # each training ends with a collection, which is not to look through all packages
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if "probe" in job:
            train_probes(ProbeSettings(**job["probe"] | {"data": ProbeData(**job["probe"]["data"])}), {"test": "1"})
            continue
        file = Path(f"{sys.argv[1]}.{number}.{os.environ['RANK']}")  # each its own, or one reads what another truncates
        file.write_text(json.dumps(job["recipe"]))
        train(load_recipe(str(file), [], job["stage"]), job["stage"], {"test": "1"})
    Process.leave()
    gc.unfreeze()  # or libraries tell of leaks
