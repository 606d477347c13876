"""The cache stands alone: nothing of ours beside it, and nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parents[2] / "cache"


def test_no_file_of_the_cache_names_another_folder_of_ours():
    files = sorted(CACHE.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name} imports from above the cache"
                names = [node.module or ""] if node.level == 0 else []
            for name in names:
                assert name.split(".")[0] != "olavlm" or name.startswith("olavlm.cache"), f"{file.name} imports {name}"


def test_opening_a_store_loads_no_deep_learning_library(small):
    """Loader processes and command lines start as fast as zarr and Arrow do."""
    store = small().fill()
    program = (
        "import sys; from olavlm.cache import FeatureStore, ImageRoots, Dataset\n"
        f"FeatureStore({str(store.path)!r})['depth'][3]\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'transformers', 'matplotlib'}),"
        "[m for m in sys.modules if m.startswith('olavlm.') and not m.startswith('olavlm.cache')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
