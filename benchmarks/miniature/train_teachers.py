"""The teachers and the base encoder learn the world's truth and are saved as checkpoints, in float16.

Each function trains one model from random weights, saves it into a folder, loads it from there and gives its scores on
held-out pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessor

from olavlm.teachers import load_teacher
from olavlm.teachers.checkpoint import WEIGHTS, Checkpoint, quiet
from olavlm.teachers.decoders import load_decoder
from olavlm.teachers.decoders.seg import task_tokens
from olavlm.teachers.geometry import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from olavlm.teachers.tiny_clip_tokenizer import clip_tokenizer

from . import architectures
from .architectures import DEPTH_SIDE, SEG_SIDE
from .fitting import fit
from .lessons import CLASSES, GRID, THIRDS, Lessons, objects_alone
from .pixels import mirrored, pixels
from .plan import KINDS
from .scales import at_unit_scale, standardize_depth, standardize_seg
from .scenes import SIDE
from .write import TEACHING

if TYPE_CHECKING:
    from .models import Effort

Scores = dict[str, float]
OBJECT_WEIGHT = 3.0
"""Of an object's pixels beside the background's, in the losses of maps."""
_SCORED = 16
_PIECES = 8
"""That the base encoder sees for each full picture."""
_STANDARD = 64
"""Pictures by which features are moved and scaled."""


def train_depth(folder: Path, taught: Lessons, held_out: Lessons, effort: Effort, seed: int, device: str) -> Scores:
    """Depth-Anything-V2 on maps of closeness.

    Its backbone learns by a linear head on the mean of the layers that the decoder reads, which is dropped: that mean
    is what is distilled (`mean4`). Its decoder is there in a share of the batches, and in half of these is given the
    mean for each of its layers, as features that stand for all of them are decoded.
    """
    model = architectures.depth_anything().to(device).train()
    cells = SIDE // GRID // 2  # of the linear head in a token, of 2 x 2 pixels each
    head = nn.Linear(model.config.reassemble_hidden_size, cells**2).to(device)

    def loss(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        rgb, closeness, classes = mirrored(rng, taught.rgb[rows], taught.closeness[rows], taught.classes[rows])
        layers = _depth_layers(model, rgb, device)
        mean = torch.stack(layers).mean(0)
        truth = torch.from_numpy(closeness.astype(np.float32)).to(device)
        weight = torch.from_numpy(np.where(classes < len(KINDS), np.float32(OBJECT_WEIGHT), np.float32(1))).to(device)
        total = _apart(_cells(head, mean[:, 1:], 1)[:, 0], truth[:, ::2, ::2], weight[:, ::2, ::2])
        if rng.random() < effort.decoder_share:
            given = [mean] * len(layers) if rng.random() < 0.5 else layers
            total = total + _apart(_depth_map(model, given, cut=False), truth, weight)
        return total

    fit("depth", (model, head), loss, samples=len(taught), seed=seed, **effort.fit)
    standardize_depth(model, pixels(taught.rgb[:_STANDARD], DEPTH_SIDE, IMAGENET_MEAN, IMAGENET_STD, device))
    _save(model, folder)
    from transformers import DepthAnythingForDepthEstimation

    with quiet():
        model = DepthAnythingForDepthEstimation.from_pretrained(folder, dtype="float32").to(device).eval()
    with torch.no_grad():
        own, mean = [], []
        for rows in _batches(held_out):
            layers = _depth_layers(model, held_out.rgb[rows], device)
            own.append(_depth_map(model, layers).cpu().numpy())
            mean.append(_depth_map(model, [torch.stack(layers).mean(0)] * len(layers)).cpu().numpy())
    return _depth_scores(np.concatenate(own), held_out, "") | _depth_scores(np.concatenate(mean), held_out, " by mean4")


def _apart(said: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ((said - truth).abs() * weight).sum() / weight.sum()


def _cells(head: nn.Linear, tokens: torch.Tensor, channels: int) -> torch.Tensor:
    """What a linear head says of [B, GRID * GRID, width]: maps [B, channels, side, side], each token a square of it."""
    said = head(tokens)
    inner = int((said.shape[-1] // channels) ** 0.5)
    said = said.view(len(tokens), GRID, GRID, channels, inner, inner).permute(0, 3, 1, 4, 2, 5)
    return said.reshape(len(tokens), channels, GRID * inner, GRID * inner)


def _depth_layers(model: nn.Module, rgb: np.ndarray, device: str) -> list[torch.Tensor]:
    maps = model.backbone(pixels(rgb, DEPTH_SIDE, IMAGENET_MEAN, IMAGENET_STD, device)).feature_maps
    return list(maps)


def _depth_map(model: nn.Module, layers: list[torch.Tensor], *, cut: bool = True) -> torch.Tensor:
    """At the picture's own size, where the model itself would draw `DEPTH_SIDE` pixels: the same layers, less work.

    Args:
        cut: whether what is below 0 becomes 0, as in the model, where it would never learn to rise again.
    """
    head = model.head
    own = head.patch_size, head.activation2
    head.patch_size, head.activation2 = SIDE // GRID, own[1] if cut else nn.Identity()
    try:
        return head(model.neck(layers, GRID, GRID), GRID, GRID)
    finally:
        head.patch_size, head.activation2 = own


def _depth_scores(said: np.ndarray, held_out: Lessons, of: str) -> Scores:
    truth, on = held_out.closeness.astype(np.float32), held_out.classes < len(KINDS)
    right = []
    for row, question in enumerate(held_out.depth_questions):
        closeness = [np.median(said[row][held_out.objects[row] == i]) for i in question.about]
        right.append((closeness[0] <= closeness[1]) == question.letter)
    relative = np.abs(said[on] - truth[on]) / truth[on]
    return {f"relative error on objects{of}": float(relative.mean()), f"depth questions{of}": float(np.mean(right))}


def train_seg(folder: Path, taught: Lessons, held_out: Lessons, effort: Effort, seed: int, device: str) -> Scores:
    """OneFormer on maps of classes.

    Its backbone learns by a linear head, which is dropped, on the last stage, which is what is distilled. Its decoders
    are there in a share of the batches, given all stages at their own sizes or shrunk to the last one's, as predictions
    are decoded. There are as many queries as classes, and each is to find its own: whether it is shown, and where. They
    take longer to learn than the backbone, and go on without it.
    """
    model = architectures.oneformer().to(device).train()
    cells = 4  # of the linear head in a token, in each direction
    head = nn.Linear(model.pixel_level_module.encoder.channels[-1], cells**2 * len(CLASSES)).to(device)
    task = task_tokens(_tokenizer_folder(folder), model.config.task_seq_len).to(device)
    weight = torch.ones(len(CLASSES), device=device)
    weight[: len(KINDS)] = OBJECT_WEIGHT

    def pictures(rows: np.ndarray, rng: np.random.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
        rgb, classes = mirrored(rng, taught.rgb[rows], taught.classes[rows])
        return _stages(model, rgb, device), torch.from_numpy(classes.astype(np.int64)).to(device)

    def found(stages: list[torch.Tensor], truth: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if rng.random() < 0.5:
            shape = stages[-1].shape[-2:]
            stages = [F.interpolate(s, shape, mode="bilinear", align_corners=False) for s in stages]
        return _found_by_queries(*_decoded(model, stages, task), truth)

    def loss(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        stages, truth = pictures(rows, rng)
        coarse = truth[:, 1 :: SIDE // GRID // cells, 1 :: SIDE // GRID // cells]
        total = F.cross_entropy(_cells(head, stages[-1].flatten(2).transpose(1, 2), len(CLASSES)), coarse, weight)
        if rng.random() < effort.decoder_share:
            total = total + found(stages, truth, rng)
        return total

    def decoders(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return found(*pictures(rows, rng), rng)

    fit("seg", (model, head), loss, samples=len(taught), seed=seed, **effort.fit)
    model.pixel_level_module.encoder.requires_grad_(False)
    alone = effort.fit | {"steps": effort.decoder_steps}
    fit("seg's decoders", (model,), decoders, samples=len(taught), seed=seed, **alone)
    model.eval()
    with torch.no_grad():
        said = [
            _cells(head, _stages(model, held_out.rgb[rows], device)[-1].flatten(2).transpose(1, 2), len(CLASSES))
            for rows in _batches(held_out)
        ]
    step = SIDE // GRID // cells
    linear = _class_scores_of(torch.cat(said).argmax(1).cpu().numpy(), held_out.classes[:, 1::step, 1::step])
    standardize_seg(model, pixels(taught.rgb[:_STANDARD], SEG_SIDE, IMAGENET_MEAN, IMAGENET_STD, device))
    _save_oneformer(model, folder)
    scores = {f"linear head, {name}": value for name, value in linear.items()}
    for context in ("full", "shrunk"):
        decoder = load_decoder("seg", model=str(folder), device=device, recipe="stage4-768", context=context)
        images = [Image.fromarray(rgb.transpose(1, 2, 0)) for rgb in held_out.rgb[: effort.decoded]]
        features = load_teacher("seg", model=str(folder), device=device, recipe="stage4-768").encode(images)
        decoded = _class_scores_of(np.stack(decoder.decode(features, images)), held_out.classes[: effort.decoded])
        scores |= {f"decoder, {context} stages, {name}": value for name, value in decoded.items()}
    return scores


def _stages(model: nn.Module, rgb: np.ndarray, device: str) -> list[torch.Tensor]:
    x = pixels(rgb, SEG_SIDE, IMAGENET_MEAN, IMAGENET_STD, device)
    return list(model.pixel_level_module.encoder(x).feature_maps)


def _decoded(model: nn.Module, stages: list[torch.Tensor], task: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last layer's queries: classes [B, Q, classes + 1] and masks [B, Q, side, side]."""
    decoded = model.pixel_level_module.decoder(stages, output_hidden_states=False)
    output = model.transformer_module(
        multi_scale_features=decoded.multi_scale_features,
        mask_features=decoded.mask_features,
        task_token=model.task_encoder(task).expand(len(stages[0]), -1),
    )
    return output.prediction_class, output.prediction_masks


def _found_by_queries(classes: torch.Tensor, masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of query q for class q: that it says so where the class is shown and else that it found nothing, its pixels, and
    their overlap with the class's (the Dice loss)."""
    asked = F.one_hot(truth, len(CLASSES)).permute(0, 3, 1, 2)  # [B, Q, side, side]
    shown = asked.flatten(2).any(-1)  # [B, Q]
    query = torch.arange(len(CLASSES), device=truth.device)
    said = F.cross_entropy(classes.flatten(0, 1), torch.where(shown, query, len(CLASSES)).flatten())
    masks = F.interpolate(masks[shown][:, None], truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    asked = asked[shown].float()
    sure = masks.sigmoid()
    overlap = (2 * (sure * asked).sum((1, 2)) + 1) / (sure.sum((1, 2)) + asked.sum((1, 2)) + 1)
    return said + 5 * F.binary_cross_entropy_with_logits(masks, asked) + (1 - overlap).mean()


def _class_scores_of(said: np.ndarray, truth: np.ndarray) -> Scores:
    """Share of right pixels, and the mean over classes of intersection over union."""
    unions = [((said == c) | (truth == c)).sum() for c in range(len(CLASSES))]
    shared = [((said == c) & (truth == c)).sum() for c in range(len(CLASSES))]
    ious = [s / u for s, u in zip(shared, unions, strict=True) if u]
    return {"pixels right": float((said == truth).mean()), "mean IoU": float(np.mean(ious))}


def train_gen(folder: Path, taught: Lessons, held_out: Lessons, effort: Effort, seed: int, device: str) -> Scores:
    """A CLIP image encoder with projection, against captions: each name in its third of the picture, embedded.

    The captions' side is dropped.
    """
    model = architectures.clip_projected().to(device).train()
    words = 1 + len(KINDS) * THIRDS
    named = nn.EmbeddingBag(words, model.config.projection_dim, mode="sum", padding_idx=0).to(device)
    scale = nn.Parameter(torch.tensor(2.0, device=device))

    def embeddings(lessons: Lessons, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        seen = model(pixels(lessons.rgb[rows], SIDE, CLIP_MEAN, CLIP_STD, device)).image_embeds
        said = named(torch.from_numpy(lessons.said[rows]).to(device))
        return F.normalize(seen, dim=-1), F.normalize(said, dim=-1)

    def loss(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        seen, said = embeddings(taught, rows)
        logits, truth = scale.exp().clamp(max=100) * seen @ said.T, torch.arange(len(rows), device=device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    fit("gen", (model, named, nn.ParameterList([scale])), loss, samples=len(taught), seed=seed, **effort.fit)
    _save(model.eval(), folder)
    with torch.no_grad():
        seen, said = (
            torch.cat(part) for part in zip(*(embeddings(held_out, r) for r in _batches(held_out)), strict=True)
        )
    first = (seen @ said.T).argmax(1).cpu().numpy() == np.arange(len(held_out))
    return {f"captions found among {len(held_out)}": float(first.mean())}


def train_encoder(folder: Path, taught: Lessons, held_out: Lessons, effort: Effort, seed: int, device: str) -> Scores:
    """A CLIP vision tower that learns which kinds of objects are in a picture, and is told nothing of where or how far.

    Beside full pictures it sees pieces of others that show one object, as many of those do that real encoders learn
    from: what a cone looks like is hard to tell from the names of all objects in a picture. A kind's score is the log
    of the sum over patches of the exponentials of a linear head's, which is dropped: the sum of a score for its colour,
    one for its shape and one of its own.
    """
    model = architectures.base_encoder().to(device).train()
    alone = objects_alone(seed, TEACHING, len(taught))
    words = sorted({word for kind in KINDS for word in kind.split()})
    head = nn.Linear(model.config.hidden_size, len(KINDS) + len(words)).to(device)
    nn.init.constant_(head.bias, -5.0 / 3)  # 64 patches, most of them without an object
    of_words = torch.tensor([[float(word in kind.split()) for kind in KINDS] for word in words])
    sums = torch.cat([torch.eye(len(KINDS)), of_words]).to(device)

    def embedded(rgb: np.ndarray) -> torch.Tensor:
        return model.pre_layrnorm(model.embeddings(pixels(rgb, SIDE, CLIP_MEAN, CLIP_STD, device)))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        states = model.encoder(tokens).last_hidden_state[:, 1:]
        return (head(F.layer_norm(states, states.shape[-1:])) @ sums).logsumexp(dim=1)

    def loss(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        (rgb,) = mirrored(rng, taught.rgb[rows])
        full = F.binary_cross_entropy_with_logits(logits(embedded(rgb)), truth(taught.present[rows]))
        rows = rng.integers(len(alone.rgb), size=_PIECES * len(rows))
        places = torch.from_numpy(alone.patches[rows]).to(device)
        tokens = embedded(alone.rgb[rows])
        tokens = torch.cat([tokens[:, :1], tokens[torch.arange(len(rows))[:, None], 1 + places]], dim=1)
        return full + F.binary_cross_entropy_with_logits(logits(tokens), truth(alone.present[rows]))

    def truth(present: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(present.astype(np.float32)).to(device)

    fit("encoder", (model, head), loss, samples=len(taught), seed=seed, **effort.fit)
    at_unit_scale(model, pixels(taught.rgb[:_SCORED], SIDE, CLIP_MEAN, CLIP_STD, device))
    _save(model.eval(), folder)
    with torch.no_grad():
        said = torch.cat([logits(embedded(held_out.rgb[rows])) for rows in _batches(held_out)]).cpu().numpy() > 0
    both = (said & held_out.present).sum()
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    return {
        "precision of kinds": float(both / max(1, said.sum())),
        "recall of kinds": float(both / held_out.present.sum()),
    }


def _batches(held_out: Lessons) -> list[np.ndarray]:
    return np.array_split(np.arange(len(held_out)), -(-len(held_out) // _SCORED))


def _save(model: nn.Module, folder: Path) -> None:
    """In float16, which every loader widens."""
    with quiet():
        model.eval().cpu().half().save_pretrained(folder)
    model.float()


def _tokenizer_folder(folder: Path) -> Checkpoint:
    clip_tokenizer().save_pretrained(folder)
    return Checkpoint(str(folder), folder, {}, (), None)


def _save_oneformer(model: nn.Module, folder: Path) -> None:
    """As the published checkpoint is: a OneFormerForUniversalSegmentation, which calls this model `model`, and a
    processor that leaves 768 pixels as they are."""
    _save(model, folder)
    weights = load_file(folder / WEIGHTS)
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["OneFormerForUniversalSegmentation"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = {
        "do_resize": True,
        "size": {"height": SEG_SIDE, "width": SEG_SIDE},
        "resample": int(Image.Resampling.BILINEAR),
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


TRAINERS = {"depth": train_depth, "seg": train_seg, "gen": train_gen, "encoder": train_encoder}
