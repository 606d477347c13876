"""Image files to extract from: as many as wanted, of a few pictures, so that no disk is filled with them."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageOps

SIZE = (640, 480)  # about what LLaVA's pictures are
QUALITY = 85
_SAMPLE = Path(str(files("olavlm.pipelines") / "sample" / "images"))
_WIDE = ("bison", "castle_clinton", "giraffes", "great_wall", "jaguars", "koala", "lemurs", "moose", "pont_du_gard")


def photographs(folder: Path, count: int) -> list[str]:
    """Put `count` JPEG photographs of 640 x 480 in `folder`; their names.

    The bundled ones, cut to that shape and scaled, under many names.
    """
    kinds = []
    folder.mkdir(parents=True)
    for name in _WIDE[:count]:
        kinds.append(folder / f".{name}.jpg")
        with Image.open(_SAMPLE / f"{name}.jpg") as picture:
            ImageOps.fit(picture.convert("RGB"), SIZE, Image.Resampling.BICUBIC).save(kinds[-1], quality=QUALITY)
    return _named(folder, kinds, count, ".jpg")


def specks(folder: Path, count: int) -> list[str]:
    """Put `count` image files of one pixel in `folder`; their names."""
    folder.mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(folder / ".speck.ppm")
    return _named(folder, [folder / ".speck.ppm"], count, ".ppm")


def _named(folder: Path, kinds: list[Path], count: int, suffix: str) -> list[str]:
    names = [f"{number // 1000:05d}/{number:09d}{suffix}" for number in range(count)]
    for parent in sorted({Path(name).parent for name in names}):
        (folder / parent).mkdir()
    for number, name in enumerate(names):
        os.link(kinds[number % len(kinds)], folder / name)
    return names
