"""A world on disk in the formats of real data.

DIR/images/train/000000.jpg ...     DIR/pt.json, DIR/ift.json       LLaVA's format, one sample a picture each
DIR/images/held_out/ ...            DIR/held_out.json               captions of pictures that nothing is trained on
DIR/cv_bench/test_2d.parquet, test_3d.parquet                       questions about them, in CV-Bench's format
DIR/truth.npz                                                       their depth and objects
DIR/world.json                                                      what the world was made by; written last
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from olavlm.cache import files

from .dialogues import LETTER, NAMED, WORDS, turn
from .plan import BLOCK, KINDS, MOST
from .questions import TASKS
from .text import CAPTION_PROMPT, caption, letter, prompt
from .world import Picture, stream

VERSION = 2
HELD_OUT = 100_000_000
"""Index of the first held-out picture; those of teachers begin at `TEACHING`. A world's train pictures begin at 0."""
TEACHING, TOLD = 200_000_000, 300_000_000
FORMS = (LETTER, LETTER, WORDS, NAMED)
"""Of answers in dialogues about pictures, each as likely: by letters alone, as CV-Bench asks, a model learns to look at
a picture far later than from names."""
_SOURCES = {"Count": ("ADE20K", "COCO"), "Relation": ("ADE20K", "COCO"), "Depth": ("Omni3D",), "Distance": ("Omni3D",)}


@dataclass(frozen=True)
class WorldSettings:
    """Everything a world on disk follows from."""

    scenes: int
    held_out: int
    seed: int
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("scenes", "held_out"):
            if not 0 < getattr(self, name) < HELD_OUT or getattr(self, name) % BLOCK:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: takes multiples of {BLOCK}, in which answers "
                    "are balanced"
                )


def write_world(folder: Path, settings: WorldSettings, processes: int | None = None) -> bool:
    """Write the world; False if the folder holds it already.

    A folder of other settings is refused; an unfinished one is written anew.

    Raises:
        ValueError: another world is there.
    """
    record = folder / "world.json"
    if record.is_file():
        if (there := json.loads(record.read_text())["settings"]) != asdict(settings):
            raise ValueError(f"{folder}: holds the world {there}, not {asdict(settings)}; name another folder")
        return False
    train = stream(settings.seed, 0, settings.scenes, processes)
    samples = [_samples(p, _save(p, folder, "train")) for p in train]
    held_out = list(stream(settings.seed, HELD_OUT, settings.held_out, processes))
    _json(folder / "pt.json", [pt for pt, _ in samples])
    _json(folder / "ift.json", [ift for _, ift in samples])
    _json(folder / "held_out.json", [_samples(p, _save(p, folder, "held_out"))[0] for p in held_out])
    _write_cv_bench(folder / "cv_bench", held_out)
    np.savez_compressed(
        folder / "truth.npz",
        depth=np.stack([p.depth for p in held_out]).astype(np.float32),
        objects=np.stack([p.objects for p in held_out]),
        kinds=np.array([(*p.kinds, *[-1] * (MOST - len(p.kinds))) for p in held_out]),
    )
    _json(record, {"settings": asdict(settings), "kinds": KINDS})
    return True


def turns(picture: Picture) -> list[dict[str, str]]:
    """A dialogue of its questions. Counting comes first: the objects that other questions name would help to count."""
    first, *others = picture.questions
    rng = np.random.default_rng([picture.index, len(KINDS)])
    said = []
    for question in (first, *(others[i] for i in rng.permutation(len(others)))):
        asked, answered, _ = turn(question, FORMS[rng.integers(len(FORMS))])
        said += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return said


def _samples(picture: Picture, name: str) -> tuple[dict, dict]:
    told = [
        {"from": "human", "value": f"<image>\n{CAPTION_PROMPT}"},
        {"from": "gpt", "value": caption(picture.facts)},
    ]
    identity = name.rpartition(".")[0].replace("/", "_")
    return (
        {"id": f"{identity}_pt", "image": name, "conversations": told},
        {"id": f"{identity}_ift", "image": name, "conversations": turns(picture)},
    )


def _save(picture: Picture, folder: Path, part: str) -> str:
    """The picture's name below images/."""
    start = {"train": 0, "held_out": HELD_OUT}[part]
    file = folder / "images" / part / f"{picture.index - start:06d}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_jpeg(picture))
    return f"{part}/{file.name}"


def _jpeg(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.rgb).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _json(file: Path, content: object) -> None:
    files.replace(file, (json.dumps(content, indent=1) + "\n").encode())


def _write_cv_bench(folder: Path, held_out: Sequence[Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("2D", TASKS[:2]), ("3D", TASKS[2:])):
        rows = list(cv_bench_rows(held_out, name, tasks))
        pq.write_table(pa.Table.from_pylist(rows, schema=CV_BENCH), folder / f"test_{name.lower()}.parquet")


CV_BENCH = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("filename", pa.string()),
        ("source", pa.string()),
        ("source_dataset", pa.string()),
        ("source_filename", pa.string()),
        ("target_class", pa.string()),
        ("target_size", pa.list_(pa.int64())),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
    ]
)
"""The columns of nyu-visionx/CV-Bench. No protocol reads the last three, of which the types are our guess."""


def cv_bench_rows(held_out: Sequence[Picture], kind: str, tasks: Sequence[str]) -> Iterator[dict]:
    """Rows of one of its two files. Of a 2D task, the pictures take turns in being of the two sources."""
    start = 0 if kind == "2D" else len(held_out) * 2
    index = start
    for task in tasks:
        for number, picture in enumerate(held_out):
            question = picture.questions[TASKS.index(task)]
            source = _SOURCES[task][number % len(_SOURCES[task])]
            name = f"{picture.index - HELD_OUT:06d}.jpg"
            yield {
                "idx": index,
                "type": kind,
                "task": task,
                "image": {"bytes": _jpeg(picture), "path": name},
                "question": question.text,
                "choices": list(question.options),
                "answer": letter(question.letter),
                "prompt": prompt(question),
                "filename": f"img/{kind}/{task.lower()}/{name}",
                "source": source,
                "source_dataset": "miniature",
                "source_filename": name,
                "target_class": ", ".join(picture.facts.names[i] for i in question.about),
                "target_size": list(picture.rgb.shape[:2]),
                "bbox": [_box(picture, i) for i in question.about],
            }
            index += 1


def _box(picture: Picture, index: int) -> list[float]:
    """Left, top, width and height of what is seen of an object."""
    rows, columns = np.nonzero(picture.objects == index)
    left, top = columns.min(), rows.min()
    return [float(left), float(top), float(columns.max() + 1 - left), float(rows.max() + 1 - top)]
