"""From a picture to the pixels a network sees: frame, resize, crop. All resizing is Pillow's."""

from __future__ import annotations

from PIL import Image

from olavlm.teachers.errors import TeacherError

GEOMETRIES = ("reference", "square", "pad")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def frame(image: Image.Image, geometry: str, mean: tuple[float, float, float]) -> Image.Image:
    """The part of the picture a teacher is shown, before its own resize.

    Args:
        image: any size and mode; converted to RGB.
        geometry: `reference` leaves the picture as it is; `square` cuts the centre square of the shorter side;
            `pad` pastes it centred on a square of the longer side. With `square` or `pad` a teacher sees the frame
            that a base encoder with the same geometry sees, so that their grids are aligned.
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
    half of what is cut.

    Raises:
        TeacherError: a picture so long and thin that its resized form would not fit a sane memory.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(side * long / short)
    if Image.MAX_IMAGE_PIXELS and side * long > 2 * Image.MAX_IMAGE_PIXELS:
        raise TeacherError(
            f"image of {width}x{height} pixels: a short edge of {side} would make it {side}x{long}, over Pillow's "
            "limit; leave it out, or use geometry square or pad"
        )
    size = (side, long) if width <= height else (long, side)
    return centre_crop(image.resize(size, Image.Resampling.BICUBIC), side)


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The (side, side) square in the middle of a picture at least that large."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
