"""What an extraction says of itself: what it cost, what held it up, how it is getting on, and what is not there."""

import re
import sys

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import ShardTask, StoreBuilder
from olavlm.pipelines.cli import JobFailed, Progress
from olavlm.pipelines.extraction import summary
from olavlm.pipelines.extraction.extractor import ShardResult, Stages, TeacherSpec
from olavlm.pipelines.extraction.summary import Done, Tally, cost_words, summarise


def tally(**stages: float) -> Tally:
    """Of two workers, for ten seconds each."""
    found = Tally(workers=2, nodes=1, hosts=["a"], device="cuda", worker_seconds=20.0, stages=Stages(**stages))
    for shard in range(3):
        task = ShardTask("depth", shard, shard * 100, (shard + 1) * 100, "plan")
        found.add(ShardResult(task, "committed", "", 1, 2_000_000))
    return found


def test_what_it_cost():
    cost = tally(device=15.0, images=4.0, disk=1.0).cost(12.0)
    assert (cost["rows"], cost["bytes"], cost["quarantined"], cost["workers"]) == (300, 6_000_000, 3, 2)
    assert (cost["rows_per_second"], cost["bytes_per_second"]) == (25.0, 500_000.0)
    assert (cost["hours"], cost["worker_hours"]) == (pytest.approx(1 / 300), pytest.approx(1 / 180))
    assert cost["shares"] == {"device": 0.75, "images": 0.2, "disk": 0.05}
    assert cost["teachers"] == {"depth": vars(Done(3, 300, 6_000_000, 3))}


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        ("device", "the device is the bottleneck, as it should be"),
        ("images", "reading and preparing images is the bottleneck: give a worker more CPUs"),
        ("disk", "writing features is the bottleneck: use a faster disk"),
    ],
)
def test_the_bottleneck_is_named(slow, words):
    said = cost_words(tally(**{"device": 2.0, "images": 2.0, "disk": 2.0, slow: 13.0}), 12.0)
    assert words in said
    assert "extracted 300 rows, 6.0 MB, 25.00 rows/s, 0.50 MB/s, 3 shards" in said
    shares = re.search(r"device busy (\d+) %, waited for images (\d+) %, waited for disk (\d+) %", said).groups()
    assert sorted(map(int, shares)) == [10, 10, 65]
    assert "2 cuda workers on 1 node:" in said
    assert said.count("bottleneck") == 1


def test_faults_are_told():
    found = tally(device=1.0)
    assert "died" not in cost_words(found, 12.0)
    found.deaths, found.retries, found.done_by_others = 2, 5, 1
    assert "2 workers died or hung, shards were tried again 5 times, 1 were found done" in cost_words(found, 12.0)
    assert "0 rows" in cost_words(Tally(workers=1), 12.0)


@pytest.fixture
def half_done(tmp_path, write_store):
    """A store of 60 images, of which the first ten are done, one of these quarantined."""
    images = [f"{i}.jpg" for i in range(60)]
    write_store(tmp_path, images[:10], {"depth": np.zeros((10, 2, 4), np.float32)}, bad={"3.jpg": "truncated"})
    builder = StoreBuilder(tmp_path)
    builder.extend_plan(pa.array(images, pa.large_string()))
    return builder.path


def test_rows_that_are_missing_are_named(half_done, capsys, monkeypatch):
    depth = [TeacherSpec("depth", "depth", None)]
    with pytest.raises(JobFailed, match="incomplete: 1 rows quarantined, 50 missing"):
        summarise(half_done, depth, None, Tally(), 1.0, None)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("depth row 3: 3.jpg: truncated")
    assert said[1:] == [f"depth row {4086 + i} {i}.jpg: missing" for i in range(10, 60)]
    monkeypatch.setattr(summary, "NAMED_MISSING", 2)
    with pytest.raises(JobFailed, match="2 shards given up: depth shard 1, 3 times: why; and 1 more"):
        summarise(half_done, depth, None, Tally(given_up=["depth shard 1, 3 times: why", "another"]), 1.0, None)
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "depth row 4097 11.jpg: missing",
        "depth rows 4098 to 4145: missing",
    ]


def test_what_was_not_wanted_is_not_missing(half_done, capsys):
    with pytest.raises(JobFailed, match="incomplete: 1 rows quarantined, 0 missing"):
        summarise(half_done, [TeacherSpec("depth", "depth", None)], 10, Tally(), 1.0, None)
    assert ": missing\n" not in capsys.readouterr().err


class TestProgress:
    @pytest.fixture
    def at(self, monkeypatch):
        """at(seconds) sets the clock."""
        now = [100.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        return lambda seconds: now.__setitem__(0, 100.0 + seconds)

    def test_a_plain_line_now_and_then(self, at, capsys):
        progress = Progress(100, "rows", "extracting")
        at(10)
        progress.begin()  # the models are loaded
        at(14)
        progress.update(10, "3 quarantined")
        assert capsys.readouterr().err == ""
        at(30)
        progress.update(0, "4 quarantined")
        assert capsys.readouterr().err == "extracting: 10/100 rows, 0.50 rows/s, ETA 03:00, 4 quarantined\n"
        progress.say("a worker died")
        assert capsys.readouterr().err == "a worker died\n"

    def test_nothing_is_done_yet(self, at, capsys):
        progress = Progress(100, "rows", "extracting")
        at(20)
        progress.update(0)
        assert capsys.readouterr().err == "extracting: 0/100 rows, 0.00 rows/s, ETA unknown\n"

    def test_a_bar_on_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        progress = Progress(100, "rows", "extracting")
        progress.begin()
        progress.update(10, "3 quarantined")
        progress.say("a worker died")
        progress.close()
        said = capsys.readouterr().err
        assert "10/100" in said
        assert "3 quarantined" in said
        assert "\na worker died\n" in said.replace("\r", "\n")
