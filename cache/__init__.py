"""Images and datasets in, teacher features stored and read back.

Knows nothing of teachers or training. Start with `FeatureStore` to read a store, `StoreBuilder` to make one.
"""

from .builder import ShardTask, StoreBuilder, pending
from .commit import OpenShard, ShardWriter
from .dataset import Dataset, Sample
from .errors import (
    BadImage,
    CacheError,
    CorruptFeatures,
    DatasetError,
    LeaseHeld,
    LeaseLost,
    MissingExtra,
    MissingFeatures,
    PlanError,
    StoreError,
)
from .features import Coverage, TeacherFeatures
from .images import ImageRoots, decode_rgb
from .local_cache import LocalCache
from .plan import Plan
from .shard import Layout
from .store import FeatureStore
from .transfer import Transfer, convert, merge
from .verify import Finding, verify

__all__ = [
    "BadImage",
    "CacheError",
    "CorruptFeatures",
    "Coverage",
    "Dataset",
    "DatasetError",
    "FeatureStore",
    "Finding",
    "ImageRoots",
    "Layout",
    "LeaseHeld",
    "LeaseLost",
    "LocalCache",
    "MissingExtra",
    "MissingFeatures",
    "OpenShard",
    "Plan",
    "PlanError",
    "Sample",
    "ShardTask",
    "ShardWriter",
    "StoreBuilder",
    "StoreError",
    "TeacherFeatures",
    "Transfer",
    "convert",
    "decode_rgb",
    "merge",
    "pending",
    "verify",
]
