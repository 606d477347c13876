"""What an S3 server is asked, by its relay: few requests, whatever the size of the store."""

from __future__ import annotations

import threading

import numpy as np
import pytest


class TestRequests:
    """What the server is asked, by its relay."""

    @pytest.mark.parametrize(("dtype", "arrays"), [("float16", 1), ("int8", 2)])
    def test_a_row(self, s3, relay, dtype, arrays):
        store = s3(filled=True, dtype=dtype, shape=(16, 64))
        group = store.group
        row_bytes = [array.row_bytes + 4 for array in group.layout.arrays.values()]
        cold = relay.asked_by(lambda: group[4])
        print(cold)
        # Of all records those of this shard are listed, one is read; then of each file its size, its index and the row.
        assert "commits%2F000001." in cold[0].path
        assert [r.method for r in cold].count("HEAD") == arrays
        assert [r.key for r in cold if r.method == "GET"][:2] == ["", "depth/commits/000001.0.json"]
        ranges = [r.range for r in cold if r.method == "GET"][2:]
        assert sorted(ranges) == sorted(row_bytes + [array.index_bytes for array in group.layout.arrays.values()])
        assert len(cold) == 2 + 3 * arrays

        warm = relay.asked_by(lambda: group[5])  # of the same shard; both arrays at once, which arrive in any order
        assert sorted((r.method, r.range) for r in warm) == sorted(("GET", n) for n in row_bytes)
        np.testing.assert_array_equal(group.read([5, 4])[0], store.expected[[5, 4]])

    def test_a_batch_is_asked_for_at_once(self, s3, relay):
        store = s3(filled=True, rows=8)
        group, rows = store.group, [7, 0, 3, 5, 1, 6, 4, 2]
        group.read([0, 4])  # both shards are known now
        mark, all_here = len(relay.log), threading.Barrier(len(rows), timeout=5)
        relay.meddle = lambda request: all_here.wait() and None  # nobody is answered until all have asked
        np.testing.assert_array_equal(group.read(rows)[0], store.features[rows])
        assert [r.range for r in relay.log[mark:]] == [group.layout.row_bytes + 4] * len(rows)

    def test_opening_and_coverage_are_a_few_whatever_the_number_of_shards(self, s3, relay):
        def in_pages(request) -> None:
            """As a store of millions of rows would be listed."""
            if "list-type" in request.path:
                request.path += "&max-keys=25"

        asked, opened = {}, {}
        for shards in (3, 60):
            store = s3(str(shards), filled=True, bad={1: "missing"}, rows=shards, shape=(1, 4), shard_rows=1)
            store.builder.index()
            relay.meddle = in_pages
            mark = len(relay.log)
            group = store.group
            opened[shards] = relay.log[mark:]
            coverage = group.coverage()
            assert (coverage.valid, coverage.quarantined) == (shards - 1, 1)
            asked[shards] = relay.log[mark:]
            relay.meddle = lambda request: None
        print("opened", opened[60], "and then", asked[60][len(opened[60]) :], sep="\n")
        assert len(opened[3]) == len(opened[60]) <= 10
        assert len(asked[3]) <= 14
        assert len(asked[60]) == len(asked[3]) + 2 * 2  # pages of records and of shard files
        assert not [r for r in asked[60] if ".json" in r.key and "commits" in r.key]
