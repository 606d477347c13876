"""Names of base encoders, as a recipe's `model.encoder` holds them.

    openai/clip-vit-large-patch14-336                          a hub id or a folder of transformers
    timm:vit_large_patch14_dinov2.lvd142m                      a model of timm, weights of timm's own hub repository
    timm:vit_base_patch16_224=weights.safetensors              the same from a file, a folder or a hub id
    timm:FOLDER                                                config.json and model.safetensors, as timm saves them
    open_clip:convnext_xxlarge/laion2b_s34b_b82k_augreg_soup   a model of open_clip and the tag of its weights
    open_clip:convnext_xxlarge=open_clip_model.safetensors     the same from a file, a folder or a hub id
    open_clip:FOLDER                                           open_clip_config.json and open_clip_model.safetensors

`-resN` at the end of the model's name (ahead of `=`), as in `...augreg_soup-res768`, is the side of the input.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from olavlm.student.errors import ModelError

Library = Literal["transformers", "timm", "open_clip"]

TEACHER = "base"
"""What `olavlm-extract --teacher` calls a base encoder, whichever it is."""
USUAL_LAYER = -2
"""Of `model.select_layer`."""


@dataclass(frozen=True)
class EncoderName:
    """The parts of a name."""

    text: str
    """As it was given; what errors name."""
    library: Library
    model: str
    """A hub id, a folder, or the library's name of a model."""
    weights: str | None = None
    """File, folder or hub id of the weights, where the model's name does not say."""
    side: int | None = None
    """Of the square input in pixels, where it is not the model's own."""

    @classmethod
    def parse(cls, text: str | Path) -> "EncoderName":
        """ModelError for a name that starts or ends with nothing, or that gives transformers two places to look."""
        text = str(text)
        library, colon, rest = text.partition(":")
        if not colon or library not in get_args(Library)[1:]:
            library, rest = "transformers", text
        model, equals, weights = (rest, "", "") if Path(rest).exists() else rest.partition("=")
        side = None
        if not Path(model).exists() and (found := re.fullmatch(r"(.+)-res(\d+)", model)):
            model, side = found[1], int(found[2])
        if not model or (equals and not weights):
            raise ModelError(f"encoder {text!r}: give a name, as in timm:MODEL or open_clip:MODEL/PRETRAINED")
        if equals and library == "transformers":
            raise ModelError(f"encoder {text!r}: MODEL=WEIGHTS is for timm: and open_clip:; give a folder or a hub id")
        return cls(text, library, model, weights or None, side)

    def absolute(self) -> str:
        """The name with every local path in full, so that it is understood from anywhere."""
        model = _absolute(self.model) + ("" if self.side is None else f"-res{self.side}")
        if self.weights is not None:
            model += f"={_absolute(self.weights)}"
        return model if self.library == "transformers" else f"{self.library}:{model}"


def layer_recipe(select_layer: int | str) -> str:
    """What `olavlm-extract --recipe` calls an encoder's hidden state."""
    return f"layer{select_layer}"


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path
