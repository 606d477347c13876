"""Run folders: what a run starts from, leaves behind, and is resumed from.

    RUN/recipe.yaml versions.json stage.json    the resolved recipe, versions, and what trained
    RUN/metrics.jsonl
    RUN/checkpoints/step-000200/                trained parameters, optimizer state, step, checksums
    RUN/adapter.safetensors adapter.json        PT's result: projector, task tokens, predictors, logit scales
    RUN/config.json model.safetensors ...       VPT's and IFT's result: a whole model, for `OlaVLM.from_pretrained`

Neither teachers nor a frozen LLM are ever written. Weights are safetensors, optimizer states are read with
`weights_only`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google_crc32c import extend as extend_crc32c
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from olavlm.student.errors import ModelError, TrainingError
from olavlm.student.extension import extend
from olavlm.student.model import OlaVLM
from olavlm.student.stages import ADAPTER
from olavlm.student.tensor_files import load_tensors, save_tensors
from olavlm.student.text.conversation import load_tokenizer
from olavlm.student.tokens import TaskSpec

from .identity import Identity, difference
from .parallel import Replicated

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
_BLOCK = 2**24


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


def save_step(run: Path, step: int, parallel: Replicated, identity: Identity, keep: int) -> None:
    """Write `checkpoints/step-...`, which appears whole or not at all, and remove all but the newest `keep`.

    Every process takes part; the main one writes.

    Raises:
        TrainingError: it could not be written; those before it stay.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    private = folder.with_name(f".{folder.name}")
    writes, wait = parallel.accelerator.is_main_process, parallel.accelerator.wait_for_everyone
    with writing(f"checkpoint {folder}", run, private):
        if writes:
            shutil.rmtree(private, ignore_errors=True)
            private.mkdir(parents=True)
        trained = parallel.trained()
        if writes:
            save_tensors(trained, private / "trained.safetensors")
        del trained
        wait()
        parallel.save_optimizer(private)
        wait()
        if writes:
            # DeepSpeed's are in a folder of theirs.
            written = [file for file in sorted(private.rglob("*")) if file.is_file()]
            files = {str(file.relative_to(private)): _checksum(file) for file in written}
            write_json(private / "state.json", {"step": step, "identity": identity, "files": files})
            shutil.rmtree(folder, ignore_errors=True)
            private.rename(folder)
    if writes:
        for old in _checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    wait()


@contextmanager
def writing(what: str, folder: Path, private: Path | None = None) -> Iterator[None]:
    """Within, what is written into a folder; what was begun in `private` is removed if that fails.

    Raises:
        TrainingError: it could not be written; says how much room was left.
    """
    try:
        yield
    except Exception as e:
        # On a full disk safetensors, tokenizers (an Exception with the system's words) and PyTorch raise their own.
        words = ("(os error ", "inline_container")
        if not isinstance(e, (OSError, SafetensorError)) and not any(word in str(e) for word in words):
            raise
        left = shutil.disk_usage(folder).free
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
        raise TrainingError(
            f"{what} could not be written ({str(e).splitlines()[0]}), with {left / 1e6:.0f} MB left there; make room, "
            "then run the same command again to go on from the last checkpoint"
        ) from None


def latest_step(run: Path, identity: Identity) -> tuple[Path | None, int]:
    """The newest checkpoint of a run and its step, (None, 0) if there is none.

    Raises:
        TrainingError: the checkpoint is of a run with another identity; says what differs.
    """
    folders = _checkpoints(run)
    if not folders:
        return None, 0
    try:
        state = _state(folders[-1])
        step, written_by = int(state["step"]), dict(state["identity"])
    except (KeyError, TypeError, ValueError) as e:
        raise _damaged(folders[-1], f"state.json: {e}") from None
    if (differs := difference(written_by, identity)) is not None:
        raise TrainingError(f"{run} holds {differs}; go back to that to resume it, or use another output folder")
    return folders[-1], step


def check_files(folder: Path) -> None:
    """TrainingError for a checkpoint whose files are not byte for byte what was written."""
    try:
        files = {name: (int(size), int(crc)) for name, (size, crc) in _state(folder)["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _damaged(folder, f"state.json: {e}") from None
    for name, written in files.items():
        try:
            found = _checksum(folder / name)
        except OSError as e:
            raise _damaged(folder, f"{name}: {e.strerror}") from None
        if found != written:
            raise _damaged(folder, f"{name} is not what was written")


def _checkpoints(run: Path) -> list[Path]:
    """By step, ascending."""
    steps = {path: path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_bytes())
    except OSError as e:
        raise ValueError(e.strerror) from None


def _damaged(checkpoint: Path, why: str) -> TrainingError:
    return TrainingError(f"checkpoint {checkpoint} is damaged ({why}); remove it to resume from the one before")


def _checksum(file: Path) -> tuple[int, int]:
    """Size in bytes, and crc32c: a flipped bit in a tensor would load without a word."""
    size = crc = 0
    with file.open("rb") as f:
        while block := f.read(_BLOCK):
            size, crc = size + len(block), extend_crc32c(crc, block)
    return size, crc


def load_trained(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's parameters into a model that is whole, bit for bit."""
    weights = load_tensors(folder / "trained.safetensors")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(weights) != set(own):
        raise TrainingError(f"checkpoint {folder} holds other parameters than those that train")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def write_json(file: Path, content: object) -> None:
    """Replace a file as a whole."""
    private = file.with_name(f".{file.name}")
    private.write_text(json.dumps(content, indent=1) + "\n")
    private.replace(file)
