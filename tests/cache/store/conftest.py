"""A store with quarantined rows, and the storage formats."""

import pytest

BAD = {1: "truncated", 6: "missing"}
STORAGE = [("float16", "none"), ("float32", "zstd"), ("int8", "none"), ("int8", "zstd"), ("int4", "none")]


@pytest.fixture
def store(small):
    """Ten rows in three shards, two of them quarantined."""
    return small(dtype="float16").fill(BAD)


@pytest.fixture(params=STORAGE, ids=" ".join)
def storage(request) -> dict[str, str]:
    """How a store keeps its features, as keyword arguments of `small`."""
    dtype, compress = request.param
    return {"dtype": dtype, "compress": compress}
