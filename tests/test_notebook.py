"""The notebook runs from top to bottom, and shows what its text says.

Renew the outputs it is kept with (needs the extra `notebook`):

    .venv/bin/python tests/test_notebook.py
"""

import base64
import copy
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from olavlm.cache.preview import SIDE

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "inspect_cache.ipynb"
MOST_BYTES = 500_000  # forges do not render large ones


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell in a kernel of this interpreter; an error in a cell is raised. Nothing is written at home."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    surroundings = {
        "JUPYTER_PATH": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "HF_HUB_OFFLINE": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        client = NotebookClient(notebook, timeout=240, kernel_name="python3", record_timing=False)
        client.execute(cwd=str(folder))


def shown(cell: nbformat.NotebookNode) -> dict[str, str]:
    """What a code cell shows by MIME type: its result, or what it printed."""
    for output in cell.outputs:
        if output.output_type == "execute_result":
            return {kind: "".join(data) for kind, data in output.data.items()}
    return {"text/plain": "".join(output.text for output in cell.outputs)}


def code_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def fresh(kept, tmp_path_factory) -> dict[str, dict[str, str]]:
    """What every code cell shows when it is run now, by the cell's id."""
    notebook = copy.deepcopy(kept)
    for cell in code_cells(notebook).values():
        cell.outputs, cell.execution_count = [], None
    execute(notebook, tmp_path_factory.mktemp("notebook"))
    return {name: shown(cell) for name, cell in code_cells(notebook).items()}


def text(outputs: dict[str, dict[str, str]], name: str) -> str:
    return outputs[name]["text/plain"].strip()


def test_the_extraction_names_the_bad_images(fresh):
    said = text(fresh, "extract")
    for key in ("depth", "seg", "gen"):
        assert f"{key}: 23 of 23 images: 21 valid, 2 quarantined (1 missing, 1 truncated)" in said
    assert "row 12: kinderdijk.jpg: truncated" in said
    assert "attempt" not in said  # nothing had to be done again


def test_the_store_and_a_teacher_show_themselves(fresh):
    for name, words in (
        ("store", ("FeatureStore", "23 images", "depth", "gen", "seg", "576 \N{MULTIPLICATION SIGN} 32", "float16")),
        ("teacher", ("TeacherFeatures", "576 tokens \N{MULTIPLICATION SIGN} 32", "fingerprint", "8 rows a shard")),
    ):
        html = fresh[name]["text/html"]
        assert [w for w in (*words, "21 valid, 2 quarantined") if w not in html] == []


def test_tables_name_what_is_missing(fresh):
    lines = [line.split() for line in text(fresh, "plan").splitlines()]
    assert lines[0] == ["row", "image", "depth", "gen", "seg"]
    assert lines[3] == ["12", "12", "kinderdijk.jpg", *["truncated"] * 3]
    counts = dict(line.rsplit(maxsplit=1) for line in text(fresh, "counts").splitlines()[1:-1])
    assert counts == {"valid": "21", "missing image": "1", "truncated": "1", "missing": "0"}
    failures = fresh["failures"]["text/html"]
    assert failures.index("kinderdijk.jpg") < failures.index("truncated") < failures.index("spoons.jpg")


def test_pictures_are_of_the_photograph_and_of_every_teacher(fresh):
    sheet = Image.open(io.BytesIO(base64.b64decode(fresh["preview"]["image/png"])))
    step = SIDE + 16
    assert sheet.size == (4 * step + 16, SIDE + 78)
    photograph, depth, gen, seg = (
        len(sheet.crop((16 + i * step, 16, 16 + i * step + SIDE, 16 + SIDE)).getcolors(SIDE * SIDE)) for i in range(4)
    )
    assert photograph > 5000
    assert 300 < depth <= 576
    assert 300 < seg <= 576
    assert 3 <= gen < 10
    html = fresh["compare"]["text/html"]
    assert html.count("data:image/jpeg;base64") == 2
    assert [
        name for key in ("depth", "gen", "seg") for name in ("A", "B") if f'alt="{key} of {name}"' not in html
    ] == []


def test_two_rows_are_compared_in_numbers(fresh):
    said = text(fresh, "numbers")
    good, bad = said.split("Comparison of A, ")[1:]
    assert good.startswith("row 22 (windmills.png), with B, row 20 (rocket.jpg)")
    cosines = [float(x) for x in re.findall(r": cosine (-?[01]\.\d{4}),", good)]
    assert len(cosines) == 3
    assert all(-1 < x < 1 for x in cosines)
    assert bad.count("B quarantined: truncated") == 3


def test_rows_and_batches_are_read(fresh):
    assert text(fresh, "row") == "((576, 32), dtype('float32'), True)"
    assert text(fresh, "batch") == "(3, 576, 32) [ True False  True] [False  True False]"
    assert text(fresh, "bad").startswith("truncated | kinderdijk.jpg: truncated")
    nearest = [line.split()[2:] for line in text(fresh, "near").splitlines()[1:]]
    assert len(nearest) == 5
    assert all(image != other and 0 < float(cosine) < 1 for image, other, cosine in nearest)


def test_plain_zarr_reads_the_same(fresh):
    assert text(fresh, "zarr") == "(24, 576, 32) float16\nTrue True"


def test_damage_is_found(fresh):
    assert "row 0 (astronaut.jpg) is damaged" in text(fresh, "damage")
    said = text(fresh, "verify")
    assert "features of row 0 (astronaut.jpg)" in said
    assert "olavlm-cache repair features" in said


def test_the_notebook_is_kept_with_its_outputs_and_small(kept, fresh):
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert {output.output_type for cell in cells.values() for output in cell.outputs} == {"stream", "execute_result"}
    for name in ("plan", "counts", "row", "batch", "zarr", "damage"):
        assert text({name: shown(cells[name])}, name) == text(fresh, name), f"{name}: renew the notebook's outputs"
    for name in ("store", "teacher", "compare", "preview"):
        assert set(shown(cells[name])) == set(fresh[name]) - {"image/jpeg"}


if __name__ == "__main__":
    written = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as where:
        execute(written, Path(where))
    for cell in code_cells(written).values():
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)
    nbformat.write(written, NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size:,} bytes")
