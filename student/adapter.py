"""What PT trained, without the base models: projector, task tokens, predictors and logit scales.

    RUN/adapter.safetensors     their weights
    RUN/adapter.json            how to build the model around them; and the tokenizer beside both

`load_checkpoint` gives a model from the run folder of any stage.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .errors import ModelError
from .extension import extend
from .model import OlaVLM
from .run_files import load_tensors, save_tensors, write_json
from .stages import ADAPTER
from .text.conversation import load_tokenizer
from .tokens import TaskSpec

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"


@dataclass
class Adapter:
    """What PT trained, and what it was trained on: two base models, or the parts of a whole one."""

    folder: Path
    llm: str
    encoder: str
    config: dict[str, Any]
    """Keyword arguments of `OlaVLM.build`, with `dtype` by its name."""
    tasks: list[TaskSpec]
    recipe_hash: str
    whole: str | None = None
    """Folder of the model that PT started from, where it was a whole one; then `llm` and `encoder` are not read."""

    def build(self, *, with_predictors: bool = True, **overrides: Any) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
        """Base models with the adapter's weights in place; `overrides` replace arguments of `OlaVLM.build`.

        Raises:
            ModelError: a base model or the adapter cannot be loaded, or the two do not fit.
        """
        tokenizer = load_tokenizer(str(self.folder))
        arguments = {**self.config, **overrides}
        if isinstance(arguments.get("dtype"), str):
            arguments["dtype"] = getattr(torch, arguments["dtype"])
        llm, encoder = arguments.pop("llm", self.llm), arguments.pop("encoder", self.encoder)
        if self.whole is None:
            model = OlaVLM.build(llm, encoder, tokenizer, self.tasks, with_predictors=with_predictors, **arguments)
        else:
            options = {name: arguments.pop(name, None) for name in ("dtype", "attn_implementation")}
            base = OlaVLM.from_pretrained(self.whole, **{k: v for k, v in options.items() if v is not None})
            model = extend(base, self.tasks, with_predictors=with_predictors, **arguments)
            model.tokenizer = tokenizer
        weights = load_tensors(self.folder / ADAPTER_WEIGHTS)
        if not with_predictors:
            weights = {k: v for k, v in weights.items() if k.partition(".")[0] not in ("predictors", "logit_scales")}
        own = {k for k in model.state_dict() if k.partition(".")[0] in ADAPTER}
        if own != set(weights):
            raise ModelError(f"{self.folder}: the adapter lacks or exceeds the model by {min(own ^ set(weights))!r}")
        try:
            model.load_state_dict(weights, strict=False)
        except RuntimeError as e:
            raise ModelError(
                f"{self.folder} does not fit {self.whole or f'{llm} and {encoder}'}: {str(e).splitlines()[-1].strip()}"
            ) from None
        return model, tokenizer


def save_adapter(
    folder: Path,
    model: OlaVLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    llm: str,
    encoder: str,
    config: dict[str, Any],
    recipe_hash: str,
    whole: str | None = None,
) -> None:
    """Write PT's result: adapter weights, how to build the model around them, and the tokenizer."""
    weights = {k: v for k, v in model.state_dict().items() if k.partition(".")[0] in ADAPTER}
    tokenizer.save_pretrained(folder)
    save_tensors(weights, folder / ADAPTER_WEIGHTS)
    content = {
        "format": 1,
        "llm": llm,
        "encoder": encoder,
        "config": config,
        "tasks": [task.to_dict() for task in model.tasks],
        "recipe_sha256": recipe_hash,
        "whole": whole,
    }
    write_json(folder / ADAPTER_CONFIG, content)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder; ModelError if there is none or it is damaged."""
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text())
        tasks = [TaskSpec.from_dict(task) for task in content["tasks"]]
        names = ("llm", "encoder", "config")
        parts = [content[name] for name in names]
        return Adapter(folder, *parts, tasks, content["recipe_sha256"], content["whole"])
    except FileNotFoundError:
        raise ModelError(f"{folder} holds neither {ADAPTER_CONFIG} (from pt) nor config.json (from ift)") from None
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError(f"{folder / ADAPTER_CONFIG} is damaged: {e}") from None


def copy_adapter(run: Path, folder: Path) -> Adapter:
    """Copies PT's result, and nothing else of its run, into an existing folder, which can be started from as the run.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    adapter = read_adapter(run)
    weights = load_tensors(run / ADAPTER_WEIGHTS)
    if stray := [name for name in weights if name.partition(".")[0] not in ADAPTER]:
        raise ModelError(f"{run / ADAPTER_WEIGHTS} holds {stray[0]!r}, which is no part of an adapter")
    load_tokenizer(str(run)).save_pretrained(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy2(run / name, folder / name)
    return adapter


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds PT's result; ModelError if the folder does not exist."""
    folder = Path(path)
    if folder.is_file():
        raise ModelError(f"checkpoint {path} is a file; give the run folder that it lies in")
    if not folder.is_dir():
        raise ModelError(f"checkpoint {path} does not exist; give a run folder of olavlm-train")
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    if (folder / "checkpoints").is_dir():
        raise ModelError(f"{path} is a run that has not finished; run the same olavlm-train command again to finish it")
    raise ModelError(f"{path} holds no checkpoint: neither {ADAPTER_CONFIG} (from pt) nor config.json (from ift)")


def whole_model(path: str | Path | None) -> str | None:
    """The folder of the whole model that a start goes back to, None for base models apart; errors of `is_adapter`."""
    if path is None:
        return None
    return read_adapter(Path(path)).whole if is_adapter(path) else str(Path(path).absolute())


def load_checkpoint(path: str | Path, dtype: torch.dtype | None = None) -> tuple[OlaVLM, PreTrainedTokenizerBase]:
    """A trained model and its tokenizer, from the run folder of any stage. ModelError if it cannot be had.

    Args:
        path: the run folder.
        dtype: of LLM and encoder; by default what they were trained in.
    """
    options = {} if dtype is None else {"dtype": dtype}
    if is_adapter(path):
        return read_adapter(Path(path)).build(with_predictors=False, **options)
    model = OlaVLM.from_pretrained(path, **options)
    return model, model.tokenizer or load_tokenizer(str(path))  # which says why there is none
