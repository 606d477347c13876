"""A picture to the pixels of a base vision encoder, with Pillow, whatever library the encoder comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from olavlm.student.choices import Geometry
from olavlm.student.errors import ModelError, RecipeError

LONGEST_SIDE = 8192
"""Pixels; a longer picture is made smaller before it is padded to a square, which would be over 200 MB."""


@dataclass(frozen=True)
class ImageTransform:
    """An image to the encoder's input, on the CPU with Pillow. Picklable, so that loader workers need no model.

    Size, mean, std and interpolation are the encoder's own. The frame is not: an encoder whose own processing cuts a
    margin off, or squashes, is shown the same frame as all others, so that the teachers' frames can be aligned with it.
    """

    size: int
    """Side S of the square input, in pixels."""
    mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    geometry: Geometry = "square"
    """square: the short edge to S, then the centre crop, half of an odd margin rounded down as CLIP's image processor
    does, whatever library the encoder is of. pad: first pasted centred on a square of the longer side that is filled
    with the mean colour, so that nothing is cut off. squash: both edges to S, whatever shape that gives."""
    interpolation: str = "bicubic"
    """Name of one of Pillow's filters, in small letters."""

    def __post_init__(self) -> None:
        if self.geometry not in get_args(Geometry):
            raise RecipeError(f"geometry={self.geometry!r} must be one of {', '.join(get_args(Geometry))}")
        if self.interpolation.upper() not in Image.Resampling.__members__:
            names = ", ".join(known.name.lower() for known in Image.Resampling)
            raise ModelError(f"interpolation {self.interpolation!r} is none of Pillow's ({names}); use another encoder")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ModelError(f"the encoder takes pictures of {len(self.mean)} channels, ours have 3; use another one")
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 (3, S, S), normalised, channels RGB; ModelError for a picture of float samples."""
        image = _to_rgb(image)
        if self.geometry == "pad":
            image = self._pad_to_square(image)
        if self.geometry == "squash":
            image = image.resize((self.size, self.size), Image.Resampling[self.interpolation.upper()])
        else:
            image = self._cover(image)
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def config_fields(self) -> dict[str, Any]:
        """As fields of `OlaVLMConfig`."""
        return {
            "geometry": self.geometry,
            "image_size": self.size,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_interpolation": self.interpolation,
        }

    def _cover(self, image: Image.Image) -> Image.Image:
        """The short edge to S, and the middle of the long one.

        Of a picture over 16 times as long as it is wide only the middle is resized: the rest would only cost memory.
        """
        resample = Image.Resampling[self.interpolation.upper()]
        width, height = (int(self.size * side / min(image.size)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        right, bottom = left + self.size, top + self.size
        if max(width, height) <= 16 * self.size:
            return image.resize((width, height), resample).crop((left, top, right, bottom))
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, right * across, bottom * down)
        return image.resize((self.size, self.size), resample, box=box)

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        if max(image.size) > LONGEST_SIDE:
            image = image.copy()
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in self.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    def save(self, folder: str | Path) -> None:
        """Writes `preprocessor_config.json`, which the library's image processors read."""
        self.library_processor().save_pretrained(folder)

    def library_processor(self) -> CLIPImageProcessor | LlavaImageProcessorPil:
        """The library's image processor that makes the same pictures: LLaVA's where they are padded, else CLIP's."""
        settings = self.library_settings()
        if settings.pop("do_pad"):
            return LlavaImageProcessorPil(do_pad=True, **settings)
        return CLIPImageProcessor(**settings)

    def library_settings(self) -> dict[str, Any]:
        """As arguments of the library's image processor for LLaVA."""
        square = {"height": self.size, "width": self.size}
        return {
            "size": square if self.geometry == "squash" else {"shortest_edge": self.size},
            "crop_size": square,
            "do_center_crop": self.geometry != "squash",
            "do_pad": self.geometry == "pad",
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": Image.Resampling[self.interpolation.upper()],
        }


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel, as files are decoded; of 16-bit samples the higher 8 bits, where Pillow would clip them."""
    if image.mode == "F":
        raise ModelError("picture of mode 'F': float samples have no defined white; scale them to 8 bits first")
    if image.mode.startswith("I"):
        samples = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    return image.convert("RGB")
