"""The rows of a benchmark, from the parquet files in which it is published: of a local folder, or of the hub.

The files are read as they are, by row group: no second copy is made of them, and a picture is decoded when a model is
asked about it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.cache import BadImage, decode_rgb
from olavlm.pipelines.cli import JobFailed

from .tasks.task import Published, Row, Task

IMAGE = "image"


class BenchmarkRows(Sequence[Row]):
    """Rows of one task; `rows[i]` has the picture, upright RGB, `text(i)` everything else.

    Raises:
        JobFailed: files that cannot be read, that lack columns of the task, or hold rows that are none of it.
    """

    def __init__(self, task: Task, files: Sequence[Path]) -> None:
        self.task, self.files = task, tuple(files)
        parts = [_open(task, file) for file in files]
        self._texts = [row for part in parts for row in _texts(task, part)]
        if not self._texts:
            raise JobFailed(f"{', '.join(map(str, files))}: no rows; get {task.published.repository} anew")
        self._groups = [(part, g) for part in parts for g in range(part.num_row_groups)]
        self._ends = list(accumulate(part.metadata.row_group(g).num_rows for part, g in self._groups))
        self._pictures = lru_cache(maxsize=2)(self._read_pictures)  # models are asked nearly in order

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> dict[str, Any]:
        """A row without its picture."""
        return dict(self._texts[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        picture = self._pictures(group)[index - first].as_py()
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        try:
            image = decode_rgb(content or b"", f"{self.task.name} row {index}")
        except BadImage as e:
            raise JobFailed(f"{e}; get {self._groups[group][0].file} anew") from None
        return {**self.text(index), IMAGE: image}

    def _read_pictures(self, group: int) -> pa.ChunkedArray:
        part, number = self._groups[group]
        with _damage_of(part.file):
            return part.read_row_group(number, [IMAGE]).column(IMAGE)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these rows from others: their number, and each file's SHA-256 by its name."""
        digests = {}
        for path in self.files:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return {"rows": len(self), "files": digests}


class _Part(pq.ParquetFile):
    """A parquet file that knows where it lies."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.file = file


def _open(task: Task, file: Path) -> _Part:
    wanted = (IMAGE, *task.published.columns)
    try:
        part = _Part(file)
    except (OSError, pa.ArrowException) as e:
        raise JobFailed(f"{file} is no parquet file that can be read: {str(e).splitlines()[0]}; get it anew") from None
    schema = part.schema_arrow
    if missing := [name for name in wanted if name not in schema.names]:
        raise JobFailed(
            f"{file} is not {task.published.repository}: it lacks the column {missing[0]!r} of {', '.join(wanted)}; it "
            f"has {', '.join(schema.names)}"
        )
    kind = schema.field(IMAGE).type
    of_files = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(of_files) or pa.types.is_large_binary(of_files) or pa.types.is_binary_view(of_files)):
        raise JobFailed(
            f"{file}: its column {IMAGE!r} is {kind}; pictures are published as their files' bytes, with or without "
            "a path"
        )
    return part


def _texts(task: Task, part: _Part) -> list[dict[str, Any]]:
    """The rows of a file without pictures; each is one that the task can ask about."""
    published = task.published
    with _damage_of(part.file):
        rows = part.read(list(published.columns)).to_pylist()
    for number, row in enumerate(rows):
        where = f"{part.file}, row {number}"
        for name, value in row.items():
            if not (_is_list_of_text(value) if name in published.lists else isinstance(value, str)):
                raise JobFailed(
                    f"{where}: {name!r} is {value!r}, and in {published.repository} "
                    f"{'a list of texts' if name in published.lists else 'text'}; get the file anew"
                )
        try:
            task.item(row)
        except JobFailed as e:
            raise JobFailed(f"{where}: {e}") from None
    return rows


def _is_list_of_text(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """JobFailed for what cannot be read out of a parquet file."""
    try:
        yield
    except (OSError, pa.ArrowException) as e:
        raise JobFailed(f"{file} is damaged: {str(e).splitlines()[0]}; get it anew") from None


def open_rows(task: Task, folder: Path | None) -> BenchmarkRows:
    """The rows of a task, from a folder with its files, or below which it lies; from the hub without one.

    Raises:
        JobFailed: no such folder, nothing in it of what is looked for, or a hub that does not give it.
    """
    published = task.published
    if folder is None:
        folder = download(task)
        return BenchmarkRows(task, find_files(task, folder))
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise JobFailed(f"--data {folder} {there}; give the folder of {describe(published)}")
    own = (folder / name for name in (task.name, published.repository.rpartition("/")[2]))
    return BenchmarkRows(task, find_files(task, next((f for f in own if f.is_dir()), folder)))


def find_files(task: Task, folder: Path) -> list[Path]:
    """The task's parquet files where they are published, or anywhere below, where other benchmarks' may lie too.

    Raises:
        JobFailed: there are none, or two of one name, so that rows would count twice.
    """
    patterns = task.published.files
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    if not found:
        below = {file for pattern in patterns for file in folder.rglob(Path(pattern).name)}
        found = {file for file in below if not _is_anothers(task, file)} or below
    if not found:
        names = sorted(f"{f.name}/" if f.is_dir() else f.name for f in folder.iterdir())
        there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise JobFailed(
            f"{folder} holds no {patterns[0]} of {task.published.repository}, here or below; it holds "
            f"{there or 'nothing'}"
        )
    by_name = {file.name: file for file in sorted(found)}
    if twice := sorted(file for file in found if by_name[file.name] != file):
        raise JobFailed(f"{folder} holds {twice[0]} and {by_name[twice[0].name]}, of one name; give the folder of one")
    return sorted(found)


def _is_anothers(task: Task, file: Path) -> bool:
    """Whether it can be read and lacks columns of the task."""
    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException):
        return False
    return not {IMAGE, *task.published.columns} <= set(names)


def download(task: Task) -> Path:
    """A folder with the task's files, out of the hub or what this machine has of it; JobFailed without."""
    from huggingface_hub import snapshot_download

    published = task.published
    try:
        return Path(snapshot_download(published.repository, repo_type="dataset", allow_patterns=list(published.files)))
    except (OSError, ValueError) as e:  # the hub's own errors are among them
        reason = str(e).strip().partition("\n")[0]
        raise JobFailed(
            f"the dataset {published.repository} is neither on this machine nor reachable on the hub ({reason}); give "
            f"--data {task.name}=DIR, the folder of {describe(published)}"
        ) from None


def describe(published: Published) -> str:
    """What is looked for, in words."""
    return f"{published.files[0]} of {published.repository}"
