"""With geometry `square` or `pad`, teachers and the base encoder see one frame: their grids lie over each other."""

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.student.vision.encoders import VisionEncoder, load_image_transform
from olavlm.teachers import load_teacher

TEACHERS = ("depth", "seg", "timm:vit_small_patch14_reg4_dinov2", "timm:convnext_tiny", "open_clip:tiny")
CELLS = 4  # a side; the base encoder's grid, the coarsest

FRAMES = {"square": (100, 0, 200), "pad": (0, -100, 400)}
"""Of a picture of 400 x 200 pixels: left, top and side of what is seen."""


def picture(geometry: str, row: int, column: int, marked: bool) -> Image.Image:
    """Noise of 400 x 200 pixels; `marked` has a white square in the middle of a cell of the frame."""
    pixels = np.random.default_rng(0).integers(90, 140, (200, 400, 3), dtype=np.uint8)
    left, top, side = FRAMES[geometry]
    cell = side // CELLS
    if marked:
        down, right = top + row * cell + cell // 4, left + column * cell + cell // 4
        pixels[down : down + cell // 2, right : right + cell // 2] = 255
    return Image.fromarray(pixels)


def cell_of_change(features: torch.Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """The cell in which the token lies that differs most between two pictures: features [2, rows * columns, dim]."""
    row, column = divmod(int((features[1] - features[0]).norm(dim=-1).argmax()), grid[1])
    return int((row + 0.5) / grid[0] * CELLS), int((column + 0.5) / grid[1] * CELLS)


@pytest.mark.parametrize(
    ("geometry", "cell"), [("square", (1, 0)), ("square", (3, 2)), ("pad", (1, 0)), ("pad", (2, 3))]
)
def test_a_marker_is_in_the_same_cell_for_all(geometry, cell, checkpoints, tiny):
    pictures = [picture(geometry, *cell, marked) for marked in (False, True)]
    found = {}
    for name in TEACHERS:
        recipe = "tokens" if ":" in name else None
        teacher = load_teacher(name, model=checkpoints[name], recipe=recipe, geometry=geometry, device="cpu")
        found[name] = cell_of_change(teacher.encode(pictures), teacher.card.grid)
    transform = load_image_transform(tiny["encoder"], geometry)
    encoder = VisionEncoder.from_pretrained(tiny["encoder"])
    found["base"] = cell_of_change(
        encoder(torch.from_numpy(np.stack([transform(image) for image in pictures]))), (CELLS, CELLS)
    )
    assert found == dict.fromkeys([*TEACHERS, "base"], cell)


def test_the_papers_own_geometry_is_misaligned(checkpoints, tiny):
    """The control: what the base encoder sees on the left is further right in the teacher's squashed picture."""
    pictures = [picture("square", 1, 0, marked) for marked in (False, True)]
    teacher = load_teacher("depth", model=checkpoints["depth"], geometry="reference", device="cpu")
    assert cell_of_change(teacher.encode(pictures), teacher.card.grid) == (1, 1)
