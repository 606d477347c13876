"""What tests of the benchmarks share: the way to them."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module():
    """module(name) -> `benchmarks.name`; benchmarks are no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))

        def load(name: str) -> ModuleType:
            return importlib.import_module(f"benchmarks.{name}")

        yield load
