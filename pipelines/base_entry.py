"""The name `base` among the teachers, and nothing that takes long to import; see `base_encoder`.

An entry point of the group `olavlm.teachers`, as a teacher of one's own is: `teachers/` imports nothing of the student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from olavlm.student.vision.encoder_name import USUAL_LAYER, layer_recipe
from olavlm.teachers import Entry

if TYPE_CHECKING:
    from olavlm.teachers import Teacher


def _base(**options) -> Teacher:
    from .base_encoder import load_base

    return load_base(**options)


ENTRY = Entry(None, recipes=(layer_recipe(USUAL_LAYER), layer_recipe("N")), load=_base)
