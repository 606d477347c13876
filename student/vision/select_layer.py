"""Which features of a base encoder are projected, whatever library it comes from."""

from typing import NamedTuple

from olavlm.student.errors import RecipeError


class FeatureShape(NamedTuple):
    """The shape of one picture's features; tokens are row-major."""

    rows: int
    columns: int
    width: int


def block_of(select_layer: int, num_blocks: int) -> int:
    """Index of the block whose output a hidden state is, the first hidden state being the embedding.

    Raises:
        RecipeError: a layer that the encoder has not.
    """
    block = (select_layer if select_layer >= 0 else num_blocks + 1 + select_layer) - 1
    if not 0 <= block < num_blocks:
        raise RecipeError(
            f"select_layer={select_layer}: the encoder has {num_blocks} blocks; use -{num_blocks} to -1, "
            f"or 1 to {num_blocks}"
        )
    return block


def check_patches(side: int, patch_size: int) -> None:
    """RecipeError for pictures of which whole patches leave a rest."""
    if side % patch_size:
        raise RecipeError(
            f"pictures of {side} pixels: the encoder's patches are {patch_size} wide; "
            f"use {max(1, side // patch_size) * patch_size}"
        )
