"""What the valid commit records of one teacher say, in columns: coverage at a glance, without parsing every record.

`KEY/index` keeps the columns beside the store, so that opening 558K rows costs one listing and one small file where
parsing 9,000 records takes seconds. It is a cache and nothing more: each line carries the size and time (or ETag) of
the record it was made from, a line whose record has changed is made anew from the record, a damaged index is ignored,
and reading a row always checks the record itself. `write_index` rebuilds it; whoever changes the store calls it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import files
from .errors import CorruptFeatures
from .files import Location, Stamp
from .plan import Plan, numbers
from .records import Record, latest_records, record_name, valid_record
from .shard import Layout

INDEX_FORMAT = "1"
STATISTICS = (
    "cosine_mean", "cosine_worst", "relative_error_mean", "relative_error_worst", "norm_mean", "norm_min", "norm_max",
    "extract_s", "forward_s",
)  # fmt: skip
_FAILURE = pa.struct([("offset", pa.int32()), ("reason", pa.string()), ("detail", pa.string())])
SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("revision", pa.int32()),
        ("stamp", pa.string()),  # of the record file: a line that does not match is not used
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("segment", pa.string()),
        ("bytes", pa.int64()),  # of the shard files
        ("features_bytes", pa.int64()),
        ("scales_bytes", pa.int64()),
        ("failures", pa.list_(_FAILURE)),
        *[(name, pa.float64()) for name in STATISTICS],
    ]
)


class Failures(NamedTuple):
    """Quarantined rows of the plan (int64, ascending), each with its reason and detail."""

    rows: np.ndarray
    reasons: list[str]
    details: list[str]


@dataclass(frozen=True)
class Ledger:
    """The committed shards of one teacher, ascending, as columns of `SCHEMA`; and what is wrong with the others."""

    table: pa.Table
    damaged: dict[int, str]
    """Shards that have a record and do not exist, each with the reason."""
    times: dict[int, float]
    """When a shard was committed, in seconds of the store's clock."""

    @classmethod
    def load(cls, group: Location, layout: Layout, fingerprint: str, plan: Plan, known: Ledger | None = None) -> Ledger:
        """What the records say now. `known` (else the index) saves parsing those that have not changed."""
        stamps = files.listing(group / "commits")
        latest = latest_records(stamps)
        table = read_index(group, fingerprint) if known is None else known.table
        lines = dict(zip(table["shard"].to_pylist(), range(table.num_rows), strict=True))
        marks, revisions = table["stamp"].to_pylist(), table["revision"].to_pylist()
        sizes = _shard_file_sizes(group, layout, latest)
        in_index = list(zip(*(table[c].to_pylist() for c in ("features_bytes", "scales_bytes")), strict=True))
        keep, fresh, damaged = [], [], {}
        for shard, revision in sorted(latest.items()):
            line, now = lines.get(shard), _mark(stamps[record_name(shard, revision)])
            if line is not None and (marks[line], revisions[line], in_index[line]) == (now, revision, sizes[shard]):
                keep.append(line)
                continue
            try:
                record = valid_record(group, layout, shard, fingerprint)
            except CorruptFeatures as e:
                damaged[shard] = str(e)
                continue
            if record is not None:
                stamp = stamps.get(record.name) or files.stamp(group / "commits" / record.name)
                if stamp is not None:
                    fresh.append(_line(record, _mark(stamp)))
        if fresh or keep != list(range(table.num_rows)):
            table = pa.concat_tables([table.take(pa.array(keep, pa.int64())), pa.Table.from_pylist(fresh, SCHEMA)])
            table = table.sort_by("shard").combine_chunks()
        table = _of_plan(table, plan, group, damaged)
        times = {shard: stamps[record_name(shard, revision)].changed for shard, revision in latest.items()}
        return cls(table, damaged, times)

    @cached_property
    def starts(self) -> np.ndarray:
        return numbers(self.table["start"])

    @cached_property
    def stops(self) -> np.ndarray:
        return numbers(self.table["stop"])

    @property
    def bytes(self) -> int:
        """Bytes of the shard files."""
        return pc.sum(self.table["bytes"]).as_py() or 0

    @cached_property
    def failures(self) -> Failures:
        """The quarantined rows, ascending."""
        lists = pa.concat_arrays(self.table["failures"].chunks) if self.table.num_rows else None
        if lists is None:
            return Failures(np.empty(0, np.int64), [], [])
        flat = lists.flatten()
        first = np.repeat(self.starts, np.from_dlpack(pc.list_value_length(lists)))
        return Failures(
            first + np.from_dlpack(flat.field("offset")),
            flat.field("reason").to_pylist(),
            flat.field("detail").to_pylist(),
        )

    def covered(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of `rows` is committed, valid or quarantined; bool."""
        if not len(self.starts):
            return np.zeros(len(rows), bool)
        at = np.searchsorted(self.starts, rows, side="right") - 1
        return (at >= 0) & (rows < self.stops[at])

    def reasons(self, rows: np.ndarray) -> Counter:
        """How many of `rows` (ascending, distinct) are quarantined, by reason."""
        failed = self.failures
        at = np.minimum(np.searchsorted(rows, failed.rows), max(len(rows) - 1, 0))
        mine = rows[at] == failed.rows if len(rows) else np.zeros(len(failed.rows), bool)
        return Counter(reason for reason, wanted in zip(failed.reasons, mine, strict=True) if wanted)

    def statistics(self) -> dict[str, float]:
        """Over all shards: fidelity and norms as means, worst, smallest and largest; {} without a valid row."""
        valid = self.table.filter(pc.is_valid(self.table["norm_mean"]))
        if not valid.num_rows:
            return {}
        weights = (valid["stop"].to_numpy() - valid["start"].to_numpy()) - pc.list_value_length(
            valid["failures"]
        ).to_numpy()
        of = {name: valid[name].to_numpy(zero_copy_only=False) for name in STATISTICS}
        least, most = ("cosine_worst", "norm_min"), ("relative_error_worst", "norm_max")
        return {
            name: float(v.min() if name in least else v.max() if name in most else np.average(v, weights=weights))
            for name, v in of.items()
            if not name.endswith("_s")
        }


def _mark(stamp: Stamp) -> str:
    return f"{stamp.size}:{stamp.version}"


def _line(record: Record, mark: str) -> dict:
    sizes = {name: record.files[name].size for name in record.files}
    summary = {**record.fidelity, **{f"norm_{k}": v for k, v in record.norms.items()}, **record.timings}
    return {
        "shard": record.shard,
        "revision": record.revision,
        "stamp": mark,
        "start": record.rows[0],
        "stop": record.rows[1],
        "segment": record.segment,
        "bytes": record.bytes,
        "features_bytes": sizes.get("features"),
        "scales_bytes": sizes.get("scales"),
        "failures": [{"offset": i, **reason} for i, reason in enumerate(record.reasons) if reason is not None],
        **{name: summary.get(name) for name in STATISTICS},
    }


def _shard_file_sizes(group: Location, layout: Layout, shards: dict[int, int]) -> dict[int, tuple[int | None, ...]]:
    """Bytes of each shard's files `features` and `scales`, None for one that is not there."""
    if files.is_local(group):
        of = {name: {s: _size(f"{group}/{name}/{a.key(s)}") for s in shards} for name, a in layout.arrays.items()}
    else:
        found = {name: files.sizes_below(group / name) for name in layout.arrays} if shards else {}
        of = {name: {s: found[name].get(a.key(s)) for s in shards} for name, a in layout.arrays.items()}
    none: dict[int, int | None] = {}
    return {s: (of["features"][s], of.get("scales", none).get(s)) for s in shards}


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size  # noqa: PTH116 - a Path costs as much as the look-up, ten thousand times
    except (FileNotFoundError, NotADirectoryError):
        return None


def _of_plan(table: pa.Table, plan: Plan, group: Location, damaged: dict[int, str]) -> pa.Table:
    """Without the lines of rows that the plan does not hold yet; those of another plan are damaged."""
    keep = np.ones(table.num_rows, bool)
    bounds = {s.hash: (s.start, s.stop) for s in plan.segments}
    columns = (table[c].to_pylist() for c in ("shard", "segment", "start", "stop"))
    for i, (shard, segment, start, stop) in enumerate(zip(*columns, strict=True)):
        low, high = bounds.get(segment, (0, -1))
        if not low <= start < stop <= high:
            keep[i] = False
            if start < plan.extent:
                damaged[shard] = f"{group}: shard {shard} was committed for another plan"
    return table if keep.all() else table.filter(pa.array(keep))


def read_index(group: Location, fingerprint: str) -> pa.Table:
    """The columns kept in `group/index`; empty if there are none of this card, or they are damaged."""
    try:
        raw = files.read(group / "index")
    except OSError:  # none, or none that can be read: it only saves time
        return SCHEMA.empty_table()
    checksum, body = raw[:32], raw[32:]
    if hashlib.sha256(body).digest() != checksum:
        return SCHEMA.empty_table()
    table = pa.ipc.open_file(pa.BufferReader(body)).read_all()
    metadata = table.schema.metadata or {}
    if (metadata.get(b"fingerprint"), metadata.get(b"format")) != (fingerprint.encode(), INDEX_FORMAT.encode()):
        return SCHEMA.empty_table()
    return table.replace_schema_metadata(None)


def write_index(group: Location, fingerprint: str, ledger: Ledger) -> None:
    """Keep what `ledger` says, if it is not what is kept already."""
    if ledger.table.equals(read_index(group, fingerprint)):
        return
    table = ledger.table.replace_schema_metadata({"fingerprint": fingerprint, "format": INDEX_FORMAT})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(table)
    body = sink.getvalue().to_pybytes()
    files.replace(group / "index", hashlib.sha256(body).digest() + body)
