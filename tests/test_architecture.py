"""Imports point downwards only: pipelines -> student -> cache, pipelines -> teachers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "cache": {"cache"},
    "teachers": {"teachers"},
    "student": {"student", "cache"},
    "pipelines": {"pipelines", "student", "cache", "teachers"},
}
DOORS = (  # to teachers, imported when they are asked for
    "student/data/targets.py",  # in the loop
    "student/training/pictures.py",  # a few predictions are decoded by the teachers' own decoders
    "student/fused_teachers.py",  # a fusion baseline reads their features of any picture it is asked about
)
FORBIDDEN = {"cache": {"ray", "torch", "transformers"}, "teachers": {"ray", "zarr"}, "student": {"ray", "zarr"}}


def imports(source: str):
    """(name, whether it is imported inside a function) of every absolute import."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            names = [f"parent.{node.module}"]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def wrong(folder: str, file: str, source: str) -> list[str]:
    found = []
    for name, in_function in imports(source):
        if name.startswith("olavlm."):
            target = name.split(".")[1]
            if target in ALLOWED[folder] or (file in DOORS and target == "teachers" and in_function):
                continue
            found.append(f"{file} imports {name}")
        elif name.split(".")[0] in FORBIDDEN.get(folder, set()) | {"parent"}:
            found.append(f"{file} imports {name}")
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_downwards(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [w for f in files for w in wrong(folder, str(f.relative_to(ROOT)), f.read_text())] == []


def test_one_file_knows_of_ray():
    users = [
        str(f.relative_to(ROOT))
        for folder in ALLOWED
        for f in (ROOT / folder).rglob("*.py")
        if any(name.split(".")[0] == "ray" for name, _ in imports(f.read_text()))
    ]
    assert users == ["pipelines/extraction/cluster.py"]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("cache", "from olavlm.student import OlaVLM"),
        ("teachers", "def f():\n    import olavlm.cache"),
        ("student", "from olavlm.teachers import load_teacher"),
        ("teachers", "import zarr"),
        ("student", "from ..cache import FeatureStore"),
    ],
)
def test_the_check_finds_what_it_is_for(folder, source):
    assert wrong(folder, f"{folder}/x.py", source)
