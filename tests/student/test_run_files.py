"""Weights that a colleague may read: by the umask, as every other file of a run."""

import os
import stat
from pathlib import Path

import pytest
import torch

from olavlm.student.adapter import load_checkpoint
from olavlm.student.errors import ModelError
from olavlm.student.formats.llava_hf_export import to_llava_hf
from olavlm.student.run_files import load_tensors, save_tensors
from olavlm.student.training.trainer import train


@pytest.fixture(params=[0o002, 0o077])
def mode(request):
    """Of new files, under a umask of a group that shares its files, and of somebody who does not."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    return {str(file.relative_to(folder)): stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*.*")
            if file.is_file()}  # fmt: skip


def test_of_runs_and_exports(recipe, tmp_path, mode):
    pt = train(recipe(**{"train.max_steps": 1, "train.output_dir": tmp_path / "pt"}), "pt", {})
    made = recipe("ift", **{"train.max_steps": 1, "train.output_dir": tmp_path / "ift", "init.from": pt})
    ift = train(made, "ift", {})
    to_llava_hf(*load_checkpoint(ift)).save(tmp_path / "export")
    found = modes(tmp_path)
    weights = {
        "pt/adapter",
        "ift/model",
        "export/model",
        *(f"{run}/checkpoints/step-000001/trained" for run in (pt.name, "ift")),
    }
    assert {f"{name}.safetensors" for name in weights} <= found.keys()
    assert {name: kept for name, kept in found.items() if kept != mode} == {}


def test_what_cannot_be_read_and_why(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_tensors({"a": torch.arange(6.0).view(2, 3).T}, file)
    assert load_tensors(file)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ModelError, match=r"gone.safetensors does not exist"):
        load_tensors(tmp_path / "gone.safetensors")

    def denied(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ModelError, match=r"x.safetensors may not be read by this user"):
        load_tensors(file)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"x.safetensors is damaged: "):
        load_tensors(file)
