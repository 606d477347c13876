"""What a transformers checkpoint says of how its pictures are made ready, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any

from PIL import Image

from olavlm.teachers.checkpoint import PREPROCESSOR, PROCESSOR, Checkpoint
from olavlm.teachers.errors import TeacherError

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessor:
    """The fields of a checkpoint's image processor. One that is null counts as absent."""

    fields: Mapping[str, Any]
    place: str = PREPROCESSOR
    """Model and file, for messages."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Preprocessor:
        """Read as transformers reads it: a section of the whole processor's file, where transformers 5 keeps it, ahead
        of a file of its own. Without either there are no fields.

        Raises:
            TeacherError: a file that cannot be read.
        """
        name, fields = PROCESSOR, checkpoint.json(PROCESSOR).get("image_processor")
        if fields is None:
            name, fields = PREPROCESSOR, checkpoint.json(PREPROCESSOR)
        place = f"{checkpoint.model}: {name}"
        if not isinstance(fields, dict):
            raise TeacherError(
                f"{place}: its image_processor is {fields!r}, not a JSON object; save the processor again"
            )
        return cls({key: value for key, value in fields.items() if value is not None}, place)

    def resample(self, default: Image.Resampling) -> Image.Resampling:
        """Pillow's filter; TeacherError for a number that is none."""
        try:
            return Image.Resampling(self.fields.get("resample", default))
        except ValueError:
            numbers = ", ".join(f"{known.value} {known.name.lower()}" for known in Image.Resampling)
            raise self.wrong("resample", f"give the number of one of Pillow's filters, {numbers}") from None

    def normalisation(self, mean: Channels, std: Channels) -> tuple[Channels, Channels]:
        """Mean and std of pixels in [0, 1], by default those given; 0 and 1 where nothing is normalised.

        A checkpoint whose pixels are rescaled to another range than [0, 1], or not at all, has its own for that range.

        Raises:
            TeacherError: what is not three numbers, or a rescale_factor that is none above 0.
        """
        if self.flag("do_normalize"):
            mean, std = self._channels("image_mean", mean), self._channels("image_std", std)
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        white = 255 * self._rescale_factor()
        if isclose(white, 1, rel_tol=1e-6):
            return mean, std
        return tuple(x / white for x in mean), tuple(x / white for x in std)

    def flag(self, name: str) -> bool:
        """Whether a step is done, as by default; TeacherError for what is neither true nor false."""
        value = self.fields.get(name, True)
        if not isinstance(value, bool):
            raise self.wrong(name, "write true or false")
        return value

    def wrong(self, name: str, remedy: str) -> TeacherError:
        """To be raised: a field whose value cannot be used."""
        return TeacherError(f"{self.place}: {name} is {self.fields.get(name)!r}; {remedy}")

    def _rescale_factor(self) -> float:
        if not self.flag("do_rescale"):
            return 1
        factor = self.fields.get("rescale_factor", 1 / 255)
        if type(factor) not in (int, float) or not isfinite(factor) or factor <= 0:
            raise self.wrong("rescale_factor", "give a number above 0, by which 8-bit samples are multiplied")
        return factor

    def _channels(self, name: str, default: Channels) -> Channels:
        value = self.fields.get(name, default)
        numbers = isinstance(value, list | tuple) and all(type(x) in (int, float) and isfinite(x) for x in value)
        if not numbers or len(value) != 3 or (name == "image_std" and min(value) <= 0):
            raise self.wrong(name, "give numbers of red, green and blue, those of image_std above 0")
        return tuple(value)
