"""The image processor of a checkpoint of the library as an `ImageTransform`, which does the same with Pillow."""

from __future__ import annotations

from math import isclose
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig

from olavlm.student.choices import Geometry
from olavlm.student.errors import ModelError
from olavlm.student.loading import load_errors
from olavlm.student.vision.image_transform import ImageTransform
from olavlm.student.vision.transformers_encoders import FAMILIES


def read_image_transform(source: str | Path, tower: PreTrainedConfig) -> tuple[ImageTransform, list[str]]:
    """What turns an image into the tower's pixels, and what to say about it.

    Unlike `load_image_transform` this keeps the checkpoint's frame: what the model was trained with.

    Raises:
        ModelError: a processor that makes other pictures than ours, with the reason.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(str(source))
    except OSError:
        family = FAMILIES[tower.model_type]
        transform = ImageTransform(tower.image_size, family.mean, family.std)
        return transform, [f"images: there is no image processor; {tower.model_type}'s own mean and std, centre crop"]
    except (ImportError, ValueError):
        with load_errors(source):
            raise
    transform = transform_of(processor)
    if transform.size != tower.image_size and not FAMILIES[tower.model_type].any_side:
        raise ModelError(
            f"{source}: the image processor makes pictures of {transform.size} pixels, the tower takes "
            f"{tower.image_size}"
        )
    return transform, []


def transform_of(processor: Any) -> ImageTransform:
    """The transform of an image processor that resizes, crops or pads, rescales and normalises.

    Raises:
        ModelError: one that does something else.
    """
    name = type(processor).__name__
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, step, False):
            raise ModelError(f"{name}: {step} is false; ours resizes, rescales and normalises")
    if not isclose(processor.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise ModelError(f"{name}: rescale_factor is {processor.rescale_factor}; ours is 1/255")
    size, geometry = _frame(processor, name)
    return ImageTransform(
        size,
        tuple(processor.image_mean),
        tuple(processor.image_std),
        geometry,
        Image.Resampling(int(processor.resample)).name.lower(),
    )


def _frame(processor: Any, name: str) -> tuple[int, Geometry]:
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    crop = {key: value for key, value in dict(processor.crop_size or {}).items() if value is not None}
    if not getattr(processor, "do_center_crop", False):
        crop = {}
    pads = bool(getattr(processor, "do_pad", False))
    sides = {*size.values(), *crop.values()}
    known = set(size) == {"height", "width"} or (set(size) == {"shortest_edge"} and (crop or pads))
    if not known or len(sides) != 1 or (pads and not name.startswith("Llava")):
        raise ModelError(
            f"{name}: size {size}, crop {crop or None}, padding {pads} make no picture of ours, which is a centre crop "
            "of the resized short edge, a padded square, or the whole picture made square"
        )
    return sides.pop(), "pad" if pads else "square" if "shortest_edge" in size else "squash"
