"""A checkpoint's safetensors, in one file or several, whose names and shapes are known before a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from olavlm.student.errors import ModelError
from olavlm.student.loading import find_file, load_errors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")


class Shards:
    """The weight files of a folder or a hub id.

    Raises:
        ModelError: no safetensors there, a damaged file, or a shard that is not there.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every tensor, by name."""
        self._files: dict[str, Path] = {}
        index = find_file(source, INDEX)
        placed: dict[str, str] = {}
        if index is not None:
            try:
                placed = dict(json.loads(index.read_text())["weight_map"])
            except (KeyError, TypeError, ValueError) as error:
                raise ModelError(f"{index} is damaged: {error!r}") from error
        for name in sorted(set(placed.values())) or [WEIGHTS]:
            self._open(name)
        if lost := sorted(set(placed) - set(self.shapes)):
            raise ModelError(f"{source}: {placed[lost[0]]} lacks {lost[0]}, which {INDEX} places there")

    def _open(self, name: str) -> None:
        file = find_file(self.source, name)
        if file is None:
            pickled = find_file(self.source, *PICKLED)
            raise ModelError(
                f"{self.source} has no {name}"
                + (f" but {pickled.name}, and pickles are not read: save it as safetensors" if pickled else "")
            )
        with load_errors(self.source), safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no mapping
                self.shapes[key] = tuple(tensors.get_slice(key).get_shape())
                self._files[key] = file

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, in the dtype they are stored in; on the disk until they are used."""
        found, wanted = {}, set(names)
        for file in sorted({self._files[name] for name in wanted}):
            with load_errors(self.source), safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in sorted(wanted) if self._files[name] == file}
        return found
