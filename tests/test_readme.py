"""Commands of the README and of docs/training.md parse, recipes and files that they name exist, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from olavlm.pipelines import evaluate, export, extract, generate, probe, report, store, train
from olavlm.student.config import Recipe
from olavlm.student.recipes import load_chain, load_recipe
from olavlm.student.stages import TRAINED
from olavlm.teachers import miniature

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
TRAINING = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.S)
COMMANDS = [
    line.partition("  #")[0]
    for kind, block in BLOCKS + TRAINING
    if kind == "bash"
    for line in block.splitlines()
    if line
]
PARSERS = {
    "olavlm-extract": extract.arguments,
    "olavlm-cache": store.arguments,
    "olavlm-train": train.arguments,
    "olavlm-generate": generate.arguments,
    "olavlm-eval": evaluate.arguments,
    "olavlm-export": export.arguments,
    "olavlm-probe": probe.arguments,
    "olavlm-report": report.arguments,
}


def parse(line: str) -> list[Recipe]:
    """The recipes that a command trains, stage by stage."""
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        return []
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1] == "olavlm.pipelines.train"
        words = ["olavlm-train", *words[words.index("-m") + 2 :]]
    parsed, rest = PARSERS[words[0]]().parse_known_args(words[1:])
    if words[0] == "olavlm-train" and parsed.stage == "all":
        return list(load_chain(parsed.config, rest).values())
    if words[0] == "olavlm-train" and parsed.stage != "recipes":
        return [load_recipe(parsed.config, rest, parsed.stage)]
    assert rest == []
    return []


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line):
    parse(line)


def test_training_and_extraction_read_what_the_data_step_lays_out():
    tree = re.findall(r"^(\S+/) {2,}(.+)$", README, flags=re.M)
    there = {folder + name for folder, names in tree for name in names.split()} | {f[:-1] for f, _ in tree}
    trained = [recipe for line in COMMANDS for recipe in parse(line)]
    assert len(trained) > 5
    assert {Path(file) for recipe in trained for file in recipe.files} <= set(map(Path, there))
    assert {root for recipe in trained for root in recipe.image_roots} <= there
    extracted = [line.split() for line in COMMANDS if "olavlm-extract" in line and "--store features" in line]
    assert extracted
    for words in extracted:
        assert {words[words.index("--data") + 1], words[words.index("--images") + 1]} <= there


def test_stages_are_those_that_there_are():
    table = re.findall(r"^\| `(\w+)`, .*?\| (.*?) \|", README, flags=re.M)
    names = {"projector": "projector", "task tokens": "task_tokens", "predictors": "predictors", "LLM": "llm"}
    shown = {stage: {names[part] for part in parts.split(", ")} for stage, parts in table}
    assert shown == {stage: set(parts) - {"logit_scales"} for stage, parts in TRAINED.items()}


def test_every_kind_of_command_is_shown():
    assert {line.split()[0] for line in COMMANDS} == {"make", "accelerate", *PARSERS}


def test_python(make_store, sample_images, tmp_path, monkeypatch):
    """Run as written, on a store as `make demo` makes it, where it would have put it."""
    models = {name: miniature.folder(name) for name in miniature.NAMES}
    folder = make_store("float16", data=sample_images.parent / "pt.json", teachers=miniature.NAMES, models=models)
    (tmp_path / "demo_run").mkdir()
    (tmp_path / "demo_run" / "features").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
    features = names["depth"]["cat.jpg"]
    assert (features.shape, features.dtype) == ((64, 64), "float32")
    assert f'depth["cat.jpg"].shape  # {features.shape}: tokens, dim; {features.dtype}\n' in README
    assert names["values"].shape == (3, *features.shape)
    assert names["valid"].all()
    assert names["teacher"].card.fingerprint() == names["depth"].fingerprint


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)h][^)]*)\)|`((?:\w+/)+[\w.]+\.(?:md|py|cff))`", README))
def test_files_named_exist(target):
    assert (ROOT / next(filter(None, target))).is_file()
