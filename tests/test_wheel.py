"""A built wheel holds every module and every data file, and they work from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("teachers", "cache", "student", "pipelines")

IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
count = 0
for file in sorted((root / "olavlm").rglob("*.py")):
    name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(root), (name, module.__file__)
    count += 1
from olavlm.student.recipes import load_recipe, shipped_recipes
assert all(path.is_relative_to(root) for path in shipped_recipes().values()), shipped_recipes()
assert load_recipe("phi3-mini-clip-l", [], "pt").model.template == "phi_3"
print(count)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:  # a copy, so that building leaves nothing behind in the working tree
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
               str(folder), str(source)]  # fmt: skip
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_holds_the_files_of_the_four_folders_and_nothing_else(unpacked):
    expected = {
        f"olavlm/{f.relative_to(ROOT)}"
        for name in FOLDERS
        for f in (ROOT / name).rglob("*")
        if f.is_file() and "__pycache__" not in f.parts
    }
    found = {str(f.relative_to(unpacked)) for f in unpacked.rglob("*") if f.is_file()}
    assert {f for f in found if not f.split("/")[0].endswith(".dist-info")} == expected


@pytest.mark.parametrize(
    "entry",
    [
        "[olavlm.teachers]\nbase = olavlm.pipelines.base_entry:ENTRY",
        "[lmms_eval.models]\nolavlm = olavlm.pipelines.evaluation.lmms_plugin:manifests",
    ],
)
def test_others_find_what_they_look_for_by_entry_points(unpacked, entry):
    (names,) = unpacked.glob("olavlm-*.dist-info/entry_points.txt")
    assert entry in names.read_text()


def test_every_module_imports_from_it(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(unpacked)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list((unpacked / "olavlm").rglob("*.py")))
