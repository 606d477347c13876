"""`--teacher base=MODEL`: the student's own base encoder as a teacher, so that its features can be cached too.

    olavlm-extract --teacher base=openai/clip-vit-large-patch14-336 --geometry square ... --store encoder-pt
    olavlm-extract --teacher base=openai/clip-vit-large-patch14-336 --geometry pad ... --store encoder-ift

MODEL is a recipe's `model.encoder`, geometry what the encoder sees (`reference` is `square`), and the recipe `layerN` a
recipe's `model.select_layer`, `layer-2` by default. The picture's pixels and the features are made by the code that
makes them in training (`student/vision/encoders.py`); `student/data/encoder_features.py` then reads them instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from olavlm.student.data.encoder_features import describe_resize, tower_digest
from olavlm.student.errors import StudentError
from olavlm.student.vision.encoder_name import EncoderName, layer_recipe
from olavlm.student.vision.encoders import VisionEncoder, load_image_transform
from olavlm.student.vision.image_transform import ImageTransform
from olavlm.teachers import Card, TeacherError
from olavlm.teachers.base import COMPUTE_DTYPES, library_versions

PACKAGES = {"transformers": "transformers", "timm": "timm", "open_clip": "open_clip_torch"}
"""By the library of an encoder's name."""


class BaseEncoder:
    """See `olavlm.teachers.Teacher`. A reduced compute dtype is autocast over float32 weights, as the trainer's is."""

    def __init__(self, card: Card, encoder: VisionEncoder, transform: ImageTransform, device: torch.device) -> None:
        self.card, self.device = card, device
        self.network = encoder.to(device)
        self._transform = transform
        self._dtype = COMPUTE_DTYPES[card.compute_dtype]

    def prepare(self, image: Image.Image) -> np.ndarray:
        """One picture of any size, of any mode but float -> float32 [3, S, S], as the trainer's loader makes it."""
        return self._transform(image)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Prepared pictures [B, 3, S, S] -> [B, tokens, dim] float32 on the encoder's device.

        Raises:
            TeacherError: the batch is not a stack of what `prepare` gives.
        """
        if batch.dtype != torch.float32 or batch.shape[1:] != (3, *self.card.size):
            raise TeacherError(
                f"batch of {batch.dtype} {tuple(batch.shape)}: {self.card.name} takes float32 "
                f"(B, 3, {self.card.size[0]}, {self.card.size[1]}); stack what prepare() returns"
            )
        reduced = self._dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._dtype if reduced else None, enabled=reduced):
            return self.network(batch.to(self.device, non_blocking=True)).float()

    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pictures of any size, of any mode but float -> [B, tokens, dim] float32 on the CPU."""
        if not images:
            return torch.empty(0, self.card.tokens, self.card.dim)
        return self.forward(torch.from_numpy(np.stack([self.prepare(image) for image in images]))).cpu()


def load_base(
    *,
    name: str,
    model: str | None,
    revision: str | None,
    recipe: str,
    geometry: str,
    device: torch.device,
    compute_dtype: str,
) -> BaseEncoder:
    """See `olavlm.teachers.load_teacher`, which checks the arguments.

    Raises:
        TeacherError: no encoder is named, or it cannot be used.
    """
    if model is None:
        raise TeacherError(f"{name}: name a recipe's model.encoder, as in --teacher {name}=MODEL")
    if revision is not None:
        raise TeacherError(f"{name}: revision {revision!r} is not for it, as training takes none; name a local folder")
    layer = int(recipe.removeprefix(layer_recipe("")))
    try:
        parsed = EncoderName.parse(model)
        transform = load_image_transform(model, "pad" if geometry == "pad" else "square")
        encoder = VisionEncoder.from_pretrained(model, layer)
    except StudentError as error:
        raise TeacherError(f"{name}: {error}") from error
    card = Card(
        name=name,
        model=parsed.absolute(),
        weights_sha256=tower_digest(encoder.tower),
        recipe={
            "name": recipe,
            "layers": [layer],
            "averaging": "none",
            "resize": describe_resize(transform),
            "interpolation": "none",
        },
        geometry=transform.geometry,
        size=(transform.size, transform.size),
        mean=transform.mean,
        std=transform.std,
        compute_dtype=compute_dtype,
        tokens=encoder.num_tokens,
        dim=encoder.width,
        grid=encoder.grid,
        versions=library_versions(PACKAGES[parsed.library]),
    )
    return BaseEncoder(card, encoder, transform, device)
