"""`olavlm-probe score`: features decoded by their teacher's own decoder, scored on a public benchmark.

    olavlm-probe score --task da2k --annotations DA-2K/annotations.json --dataset da2k.json    (what to extract)
    olavlm-extract --teacher depth --recipe last --data da2k.json --images DA-2K --store features
    olavlm-probe score --task da2k --source features --annotations DA-2K/annotations.json --images DA-2K --output s.json

Features are those of a store, the targets themselves, which are the upper bound; or what the probes of a run of
`olavlm-probe train` predict of the images (`--source RUN`, without an extraction). A model's score is the mean over
its layers, as in table 8 of arXiv 2412.09585.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olavlm.cache import BadImage, ImageRoots
from olavlm.cache.wording import counted
from olavlm.pipelines.cli import JobFailed, Progress, UsageError, add_device_argument, positive, versions

from .da2k import TURNS, Da2kScore, read_pairs
from .miou import MiouScore, PanopticImage, PanopticLabels, match_classes
from .sources import FeatureSource, StoreSource

if TYPE_CHECKING:
    from PIL import Image

    from olavlm.teachers.decoders import Decoder

PROBES = "probes.json"
"""What tells a run of probes from a store."""
TEACHER_OF = {"da2k": "depth", "miou": "seg", "fid": "gen"}
COUNTED = {"da2k": "pairs", "miou": "images", "fid": "pictures"}
"""What a task's result counts."""


class Unscored(Exception):
    """An image that cannot be scored, and why; the others are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    p = parser
    p.add_argument("--task", required=True, choices=(*TEACHER_OF, "fid-reference"),
                   help="da2k: depth order of points; miou: COCO's classes; fid: pictures drawn of image embeddings; "
                   "fid-reference: make the pictures that fid compares with")  # fmt: skip
    p.add_argument("--source", metavar="STORE|RUN", help="store of targets, or run folder of olavlm-probe train")
    p.add_argument("--key", help="key of the store; by default the one with the teacher's features")
    p.add_argument("--model", help="checkpoint with the decoder, hub id or folder (default: the features' own)")
    p.add_argument("--probed-model", metavar="RUN", help="where the model that probes read lies now, if it has moved")
    p.add_argument("--images", nargs="+", action="extend", metavar="[PREFIX=]DIR|ZIP|URL", default=[],
                   help="image roots")  # fmt: skip
    p.add_argument("--prefix", default="", metavar="PATH/",
                   help="what images are called in the source ahead of the name in the annotations")  # fmt: skip
    p.add_argument("--annotations", metavar="FILE",
                   help="DA-2K's annotations.json; COCO's panoptic_val2017.json; for fid any file of COCO's whose "
                   "images are meant (default: all below --images)")  # fmt: skip
    p.add_argument("--panoptic", metavar="DIR", help="miou: folder of the PNGs (default: beside the annotations, named "
                   "as they are)")  # fmt: skip
    p.add_argument("--context", choices=("shrunk", "full", "zero"), default="shrunk",
                   help="miou: what the decoder sees of the photograph beside the features: its first three stages in "
                   "the last one's size, as the paper's code has it, or as they are, or nothing")  # fmt: skip
    p.add_argument(
        "--pictures",
        metavar="DIR",
        help="fid: where pictures are drawn to; those there are not drawn again, and count "
        "if their images are asked for",
    )
    p.add_argument("--reference", metavar="DIR|FILE.npz", help="fid: pictures of fid-reference, or their statistics")
    p.add_argument("--inception", metavar="FILE.pth", help="fid: the network's weights, a file here")
    p.add_argument("--whole", action="store_true",
                   help="fid-reference: squash the whole photograph instead of its centre square")  # fmt: skip
    p.add_argument("--dataset", metavar="FILE.json",
                   help="write the annotated images as a dataset for olavlm-extract, and stop")  # fmt: skip
    p.add_argument("--output", metavar="FILE.json", help="scores with all that they follow from; for fid-reference DIR")
    p.add_argument("--limit", type=positive, metavar="N", help="the first N images")
    p.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images a forward (%(default)s)")
    add_device_argument(p)


def open_source(args: argparse.Namespace, teacher: str) -> FeatureSource:
    """The store, or the run of probes, that `--source` names."""
    if not Path(args.source, PROBES).is_file():
        return StoreSource(args.source, teacher, args.key)
    from .probe_source import ProbeSource

    asked = {"turns": TURNS} if args.task == "da2k" else {}
    asked["model_path"] = args.probed_model
    return ProbeSource(Path(args.source), teacher, ImageRoots(args.images), _device(args), args.key, **asked)


def run(args: argparse.Namespace) -> int:
    """Score, print, and write `--output`; 1 if images had to be left out.

    Raises:
        UsageError: flags that the task needs are missing.
        JobFailed, CacheError, TeacherError, OSError: what the user can mend; that nothing could be scored, too.
    """
    if args.task == "fid-reference":
        _need(args, "images", "output")
        return make_reference(args)
    if args.dataset:
        _need(args, "annotations")
        return write_dataset(args)
    _need(args, "source", "images", *({"fid": ("pictures",)}.get(args.task, ("annotations",))))
    if args.inception and not args.reference:
        raise UsageError("--inception alone compares nothing; name --reference, pictures or their statistics")
    return {"da2k": score_da2k, "miou": score_miou, "fid": score_fid}[args.task](args)


def _need(args: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name}" for name in names if not getattr(args, name)]
    if missing:
        raise UsageError(f"--task {args.task} needs {', '.join(missing)}")


def score_da2k(args: argparse.Namespace) -> int:
    """Depth: which of two points is closer (DA-2K)."""
    pairs = read_pairs(args.annotations)
    source, decoder = _open(args)
    scores = {layer: Da2kScore() for layer in source.layers}

    def add(layer: str, image: str, depth: np.ndarray, photograph: Image.Image) -> None:
        scores[layer].add(image, depth, pairs[image], (photograph.height, photograph.width))

    left_out = _each_map(args, source, decoder, list(pairs), add)
    return _finish(args, source, decoder, {n: s.result() for n, s in scores.items()}, "accuracy", left_out)


def score_miou(args: argparse.Namespace) -> int:
    """Segmentation: mean intersection over union (COCO panoptic)."""
    annotations = Path(args.annotations)
    labels = PanopticLabels.read(annotations, args.panoptic or annotations.with_suffix(""))
    images: dict[str, PanopticImage] = {image.file_name: image for image in labels.images}
    source, decoder = _open(args, context=args.context)
    numbers = match_classes(decoder.classes, labels.names)
    scores = {layer: MiouScore(labels.names) for layer in source.layers}

    def add(layer: str, image: str, classes: np.ndarray, photograph: Image.Image) -> None:
        truth = labels.semantic(images[image])
        if truth.shape != classes.shape:
            raise Unscored(f"{image}: {classes.shape} pixels, and its annotation has {truth.shape}")
        scores[layer].add(truth, numbers[classes])

    left_out = _each_map(args, source, decoder, list(images), add)
    results = {name: score.result() for name, score in scores.items()}
    return _finish(args, source, decoder, results, "miou", left_out, context=args.context)


def score_fid(args: argparse.Namespace) -> int:
    """Generation: distance of drawn pictures from photographs (FID)."""
    from PIL import Image as Pictures

    from .fid import Inception, compared_size, frechet_distance, statistics_of, statistics_of_pictures

    source, decoder = _open(args)
    folders = {layer: Path(args.pictures, layer.replace(" ", "-")) for layer in source.layers}
    drawn_of = {"card": source.card["fingerprint"], "source": source.name, "decoder": decoder.weights_sha256}
    for folder in folders.values():
        _same_origin(folder, drawn_of)
    roots, images = ImageRoots(args.images), _photographs(args)

    def add(layer: str, image: str, pixels: np.ndarray, photograph: Image.Image) -> None:
        _save_picture(compared_size(Pictures.fromarray(pixels)), _picture_file(folders[layer], image))

    todo = [i for i in images if not all(_picture_file(folder, i).is_file() for folder in folders.values())]
    left_out = _each_map(args, source, decoder, todo, add, roots)
    drawn = {layer: _those_there(folder, images) for layer, folder in folders.items()}
    _refuse_nothing(sum(map(len, drawn.values())), left_out)
    results: dict[str, dict[str, Any]] = {}
    if args.reference:
        network = Inception(args.inception, _device(args)) if args.inception else None
        mu, sigma, count = statistics_of(args.reference, network)
        for layer, files in drawn.items():
            own_mu, own_sigma, own_count = statistics_of_pictures(files, network)
            distance = frechet_distance(own_mu, own_sigma, mu, sigma)
            results[layer] = {"fid": distance, "pictures": own_count, "reference_pictures": count}
    else:
        results = {layer: {"fid": None, "pictures": len(files)} for layer, files in drawn.items()}
        print("no --reference: pictures were drawn, and no distance was computed")
    return _finish(args, source, decoder, results, "fid", left_out)


def _open(args: argparse.Namespace, **options: Any) -> tuple[FeatureSource, Decoder]:
    """The source and the decoder of the same checkpoint."""
    from olavlm.teachers.decoders import load_decoder

    teacher = TEACHER_OF[args.task]
    source = open_source(args, teacher)
    card = source.card
    if args.task != "fid" and card["geometry"] != "reference":
        raise JobFailed(f"{source.name}: its teacher saw the frame {card['geometry']!r}, whose pixels are not the "
                        "photograph's; score features of the geometry reference")  # fmt: skip
    if teacher == "seg":
        options["recipe"] = card["recipe"]["name"]
    model = args.model or card["model"]
    revision = None if args.model else card.get("revision")
    decoder = load_decoder(teacher, model=model, revision=revision, device=args.device, **options)
    if decoder.weights_sha256 != card["weights_sha256"]:
        raise JobFailed(f"{model} did not make {source.name}, but {card['model']} as it was then; name that by --model")
    return source, decoder


def _each_map(
    args: argparse.Namespace,
    source: FeatureSource,
    decoder: Decoder,
    images: Sequence[str],
    add: Callable[[str, str, np.ndarray, Image.Image], None],
    roots: ImageRoots | None = None,
) -> list[str]:
    """Call `add(layer, image, map, photograph)` for each; returns why images were left out."""
    roots = roots or ImageRoots(args.images)
    images, left_out = list(images)[: args.limit], []
    progress = Progress(len(images), "images", args.task)
    for batch in _batches(images, args.batch_size):
        features, valid = source.read([args.prefix + image for image in batch])
        photographs = {}
        for row, image in enumerate(batch):
            if not valid[row]:
                left_out.append(f"{image}: no features")
                continue
            try:
                photographs[row] = roots.open(args.prefix + image)
            except BadImage as e:
                left_out.append(f"{image}: {e}")
        rows = list(photographs)
        for layer in source.layers if rows else ():
            maps = decoder.decode(features[layer][rows], list(photographs.values()))
            for row, decoded in zip(rows, maps, strict=True):
                try:
                    add(layer, batch[row], decoded, photographs[row])
                except Unscored as e:
                    left_out.append(str(e))
        progress.update(len(batch))
    progress.close()
    return left_out


def _batches(images: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(images), size):
        yield images[first : first + size]


def _finish(
    args: argparse.Namespace,
    source: FeatureSource,
    decoder: Decoder,
    results: dict[str, dict[str, Any]],
    metric: str,
    left_out: list[str],
    **conditions: Any,
) -> int:
    _refuse_nothing(sum(result[COUNTED[args.task]] for result in results.values()), left_out)
    values = [result[metric] for result in results.values() if result[metric] is not None]
    mean = statistics.fmean(values) if values else None
    for layer, result in results.items():
        if result[metric] is not None:
            print(f"{layer:<12} {metric} {result[metric]:.4f}")
    if len(results) > 1 and mean is not None:
        print(f"{'mean':<12} {metric} {mean:.4f} over {counted(len(values), 'layer')}")
    for line in left_out:
        print(f"left out: {line}")
    if args.output:
        content = {
            "task": args.task,
            "metric": metric,
            "mean": mean,
            "layers": results,
            "source": source.name,
            "card": dict(source.card),
            "decoder": {"name": decoder.name, "weights_sha256": decoder.weights_sha256, **conditions},
            "left_out": left_out,
            "limit": args.limit,
            "versions": versions(),
        }
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 1 if left_out else 0


def _refuse_nothing(scored: int, left_out: list[str]) -> None:
    """JobFailed where there is nothing to take a mean of."""
    if not scored:
        why = f"{left_out[0]} ({len(left_out)} left out in all)" if left_out else "no image counts"
        raise JobFailed(f"nothing was scored: {why}; check --annotations, --images and --prefix")


def make_reference(args: argparse.Namespace) -> int:
    """Photographs below the roots, or those of `--annotations`, as 256 x 256 pictures in the folder `--output`.

    With `--inception` their statistics, too, beside it: so that they need not be computed for each score. Pictures that
    lie there already, of other images, are not of them.
    """
    from .fid import Inception, compared_size, save_statistics, statistics_of_pictures

    roots, made, left_out = ImageRoots(args.images), [], []
    images = _photographs(args)
    progress = Progress(len(images), "images", args.task)
    for image in images:
        try:
            picture = compared_size(roots.open(args.prefix + image), square=not args.whole)
        except BadImage as e:
            left_out.append(str(e))
        else:
            made.append(_picture_file(Path(args.output), image))
            _save_picture(picture, made[-1])
        progress.update(1)
    progress.close()
    print(f"{args.output}: {counted(len(made), 'picture')}")
    if args.inception:
        mu, sigma, _ = statistics_of_pictures(made, Inception(args.inception, _device(args)))
        save_statistics(f"{args.output}.npz", mu, sigma)
        print(f"{args.output}.npz: their statistics")
    for line in left_out:
        print(f"left out: {line}")
    return 1 if left_out else 0


def _photographs(args: argparse.Namespace) -> list[str]:
    """Image names: of `--annotations`, or of the one folder `--images`."""
    if args.annotations:
        return _annotated(args)[: args.limit]
    from .fid import pictures_in

    folder = Path(args.images[0])
    if len(args.images) > 1 or not folder.is_dir():
        raise UsageError("without --annotations, whose images are meant, --images is one folder")
    return [str(f.relative_to(folder)) for f in pictures_in(folder)][: args.limit]


def _annotated(args: argparse.Namespace) -> list[str]:
    if args.task == "da2k":
        return list(read_pairs(args.annotations))
    if args.task == "miou":
        return [image.file_name for image in PanopticLabels.read(args.annotations, "").images]
    try:
        return [
            image["file_name"] for image in json.loads(Path(args.annotations).read_text(encoding="utf-8"))["images"]
        ]
    except (ValueError, KeyError, TypeError) as e:
        raise JobFailed(f"{args.annotations}: no images with file_name ({e!r}); give a file of COCO's form") from e


def write_dataset(args: argparse.Namespace) -> int:
    """The annotated images as a LLaVA file, with the prompt that the public code asks."""
    samples = [{"id": i, "image": args.prefix + i, "conversations": TURNS} for i in _annotated(args)[: args.limit]]
    Path(args.dataset).write_text(json.dumps(samples), encoding="utf-8")
    print(f"{args.dataset}: {counted(len(samples), 'image')}")
    return 0


def _picture_file(folder: Path, image: str) -> Path:
    """Where an image's picture goes: its whole path, so that equal basenames do not collide."""
    file = folder / f"{image}.png"
    if not file.resolve().is_relative_to(folder.resolve()):
        raise JobFailed(f"{image}: an image path is relative, without '..'")
    return file


def _save_picture(picture: Image.Image, file: Path) -> None:
    """As a PNG, which appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    private = file.with_suffix(".part")
    picture.save(private, "png")
    private.replace(file)


def _those_there(folder: Path, images: Sequence[str]) -> list[Path]:
    """The pictures of these images: an earlier run may have left those of others."""
    return [file for image in images if (file := _picture_file(folder, image)).is_file()]


def _same_origin(folder: Path, drawn_of: dict[str, str]) -> None:
    """Note in a new folder what its pictures are drawn of; JobFailed if it holds those of something else."""
    note = folder / "drawn-of.json"
    if note.is_file():
        if json.loads(note.read_text(encoding="utf-8")) != drawn_of:
            raise JobFailed(f"{folder} holds pictures of other features ({note.name} says which); name another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise JobFailed(f"{folder} is not empty, and no {note.name} says what it holds; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(drawn_of), encoding="utf-8")


def _device(args: argparse.Namespace) -> Any:
    from olavlm.teachers.base import resolve_device

    return resolve_device(args.device)
