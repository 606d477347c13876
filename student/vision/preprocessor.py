"""What a transformers checkpoint says of how its pictures are made ready."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olavlm.student.errors import ModelError
from olavlm.student.loading import find_file, load_errors

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessor:
    """The fields of a checkpoint's image processor. One that is null counts as absent."""

    fields: Mapping[str, Any]
    place: str
    """Checkpoint and file, for messages."""

    @classmethod
    def of(cls, name: str) -> "Preprocessor":
        """Of a folder or hub id, read as transformers reads it: a section of the whole processor's file, where
        transformers 5 keeps it, ahead of a file of its own. Without either there are no fields.

        Raises:
            ModelError: a file that cannot be read.
        """
        file, fields = PROCESSOR, _read_json(name, PROCESSOR).get("image_processor")
        if fields is None:
            file, fields = PREPROCESSOR, _read_json(name, PREPROCESSOR)
        place = f"{name!r}: its {file}"
        if not isinstance(fields, dict):
            raise ModelError(f"{place} has image_processor {fields!r}, not a JSON object; save the processor again")
        return cls({key: value for key, value in fields.items() if value is not None}, place)


def _read_json(name: str, filename: str) -> dict[str, Any]:
    """{} for a file that is not there."""
    file = find_file(name, filename)
    if file is None:
        return {}
    with load_errors(name):
        values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ModelError(f"{name!r}: its {filename} is not a JSON object; save the processor again")
    return values
