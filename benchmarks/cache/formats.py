"""The formats that are compared: each writes a payload durably, and reads rows of what was written.

    format.write(folder, payload)          float32 rows in memory -> float16 on the disk, files and folders fsynced
    reader = format.open(folder)
    reader.read([3, 1, 2], out)            rows in any order into `out`, `(rows, tokens, dim)` float16
    reader.read_slice(0, 32, out)          rows in order

A format whose package is not installed is left out of the comparison, which says so.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from .payload import Payload


class Reader(Protocol):
    def read(self, rows: list[int], out: np.ndarray) -> None: ...

    def read_slice(self, start: int, stop: int, out: np.ndarray) -> None: ...


class Format(Protocol):
    name: ClassVar[str]
    checksums: ClassVar[str]
    """What is verified when a row is read."""

    def write(self, folder: Path, payload: Payload) -> None: ...

    def open(self, folder: Path) -> Reader: ...


_FORMATS = {  # name: (module, class)
    "olavlm": ("olavlm_store", "OlavlmStore"),
    "zarr-python": ("zarr_python", "ZarrPython"),
    "tensorstore": ("tensorstore_zarr3", "TensorStore"),
    "datasets (Arrow)": ("hf_datasets", "HFDatasets"),
}
ZARR = ("zarr-python", "tensorstore")  # they read our store's own files, given a teacher's `features` folder


def format_named(name: str) -> Format:
    """ImportError if its package is not installed."""
    module, cls = _FORMATS[name]
    return getattr(importlib.import_module(f".{module}", __package__), cls)()


def installed() -> tuple[list[Format], list[str]]:
    """The formats, ours first, and a sentence for each that cannot be imported here."""
    formats, absent = [], []
    for name in _FORMATS:
        try:
            formats.append(format_named(name))
        except ImportError:
            absent.append(f"{name} is not installed and was left out.")
    return formats, absent


def fsync_tree(folder: Path) -> None:
    """Make durable what a writer that does not fsync has left in `folder`."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def bytes_on_disk(folder: Path) -> int:
    """Sizes of all files."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
