"""Sizes, counts, hours and money of extractions that nobody has run, as formulas.

Assumptions are named constants here and stated on the page; what was measured comes from `facts.py`.
"""

from __future__ import annotations

from olavlm.cache import Layout
from olavlm.cache.shard import CRC_BYTES

from ..cache.sizes import Shape

DATASETS = {"LLaVA-558K": 558_128, "10M": 10_000_000, "1B": 1_000_000_000}
TEACHERS = {shape.key: shape for shape in (Shape("depth", 576, 1024, 128), Shape("seg", 576, 1536, 128),
                                           Shape("gen", 1, 1024, 4096))}  # fmt: skip
CODECS = ("float16", "int8", "int4")
_INDEX_BYTES = 16  # a row, in the index of a shard file

PEAK_FLOPS = 989e12  # of an H100 SXM in dense bfloat16, as its maker says
UTILISATION = 0.4
IMAGE_BYTES = 80e3  # a JPEG of 640 x 480
BATCH = 256  # images of a training step
GPU_HOUR, TB_MONTH, MILLION_WRITES = 2.5, 20.0, 5.0  # prices in dollars, examples
KEYS_A_LISTING, LISTING_SECONDS = 1000, 0.1  # of an object store: names a LIST request gives, and how long it takes
WRITES_A_SHARD = 4  # of an object store: lease, file, record, and the lease's end


def row_bytes(shape: Shape, codec: str) -> int:
    """Of a row in a shard file: features, scales, checksums and its place in the index."""
    arrays = Layout(shape.shard_rows, shape.tokens, shape.dim, codec).arrays.values()
    return sum(array.row_bytes + CRC_BYTES + _INDEX_BYTES for array in arrays)


def image_bytes(codec: str) -> int:
    """Of all teachers, an image."""
    return sum(row_bytes(shape, codec) for shape in TEACHERS.values())


def shards(shape: Shape, rows: int) -> int:
    return -(-rows // shape.shard_rows)


def all_shards(rows: int) -> int:
    return sum(shards(shape, rows) for shape in TEACHERS.values())


def objects(rows: int, codec: str) -> int:
    """Shard files and commit records of all teachers; int8 and int4 keep their scales in a second file."""
    return all_shards(rows) * (2 if codec == "float16" else 3)


def gpu_hours(gflop: float, rows: int) -> float:
    """At the assumed share of the assumed GPU's peak; `gflop` is of an image."""
    return gflop * 1e9 * rows / (PEAK_FLOPS * UTILISATION) / 3600


def gpu_rate(gflop: float) -> float:
    """Images a second of the assumed GPU."""
    return PEAK_FLOPS * UTILISATION / (gflop * 1e9)


def listings(rows: int) -> int:
    """LIST requests for the commit records of all teachers."""
    return sum(-(-shards(shape, rows) // KEYS_A_LISTING) for shape in TEACHERS.values())


def storage_price(rows: int, codec: str) -> float:
    """Dollars a month."""
    return rows * image_bytes(codec) / 1e12 * TB_MONTH
