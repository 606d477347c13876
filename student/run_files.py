"""Files of runs: weights as safetensors, which all may read who may read the files beside them, and JSON as a whole.

safetensors 0.8 writes a file that is its owner's alone (mode 0600), whatever the umask, and with it every
`save_pretrained`: a colleague could neither start from such a run nor serve it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from olavlm.student.errors import ModelError


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write them, made contiguous, to a file that is as readable as others.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(_mode_of_new_files(file.parent))


@contextmanager
def shared_weights(folder: str | Path) -> Iterator[None]:
    """Make what is written within, by a `save_pretrained` into a local folder, as readable as others."""
    before = {file: file.stat().st_ino for file in Path(folder).glob("*.safetensors")}
    yield
    for file in Path(folder).glob("*.safetensors"):
        if file.stat().st_ino != before.get(file):
            file.chmod(_mode_of_new_files(file.parent))


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """What a file holds, on the CPU.

    Raises:
        ModelError: it is not there, may not be read, or is damaged.
    """
    try:
        with file.open("rb"):  # safetensors says of a file that may not be read that it is not there
            pass
        return load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except PermissionError:
        raise ModelError(f"{file} may not be read by this user; have its owner make it readable") from None
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{file} is damaged: {e}") from None


def write_json(file: Path, content: object) -> None:
    """Replace a file as a whole."""
    private = file.with_name(f".{file.name}")
    private.write_text(json.dumps(content, indent=1) + "\n")
    private.replace(file)


def _mode_of_new_files(folder: Path) -> int:
    """By the umask, and whatever else the folder has a say in."""
    probe = folder / f".mode.{secrets.token_hex(8)}"
    probe.touch()
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()
