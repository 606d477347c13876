"""Whether an extraction's features depend on how it was run.

At one batch size and device kind the shard files are the same bytes, whatever the number of workers and threads, and
whether a teacher runs alone or beside another. Across batch sizes and device kinds libraries add in another order, and
what is asked is the cosine between the features of a row, the worst row's. Workers are extractors in this process;
that they may be processes and machines is for the package's own tests.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from olavlm.cache import FeatureStore
from olavlm.teachers import Teacher

from ..cache.sizes import Shape
from ..figures import Agreement
from .architectures import ARCHITECTURES, load
from .extraction import Job
from .free import FreeTeacher
from .photographs import photographs
from .sizes import Same, Size

MUST = 0.99999
KEY = "teacher"


def measure(size: Size, folder: Path) -> list[Agreement]:
    return [_compare(work, size, folder / f"{number}") for number, work in enumerate(size.sames)]


def _compare(work: Same, size: Size, folder: Path) -> Agreement:
    folder.mkdir()
    images = photographs(folder / "images", work.rows)
    batch = work.batches[0]
    figures = Agreement(f"{ARCHITECTURES[work.architecture].title}, {size.device}, float32", work.rows)

    def run(teacher: Teacher, batch: int, device: str, workers: int = 1, threads: int = 1, beside: bool = False) -> Got:
        teachers = {KEY: teacher}
        if beside:
            teachers = {"other": FreeTeacher(Shape("other", 2, 8, work.shard_rows), batch, device)} | teachers
        job = Job(teachers, folder / "images", images, batch, work.shard_rows, device, threads, "float32", workers)
        store = folder / "store"
        job.prepare(store)()
        got = Got(store)
        shutil.rmtree(store)
        return got

    teacher = load(work.architecture, device=size.device, compute_dtype="float32")
    base = run(teacher, batch, size.device)
    for workers in work.workers:
        many = "s" * (workers > 1)
        name = f"{workers} worker{many} of {workers} thread{many}, beside a teacher, over one alone"
        other = run(teacher, batch, size.device, workers, workers, beside=True)
        figures.equal[f"{name}; batches of {batch}"] = other.files == base.files
    for other in work.batches[1:]:
        what = f"batches of {other}, over {batch}"
        figures.cosines[what] = base.cosines(run(teacher, other, size.device))
        figures.must[what] = MUST
    if size.device == "cuda":
        teacher = load(work.architecture, device="cpu", compute_dtype="float32")
        figures.cosines["cpu, over cuda"] = base.cosines(run(teacher, batch, "cpu"))
        figures.must["cpu, over cuda"] = MUST
        teacher = load(work.architecture, device=size.device, compute_dtype=size.compute_dtype)
        half = run(teacher, batch, size.device)
        figures.cosines[f"{size.compute_dtype}, over float32"] = base.cosines(half)
        for other in work.batches[1:]:
            again = half.cosines(run(teacher, other, size.device))
            figures.cosines[f"{size.compute_dtype}: batches of {other}, over {batch}"] = again
    return figures


class Got:
    """What an extraction has left in a store."""

    def __init__(self, store: Path) -> None:
        group = FeatureStore(store)[KEY]
        self.values, valid = group.read(range(group.shape[0]))
        assert valid.all()
        files = sorted((store / KEY / "features" / "c").rglob("*"))
        self.files = {
            str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.is_file()
        }

    def cosines(self, other: Got) -> list[float]:
        """Of each row, its tokens as one vector."""
        return [cosine(a, b) for a, b in zip(self.values, other.values, strict=True)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
