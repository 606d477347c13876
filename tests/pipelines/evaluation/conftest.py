"""A model in our form and in transformers', and a dataset in the form that CV-Bench is published in."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from olavlm.pipelines import export
from olavlm.student.extension import extend
from olavlm.student.formats.llava_hf import from_llava_hf
from olavlm.student.tokens import TaskSpec

KINDS = (("Count", "2D", "ADE20K"), ("Relation", "2D", "COCO"), ("Depth", "3D", "Omni3D"), ("Distance", "3D", "Omni3D"))
"""Questions, their part, and where their pictures are from, in turn."""

_TEXT, _NUMBER = {"dtype": "string", "_type": "Value"}, {"dtype": "int64", "_type": "Value"}
_BOX = {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "List"}
_COLUMNS = {  # with what the library `datasets` writes of them, from which it knows a picture
    "idx": (pa.int64(), _NUMBER), "type": (pa.string(), _TEXT), "task": (pa.string(), _TEXT),
    "image": (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}),
    "question": (pa.string(), _TEXT), "choices": (pa.list_(pa.string()), {"feature": _TEXT, "_type": "List"}),
    "answer": (pa.string(), _TEXT), "prompt": (pa.string(), _TEXT), "filename": (pa.string(), _TEXT),
    "source": (pa.string(), _TEXT), "source_dataset": (pa.string(), _TEXT), "source_filename": (pa.string(), _TEXT),
    "target_class": (pa.string(), _TEXT), "target_size": (pa.int64(), _NUMBER),
    "bbox": (pa.list_(pa.list_(pa.float64())), {"feature": _BOX, "_type": "List"}),
}  # fmt: skip
_FEATURES = json.dumps({"info": {"features": {name: feature for name, (_, feature) in _COLUMNS.items()}}})
SCHEMA = pa.schema([(name, kind) for name, (kind, _) in _COLUMNS.items()], {"huggingface": _FEATURES})


def cv_bench_row(index: int) -> dict:
    kind, part, source = KINDS[index % 4]
    stream = io.BytesIO()
    colour = (37 * index % 256, 90 * index % 256, 160)
    Image.new("RGB" if index % 3 else "L", (60 + index, 48), colour if index % 3 else index).save(stream, "png")
    question, choices = f"What is on picture {index}?", [str(index), "a cat", "a dog"]
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABC", choices, strict=True))
    return {
        "idx": index, "type": part, "task": kind, "question": question, "choices": choices,
        "image": {"bytes": stream.getvalue(), "path": f"{index}.png"},
        "answer": f"({'ABC'[index % 3]})", "prompt": f"{question} Select from the following choices.\n{options}",
        "filename": f"img/{part}/{index}.png", "source": source, "source_dataset": f"{source} val",
        "source_filename": f"{index}.jpg", "target_class": None, "target_size": None, "bbox": [[0.0, 1.0, 2.0, 3.0]],
    }  # fmt: skip


def write_parquet(file: Path, rows: Sequence[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), file, row_group_size=3)
    return file


@pytest.fixture(scope="session")
def cv_bench(tmp_path_factory) -> Path:
    """Twelve rows: eight of 2D, then four of 3D, as `test_2d.parquet` and `test_3d.parquet`."""
    folder = tmp_path_factory.mktemp("datasets") / "CV-Bench"
    rows = [cv_bench_row(i) for i in range(16)]
    write_parquet(folder / "test_2d.parquet", [row for row in rows if row["type"] == "2D"])
    write_parquet(folder / "test_3d.parquet", [row for row in rows if row["type"] == "3D"][:4])
    (folder / "README.md").write_text("CV-Bench")
    return folder


@pytest.fixture(scope="session")
def stock(llava) -> Path:
    """A LLaVA of transformers whose tokenizer and chat template each begin a prompt."""
    return llava("llama_clip")


@pytest.fixture(scope="session")
def ours(stock, tmp_path_factory) -> Path:
    """That LLaVA with task tokens, in our form."""
    torch.manual_seed(0)
    model = extend(from_llava_hf(stock).model, [TaskSpec("depth", tokens=16, dim=24)])
    folder = tmp_path_factory.mktemp("ours") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(ours) -> Path:
    """The same model as `olavlm-export` writes it for transformers."""
    folder = ours.parent / "exported"
    assert export.main([str(ours), str(folder), "--to", "llava-hf"]) == 0
    return folder
