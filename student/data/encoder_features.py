"""What the frozen base encoder gives, read from a feature store in place of the images.

    olavlm-extract --teacher base=openai/clip-vit-large-patch14-336 --geometry square --data ... --store encoder
    olavlm-train pt --config llama3-8b-clip-l --data.encoder_features encoder ...

No image is decoded then, and the encoder is not on the device. `pipelines/base_encoder.py` is the teacher that fills
the store, with the names and the digest of this module.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from olavlm.cache import CacheError, Dataset, TeacherFeatures
from olavlm.cache.images import redacted
from olavlm.student.choices import Stage
from olavlm.student.config import Recipe
from olavlm.student.errors import TargetsError
from olavlm.student.vision.encoder_name import TEACHER, USUAL_LAYER, layer_recipe
from olavlm.student.vision.encoders import VisionEncoder, load_image_transform
from olavlm.student.vision.image_transform import ImageTransform

from .coverage import check_covered, rows_in_plan
from .shared_tensors import Shape, allocate
from .stored_rows import open_store, read_rows, row_shapes, rows_of

Stored = dict[str, torch.Tensor]
"""Rows in their storage dtype: "features" (b, tokens, width) and, for int8, "scales" (b, tokens)."""


class EncoderFeatures:
    """The rows of the recipe's `data.encoder_features`."""

    def __init__(self, recipe: Recipe) -> None:
        self.store = open_store(recipe, recipe.data.encoder_features)
        self.group: TeacherFeatures = self.store[store_key(recipe)]

    def shapes(self, num_samples: int) -> dict[str, Shape]:
        """Shapes and dtypes of what `load` fills for so many samples."""
        return row_shapes(self.group, num_samples)

    def load(self, images: Sequence[str | None], out: Stored | None = None) -> tuple[Stored | None, dict[int, str]]:
        """Features of a micro-batch's images, and by row why an image was quarantined; its features are zeros.

        So are those of None, a sample without an image. A micro-batch without any image has no features at all. Fills
        `out`, if given.

        Raises:
            MissingFeatures, CorruptFeatures: rows that are not committed, or damaged.
        """
        present = [row for row, image in enumerate(images) if image is not None]
        if not present:
            return None, {}
        rows = rows_of(self.store, [images[row] for row in present])
        stored = allocate(self.shapes(len(images))) if out is None else out
        valid = read_rows(self.group, rows, present, stored)
        quarantined = {present[i]: str(self.group.failure(int(rows[i]))) for i in (~valid).nonzero()[0]}
        for part in stored.values():
            part[list(quarantined)] = 0  # NaN would reach the gradient even where nothing is learnt
        return stored, quarantined

    def take_the_place_of(self, vision: VisionEncoder, *, keep: bool) -> None:
        """Set the encoder's tower aside, once it is known to be the one whose features these are.

        Args:
            keep: whether it stays on the host, for a model that is to be saved whole.

        Raises:
            TargetsError: the tower has other weights.
        """
        if tower_digest(vision.tower) != self.group.card["weights_sha256"]:
            raise TargetsError(
                f"{self.group.folder} holds features of {self.group.card['model']}, whose weights are not those of "
                "this run's encoder; name another store in data.encoder_features, or none"
            )
        assert (vision.num_tokens, vision.width) == self.group.shape[1:], "one encoder, features of two shapes"
        vision.set_tower_aside(keep=keep)


def on_device(stored: Stored, device: torch.device) -> torch.Tensor:
    """Features (b, tokens, width), as stored or, of int8, float32."""
    parts = {name: part.to(device, non_blocking=True) for name, part in stored.items()}
    if "scales" in parts:
        return parts["features"].to(torch.float32) * parts["scales"][..., None]
    return parts["features"]


def tower_digest(tower: PreTrainedModel) -> str:
    """SHA-256, in hex, that names a tower's weights, whatever file they come from and in whatever dtype they are held.

    Of the sorted digests of its tensors, each as bfloat16, to which a model may have rounded them.
    """
    digests = []
    for tensor in tower.state_dict().values():
        if tensor.is_floating_point():
            values = tensor.detach().to("cpu", torch.bfloat16).contiguous()
            about = f"{tuple(values.shape)}".encode()
            digests.append(hashlib.sha256(about + values.view(torch.int16).numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def describe_resize(transform: ImageTransform) -> str:
    """What is done to the frame, as a card says it."""
    return f"short edge to {transform.size} {transform.interpolation}, centre crop"


def store_key(recipe: Recipe) -> str:
    """Where the recipe's store keeps the features."""
    layer = recipe.model.select_layer
    usual = TEACHER if layer == USUAL_LAYER else f"{TEACHER}-{layer_recipe(layer)}"
    return recipe.data.encoder_features_key or usual


def check_encoder_features(recipe: Recipe, dataset: Dataset, stage: Stage) -> TeacherFeatures:
    """Refuse a store that cannot stand in for the encoder; weights are compared once the encoder is loaded.

    Raises:
        TargetsError: the store is not there, lacks the features, holds those of another layer, geometry or size, or
            does not cover the dataset. Says the command that makes the right one.
        ModelError: the encoder's own description cannot be read.
    """
    where, key = recipe.data.encoder_features, store_key(recipe)
    try:
        store = open_store(recipe, where)
        there = store.teachers
    except CacheError as e:
        raise TargetsError(f"{e}: {extract_command(recipe, stage)}") from None
    if key not in there:
        raise TargetsError(
            f"store {redacted(where)} lacks {key} (it has {', '.join(there) or 'nothing'}); make it with: "
            f"{extract_command(recipe, stage)}"
        )
    group, card = store[key], store[key].card
    transform = load_image_transform(recipe.model.encoder, recipe.base_geometry(stage))
    wanted = {
        "teacher": (card.get("name"), TEACHER),
        "layer": (card["recipe"].get("name"), layer_recipe(recipe.model.select_layer)),
        "geometry": (card.get("geometry"), transform.geometry),
        "resizing": (card["recipe"].get("resize"), describe_resize(transform)),
        "mean": (tuple(card.get("mean", ())), transform.mean),
        "std": (tuple(card.get("std", ())), transform.std),
    }
    for what, (stored, asked) in wanted.items():
        if stored != asked:
            raise TargetsError(
                f"store {redacted(where)}, '{key}': {what} is {stored!r}, the base encoder's in {stage} is {asked!r}; "
                f"make another store with: {extract_command(recipe, stage, 'ANOTHER_STORE')}"
            )
    command = extract_command(recipe, stage, begun=group)
    check_covered(store, key, rows_in_plan(store, dataset, command), command)
    return group


def extract_command(
    recipe: Recipe, stage: Stage, store: str | None = None, begun: TeacherFeatures | None = None
) -> str:
    """The command that makes the features of a stage, or finishes those `begun`, in their dtypes."""
    words = ["--teacher", f"{TEACHER}={recipe.model.encoder}", "--geometry", recipe.base_geometry(stage)]
    if recipe.model.select_layer != USUAL_LAYER:
        words += ["--recipe", layer_recipe(recipe.model.select_layer)]
    if recipe.data.encoder_features_key is not None:
        words += ["--as", recipe.data.encoder_features_key]
    if begun is not None:
        computed = begun.card.get("compute_dtype", "float32")
        words += ["--dtype", begun.layout.dtype] if begun.layout.dtype != "float16" else []
        words += ["--compute-dtype", computed] if computed != "float32" else []
    words += ["--data", *recipe.files, "--images", *recipe.image_roots]
    words += ["--store", store or recipe.data.encoder_features]
    return shlex.join(["olavlm-extract", *map(redacted, words)])
