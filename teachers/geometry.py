"""From a picture to the pixels a network sees: frame, resize, crop. All resizing is Pillow's."""

from __future__ import annotations

from PIL import Image

from olavlm.teachers.errors import TeacherError

GEOMETRIES = ("reference", "square", "pad")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST_SIDE = 8192
"""No picture is made longer than this on the way to its final size, or one that is a pixel wide would fill the memory.
"""


def frame(image: Image.Image, geometry: str, mean: tuple[float, float, float]) -> Image.Image:
    """The part of the picture a teacher is shown, before its own resize.

    Args:
        image: any size and mode; converted to RGB.
        geometry: `reference` leaves the picture as it is; `square` cuts the centre square of the shorter side;
            `pad` pastes it centred on a square of the longer side, shrunk first if that exceeds `LONGEST_SIDE`.
            With `square` or `pad` a teacher sees the frame that a base encoder with the same geometry sees, so that
            their grids are aligned.
        mean: the teacher's pixel mean in [0, 1]; `pad` fills with the integer part of 255 times it.

    Raises:
        TeacherError: an unknown geometry.
    """
    check_geometry(geometry)
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    if geometry == "reference" or width == height:
        return image
    if geometry == "square":
        return centre_crop(image, min(width, height))
    if max(width, height) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
        width, height = image.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def check_geometry(geometry: str) -> None:
    """Raises TeacherError for a geometry that is not in `GEOMETRIES`."""
    if geometry not in GEOMETRIES:
        raise TeacherError(f"geometry {geometry!r}: unknown; use one of {', '.join(GEOMETRIES)}")


def squash(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Resize to (side, side) without keeping the aspect ratio."""
    return image.resize((side, side), resample)


def short_edge_crop(image: Image.Image, side: int) -> Image.Image:
    """Bicubic resize of the shorter edge to `side`, then the centre square: the CLIP transform.

    Rounding and crop offsets are those of the CLIP image processor: the longer edge is rounded down, and so is
    half of what is cut. Beyond `LONGEST_SIDE` only the part that is kept is resized, which differs at most in rounding.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(side * long / short)
    if resized_long > LONGEST_SIDE:
        scale = long / resized_long
        start = (resized_long - side) // 2 * scale
        end = start + side * scale
        box = (0, start, width, end) if width <= height else (start, 0, end, height)
        return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    size = (side, resized_long) if width <= height else (resized_long, side)
    return centre_crop(image.resize(size, Image.Resampling.BICUBIC), side)


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The (side, side) square in the middle of a picture at least that large."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
