"""What keeps carried-over rows safe while a shard is replaced.

Between the withdrawal of a shard's record and the publication of the next one nothing vouches for it. A row that the
next one carries over as it is stored, because its image cannot be had any more, would then be nowhere but in its
writer's private files. So the whole new shard is put down as `staging/000012.replacement.features` (`.scales`,
`.record`) before the old record is withdrawn; when its writer dies, the next one carries the rows over from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import files
from .errors import CorruptFeatures
from .files import Location
from .records import Record, revisions_of
from .shard import Layout
from .vouched import VouchedRows

_MARK = "replacement"


class Replacement:
    """The copy of one shard's next revision, beside the staged files, if there is one."""

    def __init__(self, staging: Location, layout: Layout, shard: int) -> None:
        self._layout = layout
        self._files = {name: staging / f"{shard:06d}.{_MARK}.{name}" for name in layout.arrays}
        self._record = staging / f"{shard:06d}.{_MARK}.record"

    def keep(self, staged: Mapping[str, Path], record: Record) -> None:
        """Put it down, durably: finished files by array, then the record that is going to be published with them."""
        self.remove()
        for name, file in staged.items():
            files.place(file, self._files[name])
        files.publish(self._record, record.to_bytes())  # which makes the names of the folder durable

    def rows(self, fingerprint: str, segment: str) -> VouchedRows | None:
        """What a writer that died in between had carried over, among the other rows of its shard; None if none did."""
        try:
            record = Record.parse(files.read(self._record), self._record)
        except (FileNotFoundError, CorruptFeatures):
            return None
        if (record.fingerprint, record.segment) != (fingerprint, segment) or not record.fits(self._layout):
            return None
        return VouchedRows(self._layout, record, self._files)

    def remove(self) -> None:
        for file in (self._record, *self._files.values()):
            files.remove(file)


def vouched_rows(group: Location, layout: Layout, fingerprint: str, shard: int, segment: str) -> list[VouchedRows]:
    """The rows of a shard by every whole record of it, whether it counts or its files are damaged, the highest first;
    and by what a dead writer put by."""
    found = []
    for file in revisions_of(group / "commits", shard)[0]:
        try:
            record = Record.read(file)
        except (CorruptFeatures, FileNotFoundError):
            continue
        if (record.fingerprint, record.segment) == (fingerprint, segment) and record.fits(layout):
            shard_files = {name: array.file(group, shard) for name, array in layout.arrays.items()}
            found.append(VouchedRows(layout, record, shard_files))
    put_by = Replacement(group / "staging", layout, shard).rows(fingerprint, segment)
    return found if put_by is None else [*found, put_by]


def is_of_replacement(name: str) -> bool:
    """Whether a name in `staging` is of one."""
    return name.split(".")[1:2] == [_MARK]
