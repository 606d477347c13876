"""The registry of benchmarks, and what holds for each."""

import subprocess
import sys

import pytest

from olavlm.pipelines.cli import UsageError
from olavlm.pipelines.evaluation.tasks import TASKS, task_named


def test_names():
    assert list(TASKS) == ["cv_bench", "mmstar", "realworldqa", "ok_vqa"]
    assert all(task.name == name for name, task in TASKS.items())
    assert task_named("ok_vqa_val2014") is TASKS["ok_vqa"]
    with pytest.raises(UsageError, match="no task 'cvbench'; the tasks are cv_bench, mmstar, realworldqa, ok_vqa"):
        task_named("cvbench")


def test_importing_them_is_cheap():
    code = (
        "import sys; import olavlm.pipelines.evaluation.tasks, olavlm.pipelines.evaluation.table;"
        "print({'torch', 'lmms_eval', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
