"""What can go wrong with images, datasets, plans and stores.

Every error derives from `CacheError` and from the builtin a caller would expect, and its text is one line:
the value, the rule, the remedy.
"""

from .wording import printable


class CacheError(Exception):
    """Base of every error raised by `olavlm.cache`."""


class DatasetError(CacheError, ValueError):
    """A dataset file or an image root that cannot be used."""


class PlanError(CacheError, ValueError):
    """A plan that is damaged, or that does not fit the dataset at hand."""


class StoreError(CacheError, ValueError):
    """A folder that is not a store, or a store that does not fit what is asked of it."""


class LeaseHeld(CacheError, RuntimeError):
    """Another live writer holds this shard; try again later."""


class LeaseLost(CacheError, RuntimeError):
    """This writer's lease was taken over by another; its work is dropped."""


class CorruptFeatures(CacheError, ValueError):
    """Stored bytes, or the record that vouches for them, are damaged."""


class WrongSize(CorruptFeatures):
    """A shard file that has not the size on record."""


class MissingFeatures(CacheError, KeyError):
    """A row whose shard is not committed, or an image that is not in the plan."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class MissingExtra(CacheError, ImportError):
    """A package of an optional extra of olavlm that is not installed."""


class BadImage(CacheError, ValueError):
    """An image that cannot become features.

    `reason` is one word, of `REASONS` unless a later version wrote the record; `detail` is the decoder's own message or
    the path rule that was broken. The error's text shows both as `printable` does; `image` and `detail` are what they
    are.
    """

    REASONS = (
        "missing",  # no such file under the image root
        "empty",  # zero bytes
        "not-an-image",  # no decoder knows it
        "truncated",  # it begins as an image and does not end as one
        "decompression-bomb",  # more pixels than Pillow's limit
        "outside-root",  # an absolute path, or one with `..`
        "unreadable",  # the file system or server refused it
        "unsupported-mode",  # pixels without a defined 8-bit meaning (float images)
        "non-finite",  # the teacher answered NaN or infinity
        "overflow",  # a feature does not fit the storage dtype
    )

    def __init__(self, image: str, reason: str, detail: str = "") -> None:
        super().__init__(printable(f"{image}: {reason}" + (f" ({detail})" if detail else "")))
        self.image, self.reason, self.detail = image, reason, detail

    def __reduce__(self):
        return type(self), (self.image, self.reason, self.detail)
