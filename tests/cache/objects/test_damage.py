"""Damaged objects: an error for who reads them, and the rest is read as before."""

from __future__ import annotations

import numpy as np
import pytest

from olavlm.cache import CorruptFeatures, PlanError, StoreError, files, pending

ROWS = 4  # a shard


class TestDamage:
    HOW = ("flipped", "short", "empty", "swapped", "removed", "cut")

    def damage(self, bucket, store, shard: int, array: str) -> None:
        file, how = store.shard_file(shard, array), self.HOW[shard]
        content = bytearray(files.read(file))
        if how == "removed":
            files.remove(file)
            return
        if how == "flipped":
            content[1] ^= 4
        elif how == "swapped":
            content = files.read(store.shard_file(len(self.HOW), array))
        else:
            del content[{"short": 2, "empty": 0, "cut": -1}[how] :]
        bucket.put(file, bytes(content))

    def test_is_an_error_for_who_has_read_before_and_who_has_not(self, s3, bucket):
        shards = range(len(self.HOW))
        store = s3(filled=True, rows=ROWS * (len(self.HOW) + 1), dtype="int8")
        store.builder.index()
        warm, batched = store.group, store.group
        for group in (warm, batched):
            group.read(range(len(store.features)))
        for shard in shards:
            self.damage(bucket, store, shard, store.arrays[shard % 2])
        cold, last = store.group, ROWS * len(self.HOW)
        for shard, how in enumerate(self.HOW):
            row = shard * ROWS
            for group in (warm, cold) if how != "cut" else (cold,):  # who has seen the index needs no more of it
                with pytest.raises(CorruptFeatures, match=rf"row {row} |{shard:06d}\.0\.json"):
                    group[row]
            if how != "cut":
                with pytest.raises(CorruptFeatures):
                    batched.read([last, row])
        for group in (warm, cold, batched):
            np.testing.assert_array_equal(group.read([last, last + 1])[0], store.expected[last : last + 2])
        unseen = [shard for shard in shards if self.HOW[shard] in ("flipped", "swapped")]  # of the right size
        assert store.group.coverage().missing == ROWS * (len(shards) - len(unseen))
        assert [t.shard for t in pending(store.group)] == [s for s in shards if s not in unseen]
        store.fill()
        rows = [row for row in range(len(store.features)) if row // ROWS not in unseen]
        np.testing.assert_array_equal(store.group.read(rows)[0], store.expected[rows])

    def test_of_what_describes_them(self, s3, bucket):
        store = s3(filled=True, rows=8)
        store.builder.index()
        for path, error in {
            "depth/commits/000000.0.json": CorruptFeatures,
            "plan/00000.parquet": PlanError,
            "depth/zarr.json": StoreError,
            "depth/features/zarr.json": StoreError,
        }.items():
            whole = files.read(store.path / path)
            middle = len(whole) // 2
            bucket.put(store.path / path, whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
            with pytest.raises(error):
                store.group[0]
            bucket.put(store.path / path, whole)
        bucket.put(store.path / "depth" / "index", b"not an index")  # which is made anew from the records
        assert store.group.coverage().valid == 8
        store.assert_reads(0)
