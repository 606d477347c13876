"""What a transformers checkpoint says of how its pictures are made ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olavlm.teachers.checkpoint import PREPROCESSOR, PROCESSOR, Checkpoint
from olavlm.teachers.errors import TeacherError


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
