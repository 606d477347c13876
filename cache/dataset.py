"""Datasets in: LLaVA's files to samples.

A dataset is one or more `.json` (a list), `.jsonl` or `.parquet` files of records
`{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}`; a text-only sample has no `image`. The samples
live in one Arrow table, so that 10M of them are a few buffers rather than 10M objects, and forked loader processes
share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import DatasetError

_TEXT = pa.large_string()  # the buffers of a dataset may exceed 2 GiB
_TURN = pa.struct([("from", _TEXT), ("value", _TEXT)])
SCHEMA = pa.schema([("id", _TEXT), ("image", _TEXT), ("conversations", pa.large_list(_TURN))])


@dataclass(frozen=True)
class Sample:
    """One record: `image` is a path relative to the image roots, None for text-only."""

    id: str
    image: str | None
    conversations: list[dict[str, str]]


class Dataset:
    """The samples of one or more files, in file order.

    Raises `DatasetError` naming the file and the record for anything that is not LLaVA's format.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        if not files:
            raise DatasetError("no dataset file given; name at least one .json, .jsonl or .parquet file")
        self.files = [Path(f) for f in files]
        self.table = pa.concat_tables([_read(f) for f in self.files]).combine_chunks()
        if not self.table.num_rows:
            raise DatasetError(f"{', '.join(map(str, self.files))}: no samples in the dataset")

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, i: int) -> Sample:
        record = {name: self.table.column(name)[i].as_py() for name in SCHEMA.names}
        return Sample(record["id"], record["image"], record["conversations"])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: np.ndarray) -> Dataset:
        """The samples at `indices`, in that order."""
        part = Dataset.__new__(Dataset)
        part.files, part.table = self.files, self.table.take(pa.array(indices)).combine_chunks()
        return part

    def asking(self, turns: Sequence[dict[str, str]]) -> Dataset:
        """One sample for each distinct image, named by its path, with this conversation in place of its own.

        DatasetError if no sample has an image.
        """
        images = self.images()
        if not len(images):
            raise DatasetError(f"{', '.join(map(str, self.files))}: no sample has an image")
        conversation = pa.scalar(list(turns), SCHEMA.field("conversations").type)
        columns = [images, images, pa.repeat(conversation, len(images))]
        made = Dataset.__new__(Dataset)
        made.files, made.table = self.files, pa.table(columns, schema=SCHEMA)
        return made

    def digest(self) -> str:
        """sha256 of the samples in their order, by image and conversation, wherever and however their files lie."""
        digest = hashlib.sha256()
        turns = self.table.column("conversations").combine_chunks()
        digest.update(np.ascontiguousarray(pc.list_value_length(turns), np.int64))
        flat = pc.list_flatten(turns)
        texts = [pc.struct_field(flat, name) for name in ("from", "value")]
        for column in (self.table.column("image").combine_chunks(), *texts):
            digest.update(np.ascontiguousarray(pc.fill_null(pc.binary_length(column), -1), np.int64))
            _, offsets, values = column.buffers()
            ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
            digest.update(memoryview(values)[ends[0] : ends[-1]] if values is not None and len(ends) else b"")
        return digest.hexdigest()

    def images(self) -> pa.LargeStringArray:
        """The distinct image paths, in order of first appearance: the rows of a plan."""
        return pc.unique(self.table.column("image").drop_null())

    def has_image(self) -> pa.BooleanArray:
        """Per sample, whether it has an image."""
        return pc.is_valid(self.table.column("image")).combine_chunks()


def _read(file: Path) -> pa.Table:
    if not file.is_file():
        raise DatasetError(f"dataset file {file} does not exist")
    if file.suffix == ".parquet":
        try:
            with pq.ParquetFile(file) as table:
                kept = [name for name in SCHEMA.names if name in table.schema_arrow.names]
                records = table.read(kept).to_pylist()
        except (pa.ArrowException, ValueError, OSError, OverflowError, KeyError) as e:
            raise DatasetError(f"{file}: not a readable parquet file: {str(e).splitlines()[0]}") from None
    elif file.suffix in (".json", ".jsonl"):
        try:
            text = file.read_text(encoding="utf-8-sig")  # with a byte order mark or without
        except (OSError, UnicodeDecodeError) as e:
            raise DatasetError(f"{file}: not readable as UTF-8 text: {e}") from None
        if file.suffix == ".json":
            records = _parse(text, str(file))
        else:  # lines end at "\n" alone: str.splitlines would cut at U+2028 and others, which JSON strings may hold
            lines = [line for line in text.split("\n") if line.strip()]
            records = [_parse(line, f"{file}, record {i}") for i, line in enumerate(lines)]
    else:
        raise DatasetError(f"dataset file {file}: unknown kind '{file.suffix}'; use .json, .jsonl or .parquet")
    if not isinstance(records, list):
        raise DatasetError(f"{file}: a dataset is a list of records, this is a {type(records).__name__}")
    return pa.Table.from_pylist([_check(file, i, r) for i, r in enumerate(records)], schema=SCHEMA)


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # also a number of more digits than Python takes
        raise DatasetError(f"{where}: not valid JSON: {e}") from None


def _check(file: Path, i: int, record: object) -> dict:
    def wrong(rule: str) -> DatasetError:
        return DatasetError(f"{file}, record {i}: {rule}")

    if not isinstance(record, dict):
        raise wrong(f"a record is an object with id, image and conversations, this is a {type(record).__name__}")
    image = record.get("image")
    if image == "":
        image = None
    if image is not None and not isinstance(image, str):
        raise wrong(f"'image' is one relative path, this is a {type(image).__name__}")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise wrong("'conversations' is missing or empty; it is a list of {'from', 'value'}")
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("from"), str)
            or not isinstance(turn.get("value"), str)
        ):
            raise wrong("every turn of 'conversations' has the texts 'from' and 'value'")
    id = record.get("id")
    id = str(i if id is None else id)
    try:
        "".join([id, image or "", *(t[k] for t in turns for k in ("from", "value"))]).encode()
    except UnicodeEncodeError as e:
        raise wrong(f"its text is not Unicode: {e}") from None
    return {
        "id": id,
        "image": image,
        "conversations": [{"from": t["from"], "value": t["value"]} for t in turns],
    }
