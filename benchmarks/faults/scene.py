"""Small stores of random features: what an extraction is asked, and what must come of it.

`extract` does to a store what `olavlm-extract` does, by the same calls in the same order, with known features in place
of a teacher's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from olavlm.cache import FeatureStore, LeaseHeld, LeaseLost, StoreBuilder, TeacherFeatures, pending
from olavlm.cache.codec import CODECS

KEY = "depth"
SHAPE = (3, 16)  # tokens, dim
SHARD_ROWS = 4
KINDS = (("float16", "none"), ("int8", "none"), ("int4", "zstd"))  # dtype, compression
REASONS = ("missing", "truncated", "empty")
FLAVOURS = ("fresh", "resume", "retry", "grow")
"""From nothing; with one shard done; `--retry-failed` on a finished store, which replaces shards; with more images."""


@dataclass(frozen=True)
class Request:
    """One `olavlm-extract`: the first `images` images, of which some cannot be read."""

    images: int
    bad: dict[int, str]
    retry_failed: bool = False
    shards: tuple[int, ...] | None = None
    """These alone."""


@dataclass(eq=False)
class Scene:
    """A store as it is before (`base`), what is then asked, and the store that an uninterrupted run makes (`final`)."""

    name: str
    dtype: str
    compress: str
    shape: tuple[int, int]
    shard_rows: int
    features: np.ndarray  # (images, tokens, dim) float32
    before: list[Request]
    request: Request
    folder: Path
    committed: frozenset[int] = field(init=False, default=frozenset())
    """The shards of `base`."""

    def __post_init__(self) -> None:
        self.base.mkdir(parents=True)
        for request in self.before:
            extract(self, self.base, request)
        self.committed = frozenset(shards_of(open_group(self.base)))
        shutil.copytree(self.base, self.final)
        extract(self, self.final, self.request)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def final(self) -> Path:
        return self.folder / "final"

    @cached_property
    def values(self) -> np.ndarray:
        """What a reader must get of every image, float32."""
        return decoded(self.dtype, self.features)

    @cached_property
    def card(self) -> dict:
        card = {"name": KEY, "tokens": self.shape[0], "dim": self.shape[1], "size": [8, 8]}
        return {**card, "fingerprint": hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()}

    @property
    def ever_bad(self) -> set[int]:
        """The images that some request of this scene could not read."""
        return {image for request in (*self.before, self.request) for image in request.bad}


def decoded(dtype: str, features: np.ndarray) -> np.ndarray:
    codec = CODECS[dtype]
    return np.stack([codec.decode(codec.encode(row)[0]) for row in features])


def image_number(path: str) -> int:
    return int(Path(path).stem)


def open_group(path: Path) -> TeacherFeatures | None:
    """Opened anew, as another process would; None if it has not come to be."""
    if not (path / KEY / "features" / "zarr.json").exists():
        return None
    return FeatureStore(path)[KEY]


def shards_of(group: TeacherFeatures | None) -> list[int]:
    """The committed shards."""
    return [] if group is None else group.ledger().table["shard"].to_pylist()


def record_file(path: Path, shard: int) -> Path:
    """The newest record of a shard."""
    return max((path / KEY / "commits").glob(f"{shard:06d}.*.json"))


def shard_files(path: Path, shard: int) -> list[Path]:
    """Those that are there."""
    arrays = sorted(f.parent for f in (path / KEY).glob("*/c"))
    return [f for array in arrays for f in sorted((array / "c" / str(shard)).rglob("*")) if f.is_file()]


def extract(
    scene: Scene,
    path: Path,
    request: Request | None = None,
    *,
    features: np.ndarray | None = None,
    tell: Callable[[str], None] = lambda word: None,
    on_step: Callable[[str, int], None] = lambda step, shard: None,
) -> None:
    """Do to the store at `path` what `request` asks (the scene's own by default).

    `tell` hears "step NAME SHARD" before every step, "done SHARD" when a commit has returned, and "refused SHARD" where
    another writer holds the shard or has done it.
    """
    request = request or scene.request
    features = scene.features if features is None else features
    tell("step make -1")
    builder = StoreBuilder(path)
    builder.extend_plan(pa.array([f"photos/{i:05d}.jpg" for i in range(request.images)], pa.large_string()))
    builder.ensure_teacher(KEY, scene.card, dtype=scene.dtype, shard_rows=scene.shard_rows, compress=scene.compress)
    group = FeatureStore(path)[KEY]
    for task in pending(group, retry_failed=request.retry_failed):
        if request.shards is not None and task.shard not in request.shards:
            continue

        def step(name: str, shard: int = task.shard) -> None:
            tell(f"step {name} {shard}")
            on_step(name, shard)

        try:
            writer = builder.writer(group, step)
            with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
                standing = writer.valid_record(task.shard)
                if standing is not None and standing.revision != task.supersedes:
                    tell(f"refused {task.shard}")
                    continue
                for row in range(task.start, task.stop):
                    image = image_number(group.plan.image_of(row))
                    tell(f"row {row}")
                    if reason := request.bad.get(image):
                        shard.append(None, image_sha256=None, reason=reason, detail=f"of image {image}")
                    else:
                        sha256 = hashlib.sha256(b"image %d" % image).hexdigest()
                        shard.append(features[image], image_sha256=sha256)
                shard.commit()
            tell(f"done {task.shard}")
        except (LeaseHeld, LeaseLost):
            tell(f"refused {task.shard}")
    tell("step index -1")
    builder.index()


def make_scene(name: str, folder: Path, rng: np.random.Generator, kind: tuple[str, str], flavour: str) -> Scene:
    """A scene of 9 to 12 images, three shards, of which some, drawn, cannot be read.

    `flavour` is one of `FLAVOURS`, or "long": from nothing, three times as many.
    """
    images = int(rng.integers(9, 13)) * (3 if flavour == "long" else 1)
    bad = {int(i): str(rng.choice(REASONS)) for i in range(images) if rng.random() < 0.15}
    if flavour in ("fresh", "long"):
        before, request = [], Request(images, bad)
    elif flavour == "resume":
        before, request = [Request(images, bad, shards=(int(rng.integers(3)),))], Request(images, bad)
    elif flavour == "grow":
        before, request = [Request(images - 3, {i: r for i, r in bad.items() if i < images - 3})], Request(images, bad)
    else:
        # Image 5 is mended and image 6 is broken meanwhile: shard 1 is replaced by one of exactly the same size.
        before = [Request(images, {**bad, 5: "missing"} | {i: "empty" for i in (0,) if rng.random() < 0.5})]
        before[0].bad.pop(6, None)
        request = Request(images, {6: "missing"} | {i: r for i, r in bad.items() if i not in (5, 0)}, True)
    features = rng.standard_normal((images, *SHAPE)).astype(np.float32)
    return Scene(name, *kind, SHAPE, SHARD_ROWS, features, before, request, folder)
