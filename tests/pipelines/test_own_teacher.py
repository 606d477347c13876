"""docs/add-a-teacher.md, followed to the letter: the teacher is found by the command, by Ray's workers, and trains."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from olavlm.cache import FeatureStore, decode_rgb
from olavlm.student.recipes import load_recipe
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train
from olavlm.teachers import load_teacher

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-teacher.md").read_text()
CODE = {kind: block for kind, block in re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.S)}
MODULE = "clip_patches"


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The page's package as `pip install` leaves it: a module, and beside it what its pyproject.toml declares."""
    site, project = tmp_path / "site", tomllib.loads(CODE["toml"])["project"]
    about = site / f"{MODULE}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (site / f"{MODULE}.py").write_text(CODE["python"])
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (about / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield site
    sys.modules.pop(MODULE, None)


def test_it_is_under_thirty_lines():
    assert len([line for line in CODE["python"].splitlines() if line.strip()]) < 30


def test_the_page_works(installed, tiny, pt_json, sample_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny["encoder"].parent)
    Path("pt.json").symlink_to(pt_json)
    Path("images").symlink_to(sample_images)
    command, *words = shlex.split(CODE["bash"])
    assert command == "olavlm-extract"
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "olavlm.pipelines.extract", *words, "--workers", "1"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    features = FeatureStore("features")["clip-patches"]
    teacher = load_teacher("clip-patches", model="tiny/encoder", device="cpu")
    assert features.fingerprint == teacher.card.fingerprint()
    assert features.shape == (10, 16, 64)
    image = features.plan.image_of(3)
    picture = decode_rgb((sample_images / image).read_bytes(), image)
    torch.testing.assert_close(torch.from_numpy(features[image]), teacher.encode([picture])[0], atol=2e-3, rtol=2e-3)

    Path("recipe.yaml").write_text(CODE["yaml"])
    settings = {"model.llm": "tiny/llm", "model.encoder": "tiny/encoder", "data.file": "pt.json"}
    settings |= {"data.images": "images", "data.workers": 0, "targets.store": "features", "train.output_dir": "run"}
    settings |= {"train.max_steps": 1, "train.batch_size": 4}
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    run = train(load_recipe("recipe.yaml", overrides, "pt"), "pt", {})
    (step,) = read_metrics(run / "metrics.jsonl")
    assert {name for name in step if "smooth_l1" in name} == {f"loss/patches/{n}/smooth_l1" for n in (2, 4)}
