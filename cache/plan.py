"""The plan: which image has which row.

One row per distinct image path, kept in immutable segments `plan/00000.parquet`, `plan/00001.parquet`, ... A dataset
that grows adds a segment; rows that stand never move. Each segment starts at a multiple of `SEGMENT_ALIGNMENT`, so that
no shard of any teacher holds rows of two segments; the row numbers between two segments belong to no image. The plan's
name is the hash of its segments' hashes in order, and a segment's hash is over its content (start row, then the image
paths as Arrow offsets and UTF-8), not over parquet bytes, so that it outlives the writer's version.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import files
from .errors import MissingFeatures, PlanError
from .files import Location

SEGMENT_ALIGNMENT = 4096  # the largest default shard; a shard size must divide every segment's start
SCANS = 16  # to sort the paths takes as long as to look through them so many times, and more in large plans
BISECT_BELOW = 1000  # `rows_of` less than a 1000th of the plan, as for a batch, hashes no whole plan


@dataclass(frozen=True)
class Segment:
    """Rows [start, start + len(images)), one image path each."""

    start: int
    images: pa.LargeStringArray

    @property
    def stop(self) -> int:
        return self.start + len(self.images)

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(f"olavlm plan segment 1\n{self.start} {len(self.images)}\n".encode())
        # A sliced or concatenated array may carry foreign bytes in its buffers; a fresh one does not.
        whole = pa.concat_arrays([self.images, _strings()])
        _, offsets, data = whole.buffers()
        offsets = np.frombuffer(offsets, "<i8", len(whole) + 1, whole.offset * 8)
        digest.update(np.ascontiguousarray(offsets - offsets[0]))
        digest.update(memoryview(data)[int(offsets[0]) : int(offsets[-1])] if data is not None else b"")
        return digest.hexdigest()

    def write(self, file: Location) -> None:
        """Publish the segment; raises FileExistsError if another writer was first."""
        table = pa.table(
            {"row": pa.array(np.arange(self.start, self.stop), pa.int64()), "image": self.images},
        ).replace_schema_metadata({"olavlm.segment_sha256": self.hash})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        files.publish(file, sink.getvalue())

    @classmethod
    def read(cls, file: Location) -> Segment:
        try:
            table = pq.ParquetFile(pa.BufferReader(files.read(file))).read()
            rows, images = table.column("row"), table.column("image").cast(pa.large_string())
            recorded = table.schema.metadata[b"olavlm.segment_sha256"].decode()
            segment = cls(rows[0].as_py(), pa.concat_arrays(images.chunks))
            numbered = np.array_equal(numbers(rows), np.arange(segment.start, segment.stop))
        except (pa.ArrowException, KeyError, TypeError, IndexError, ValueError, OSError) as e:
            raise PlanError(f"plan segment {file} is damaged: {(str(e) or repr(e)).splitlines()[0]}") from None
        if segment.hash != recorded or not numbered:
            raise PlanError(f"plan segment {file} is damaged: its content does not match its recorded hash")
        return segment


def _strings(*values: str) -> pa.LargeStringArray:
    """As `pa.array`, which imports pandas if it is installed: half a second at the opening of a store."""
    data = [value.encode() for value in values]
    offsets = np.cumsum([0, *map(len, data)], dtype="<i8")
    return pa.LargeStringArray.from_buffers(len(data), pa.py_buffer(offsets), pa.py_buffer(b"".join(data)))


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of integers without nulls as numpy; as `to_numpy`, which imports pandas too."""
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks] or [np.empty(0, np.int64)])


def segment_name(number: int) -> str:
    return f"{number:05d}.parquet"


@dataclass(frozen=True)
class Plan:
    """The segments of a store, in order."""

    segments: tuple[Segment, ...]

    @classmethod
    def load(cls, folder: Location) -> Plan:
        """Read `folder/00000.parquet`, ...; an absent folder is an empty plan."""
        found = [name for name in files.names(folder) if name[0].isdigit() and name.endswith(".parquet")]
        if found != [segment_name(i) for i in range(len(found))]:
            raise PlanError(f"{folder}: plan segments are numbered without gaps, found {found}")
        return cls(tuple(Segment.read(folder / name) for name in found))

    @property
    def hash(self) -> str:
        """Names the plan: sha256 of the segments' hashes in order."""
        return hashlib.sha256("\n".join(s.hash for s in self.segments).encode()).hexdigest()

    @property
    def num_images(self) -> int:
        return sum(len(s.images) for s in self.segments)

    @property
    def extent(self) -> int:
        """One past the last row; with one segment, the number of images."""
        return self.segments[-1].stop if self.segments else 0

    @cached_property
    def rows(self) -> np.ndarray:
        """The row numbers that hold an image, ascending, int64."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.segments] or [np.empty(0, np.int64)])

    @cached_property
    def images(self) -> pa.LargeStringArray:
        """The image paths, in the order of `rows`."""
        return pa.concat_arrays([s.images for s in self.segments] or [_strings()])

    @property
    def table(self) -> pa.Table:
        """Columns row (int64) and image (string), one line per image."""
        return pa.table({"row": pa.array(self.rows), "image": self.images})

    def segment_of(self, row: int) -> Segment:
        """The segment that holds `row`; MissingFeatures if none does."""
        for segment in self.segments:
            if segment.start <= row < segment.stop:
                return segment
        raise MissingFeatures(
            f"row {row} holds no image: the plan has {self.num_images} images, last row {self.extent - 1}"
        )

    def holds(self, rows: np.ndarray) -> bool:
        """Whether each of these row numbers holds an image."""
        inside = np.zeros(len(rows), bool)
        for segment in self.segments:
            inside |= (segment.start <= rows) & (rows < segment.stop)
        return bool(inside.all())

    def image_of(self, row: int) -> str:
        segment = self.segment_of(row)
        return segment.images[row - segment.start].as_py()

    def row_of(self, image: str) -> int:
        """The row of an image path; MissingFeatures if it is not in the plan.

        The first few are looked for along all paths; whoever asks for more has them sorted, once.
        """
        if next(self._asked) < SCANS:
            at = pc.index(self.images, _strings(image)[0]).as_py()
            row = int(self.rows[at]) if at >= 0 else -1
        else:
            row = self._bisect(image)
        if row < 0:
            raise MissingFeatures(f"image {image!r} is not in the plan of {self.num_images} images")
        return row

    def rows_of(self, images: pa.Array | Sequence[str]) -> np.ndarray:
        """Rows of many image paths, int64, in their order; -1 for a path that is not in the plan."""
        if len(images) * BISECT_BELOW < self.num_images:
            return np.array([self._bisect(str(image)) for image in images], np.int64)
        if not isinstance(images, (pa.Array, pa.ChunkedArray)):
            images = pa.array(images, pa.large_string())
        at = pc.index_in(images.cast(pa.large_string()), self.images)
        if isinstance(at, pa.ChunkedArray):
            at = at.combine_chunks()
        found = at.is_valid().to_numpy(zero_copy_only=False)
        rows = np.full(len(images), -1, np.int64)
        rows[found] = self.rows[at.drop_null().to_numpy()] if found.any() else []
        return rows

    @cached_property
    def _asked(self) -> Iterator[int]:
        """Counts the calls of `row_of`."""
        return itertools.count()

    @cached_property
    def _sorted(self) -> np.ndarray:
        """Positions in `images` by ascending path: 8 bytes an image, where a dict of the paths takes over 100."""
        return pc.array_sort_indices(self.images).to_numpy()

    def _bisect(self, image: str) -> int:
        # UTF-8 and Python sort strings alike, by code point.
        at = bisect.bisect_left(self._sorted, image, key=lambda i: self.images[int(i)].as_py())
        if at < len(self._sorted) and self.images[int(self._sorted[at])].as_py() == image:
            return int(self.rows[self._sorted[at]])
        return -1

    def growth(self, images: pa.LargeStringArray, shard_rows: Sequence[int] = ()) -> Segment | None:
        """The segment that this plan lacks to cover `images` (distinct paths), or None if it has them all.

        Raises `PlanError` with a diff if the plan holds images that the dataset lacks: that is another dataset.
        """
        known = pc.is_in(images, self.images) if self.num_images else pa.array(np.zeros(len(images), bool))
        new = images.filter(pc.invert(known))
        foreign = self.num_images - (len(images) - len(new))
        if foreign:
            gone = self.images.filter(pc.invert(pc.is_in(self.images, images)))
            raise PlanError(
                f"the dataset is not the plan's: {foreign} of its {self.num_images} images are not in the dataset "
                f"(first: {gone[0].as_py()!r}) and {len(new)} images of the dataset are not in the plan; give the "
                "dataset the plan was made from (it may have grown), another store, or --replace"
            )
        if not len(new):
            return None
        alignment = math.lcm(SEGMENT_ALIGNMENT, *shard_rows)
        return Segment(-(-self.extent // alignment) * alignment, new)
