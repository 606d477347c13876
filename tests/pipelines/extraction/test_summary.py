"""The end of an extraction names what is not there."""

import numpy as np
import pyarrow as pa
import pytest

from olavlm.cache import StoreBuilder
from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.extraction.extractor import TeacherSpec
from olavlm.pipelines.extraction.summary import NAMED_FAILURES, Tally, summarise


@pytest.fixture
def half_done(tmp_path, write_store):
    """A store of 60 images, of which the first ten are done, one of these quarantined."""
    images = [f"{i}.jpg" for i in range(60)]
    write_store(tmp_path, images[:10], {"depth": np.zeros((10, 2, 4), np.float32)}, bad={"3.jpg": "truncated"})
    builder = StoreBuilder(tmp_path)
    builder.extend_plan(pa.array(images, pa.large_string()))
    return builder.path


def test_rows_that_are_missing_are_named_and_the_rest_counted(half_done, capsys):
    depth = [TeacherSpec("depth", "depth", None)]
    with pytest.raises(JobFailed, match="incomplete: 1 rows quarantined, 50 missing"):
        summarise(half_done, depth, None, Tally(), 1.0, None)
    named = [line for line in capsys.readouterr().err.splitlines() if line.endswith(": missing")]
    assert len(named) == NAMED_FAILURES
    assert all(line.startswith("depth row ") for line in named)
    with pytest.raises(JobFailed, match="2 shards given up: depth shard 1, 3 times: why; and 1 more"):
        summarise(half_done, depth, None, Tally(given_up=["depth shard 1, 3 times: why", "another"]), 1.0, None)
    assert f"... and {50 - NAMED_FAILURES} more rows are missing" in capsys.readouterr().err


def test_what_was_not_wanted_is_not_missing(half_done, capsys):
    with pytest.raises(JobFailed, match="incomplete: 1 rows quarantined, 0 missing"):
        summarise(half_done, [TeacherSpec("depth", "depth", None)], 10, Tally(), 1.0, None)
    assert ": missing\n" not in capsys.readouterr().err
