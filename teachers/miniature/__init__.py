"""Three small teachers that come with the package, and need no download.

    depth    Depth-Anything-V2, 6 blocks of width 64     closeness
    seg      OneFormer, a Swin of widths 16 to 128       24 kinds of solids, ground and sky
    gen      a CLIP image encoder with projection        an embedding of 48

They were trained by `python -m benchmarks.miniature models` on a procedural world of a few solids, and are checkpoint
folders like any other: `olavlm-extract --teacher depth=FOLDER`. Of that world they know depth and masks; of photographs
a rough guess. `miniature.json` in each folder says how it was trained, and what it scored on held-out pictures.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from olavlm.teachers.errors import TeacherError

NAMES = ("depth", "seg", "gen")


def folder(name: str) -> Path:
    """Folder of the small teacher of this name. TeacherError if there is none."""
    if name not in NAMES:
        raise TeacherError(f"{name!r}: no small teacher comes with the package; there are {', '.join(NAMES)}")
    return Path(str(files("olavlm.teachers.miniature") / name))
