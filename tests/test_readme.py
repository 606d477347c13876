"""The README's commands parse, its recipes and files exist, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from olavlm.pipelines import evaluate, export, extract, generate, probe, report, store, train
from olavlm.student.recipes import load_chain, load_recipe
from olavlm.teachers import miniature

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [line.partition("  #")[0] for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line]
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


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line):
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        return
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1] == "olavlm.pipelines.train"
        words = ["olavlm-train", *words[words.index("-m") + 2 :]]
    parsed, rest = PARSERS[words[0]]().parse_known_args(words[1:])
    if words[0] == "olavlm-train" and parsed.stage == "all":
        load_chain(parsed.config, rest)
    elif words[0] == "olavlm-train" and parsed.stage != "recipes":
        load_recipe(parsed.config, rest, parsed.stage)
    else:
        assert rest == []


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
