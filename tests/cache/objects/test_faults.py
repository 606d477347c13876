"""Kills, races and stuck writers on object storage: one commits a shard, and what it leaves is whole or not there."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from olavlm.cache import LeaseLost, files, lease, pending

FRESH = ["lease", "recover", "stage", "compare", "fsync", "place", "record", "release"]
REPLACE = [*FRESH[:5], "withdraw", *FRESH[5:]]
ROWS = 4  # a shard
MINUTE = 60


def all_bad(store) -> dict[int, str]:
    """The second row of every shard."""
    return {row: "missing" for row in range(1, len(store.features), ROWS)}


class TestFaults:
    def test_a_writer_killed_at_any_step(self, s3, small, writers):
        options = {"rows": ROWS * len(FRESH)}
        store = s3(**options)
        whole = small(**options)
        whole.fill(all_bad(whole))
        for shard, step in enumerate(FRESH):
            assert writers.commit(store, shard, bad=True, die=step) == [-signal.SIGKILL]
            committed = step == "release"
            group, first = store.group, shard * ROWS
            store.assert_reads(first, committed)
            assert str(group.coverage()) == (
                "4 of 32 images: 3 valid, 1 quarantined (1 missing), 28 missing" if committed
                else "0 of 32 images: 0 valid, 0 quarantined, 32 missing"
            )  # fmt: skip
            placed = files.exists(store.shard_file(shard))
            assert placed == (step in ("record", "release")), step  # the control: it came this far
        assert store.leases() == [f"{shard:06d}.0" for shard in range(1, len(FRESH))]
        store.fill(all_bad(store))
        store.writer().sweep(len(FRESH) - 1)  # its own is the one lease that was still to be released
        assert store.leases() == []
        assert store.contents() == whole.contents()
        assert store.records() == whole.records()

    def test_a_writer_killed_while_it_replaces(self, s3, small, writers):
        options = {"rows": ROWS * len(REPLACE)}
        whole = small(**options)
        whole.fill(all_bad(whole))
        store = s3(filled=True, bad=all_bad(whole), **options)
        store.builder.index()
        for shard, step in enumerate(REPLACE):
            assert writers.commit(store, shard, bad=False, die=step) == [-signal.SIGKILL]
            group, first, at = store.group, shard * ROWS, REPLACE.index(step)
            if step in ("place", "record"):
                store.assert_reads(first, committed=False)
                assert group.record(shard) is None
            else:
                values, valid = group.read(range(first, first + ROWS))
                assert valid.tolist() == [True, at == len(REPLACE) - 1, True, True]
                np.testing.assert_array_equal(values[valid], store.features[first : first + ROWS][valid])
        assert group.coverage().missing == 2 * ROWS
        assert store.leases() == [f"{shard:06d}.0" for shard in range(1, len(REPLACE))]
        for each in (store, whole):
            each.fill(retry_failed=True)
        store.writer().sweep(len(REPLACE) - 1)
        assert store.leases() == []
        assert store.contents() == whole.contents()
        assert store.records() == whole.records()

    def test_a_writer_killed_in_the_middle_of_a_withdrawal(self, s3, bucket):
        """An object store has no rename: the record is there, and so is its withdrawal."""
        store = s3().fill({5: "missing"})
        store.builder.index()
        opened = store.group
        file = store.record_file(1)
        bucket.put(file.with_suffix(".withdrawn"), files.read(file))
        group = store.group
        assert group.record(1) is None
        store.assert_reads(4, committed=False)
        assert group.coverage().missing == opened.coverage().missing == ROWS
        assert [t.shard for t in pending(group)] == [1]
        store.fill()
        assert store.group.record(1).revision == 1
        np.testing.assert_array_equal(store.group.read(range(10))[0], store.features)

    def test_of_many_that_race_for_a_shard_one_commits(self, s3, small, writers):
        store, whole = s3(rows=ROWS), small(rows=ROWS)
        assert sorted(writers.commit(store, 0, bad=True, writers=4)) == [0, *[writers.HELD] * 3]
        assert store.contents() == whole.fill(all_bad(whole)).contents()
        assert store.records() == whole.records()

    def test_of_many_creates_of_one_name_one_succeeds(self, s3):
        store = s3()

        def create(content: bytes) -> bytes | None:
            try:
                files.publish(file, content)
            except FileExistsError:
                return None
            return content

        with ThreadPoolExecutor(8) as pool:
            for trial in range(5):
                file = store.path / f"race-{trial}"
                won = [c for c in pool.map(create, [b"%d" % i for i in range(8)]) if c is not None]
                assert won == [files.read(file)]

    @pytest.mark.parametrize("steps", [FRESH[3:-1], REPLACE[3:-1]], ids=["fresh", "replacing"])
    def test_a_stuck_writer_that_wakes_when_another_is_done_changes_nothing(self, s3, bucket, monkeypatch, steps):
        replacing, rows = "withdraw" in steps, ROWS * len(steps)
        store = s3(filled=replacing, bad=dict.fromkeys(range(1, rows, ROWS), "missing"), rows=rows)
        store.builder.index()
        after = []
        for shard, step in enumerate(steps):
            task = store.task(shard, retry_failed=True)

            def stuck(at: str, step=step, task=task) -> None:
                if at == step:
                    mine = store.lease_file(task.shard)
                    bucket.put(mine, files.read(mine).replace(b'"host": "', b'"host": "not-'))
                    with monkeypatch.context() as patch:
                        patch.setattr(lease, "LEASE_SECONDS", -MINUTE)  # silent for too long
                        store.commit(task)  # the other writer, from lease to release
                    after.append(bucket.all(store))

            with pytest.raises(LeaseLost):
                store.commit(task, on_step=stuck, features=store.features + 1)
            assert bucket.all(store) == after[-1], step
            np.testing.assert_array_equal(store.group[task.start], store.features[task.start])
        assert store.leases() == []

    def test_a_record_published_too_late_is_taken_back(self, s3, bucket, monkeypatch):
        """A writer stalls after its last look at the lease; the other has placed its file and not yet its record."""
        store = s3(rows=ROWS)
        task = store.task(0)

        def other(at: str) -> None:
            if at == "record":
                raise KeyboardInterrupt

        def stuck(at: str) -> None:
            if at == "record":
                mine = store.lease_file(0)
                bucket.put(mine, files.read(mine).replace(b'"host": "', b'"host": "not-'))
                with monkeypatch.context() as patch:
                    patch.setattr(lease, "LEASE_SECONDS", -MINUTE)
                    with pytest.raises(KeyboardInterrupt):
                        store.commit(task, on_step=other)
                monkeypatch.setattr(shard.lease, "check", lambda: None)  # the look that came just before

        with store.writer(stuck).begin(0, (0, ROWS), task.segment) as shard:
            store.append(shard, task, features=store.features + 1)
            with pytest.raises(LeaseLost):
                shard.commit()
        assert files.exists(store.shard_file(0))
        assert store.group.record(0) is None
        store.fill()
        np.testing.assert_array_equal(store.group[0], store.features[0])
