"""Checkpoints of the library: loaded complete or not at all, and what is wrong with one said in one line."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from olavlm.student.errors import ModelError, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of weights, by the names that recipes give them."""
_BUILT_IN_ATTENTION = (None, "sdpa", "eager")
"""What needs no package beside PyTorch."""

_REFUSED = (ImportError, OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError)
_BAD_CONFIG = (StrictDataclassError, TypeError, AttributeError, KeyError, ArithmeticError)
"""What the library raises of fields that are not of their type, or that no model can be made of."""

_NOT_ON_THE_HUB = (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError)


def load_complete(model_class: Any, path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """`model_class.from_pretrained(path)`, refusing a checkpoint that leaves weights at random values.

    Raises:
        ModelError: one line that names the checkpoint and what is wrong with it.
        RecipeError: an `attn_implementation` whose package is not installed.
    """
    with load_errors(path, kwargs.get("attn_implementation")):
        model, info = model_class.from_pretrained(str(path), output_loading_info=True, **kwargs)
    refuse_missing(path, info)
    return model


@contextmanager
def load_errors(path: str | Path, attention: str | None = None) -> Iterator[None]:
    """Turns what the library raises while it loads a checkpoint into a `ModelError` of one line.

    An `attention` that lacks its package is a `RecipeError`: another value of the recipe is the remedy.
    """
    try:
        if Path(path).is_file():  # the library would take any file for a config, or for pickled weights
            raise OSError("not a folder")
        yield
    except (*_REFUSED, *_BAD_CONFIG) as error:
        reason = why_not_loaded(path, error)
        if isinstance(error, _BAD_CONFIG) and not isinstance(error, _REFUSED):
            reason = f"its config cannot be used ({type(error).__name__}: {reason})"
        if isinstance(error, ImportError) and attention not in _BUILT_IN_ATTENTION:
            raise RecipeError(
                f"attention {attention!r} cannot be used: {reason.rstrip('.')}; install it, or use sdpa or eager"
            ) from error
        raise ModelError(f"cannot load a model from {str(path)!r}: {reason}") from error


def read_config_fields(source: str | Path) -> dict[str, Any]:
    """The config.json of a folder or hub id, as it stands there. ModelError for none, or one that holds no fields."""
    with load_errors(source):
        fields, _ = PreTrainedConfig.get_config_dict(str(source))
    if not isinstance(fields, dict):
        raise ModelError(f"{source}: config.json holds {type(fields).__name__}, not fields of a model")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str | None):
        raise ModelError(f"{source}: config.json has model_type {model_type!r}; it must be text")
    return fields


def why_not_loaded(path: str | Path, error: BaseException) -> str:
    """One line on why a checkpoint, a hub id or a folder, could not be loaded."""
    if Path(path).is_file():
        return "it is a file; give the folder that it lies in"
    gated = isinstance(error.__cause__, GatedRepoError)  # of such a one the library says what to do
    if isinstance(error.__cause__, _NOT_ON_THE_HUB) and not gated and not Path(path).is_dir():
        return "it is neither a local folder nor reachable as a hub id; check the name and the network"
    first, _, rest = str(error).strip().partition("\n")
    if "ignore_mismatched_sizes" in str(error):  # the library's advice is to its callers
        return "its weights have other shapes than its config.json gives them; take both from one checkpoint"
    if first.rstrip().endswith(":"):
        first = shorten(f"{first} {rest}", 300)
    return first or type(error).__name__


def refuse_missing(path: str | Path, info: Mapping[str, Any]) -> None:
    """ModelError when the library's loading info names weights that the checkpoint lacks."""
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{str(path)!r} lacks {len(missing)} weights of the model, such as {missing[0]!r}")


def find_file(place: str | Path, *filenames: str) -> Path | None:
    """The first of some files that a folder or hub repository has. ModelError if there is no such place."""
    for filename in filenames:
        with load_errors(place):
            file = cached_file(str(place), filename, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            return Path(file)
    return None
