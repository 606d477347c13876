"""Run folders, and the checkpoints in them that a run is resumed from.

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
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from google_crc32c import extend as extend_crc32c
from safetensors import SafetensorError
from torch import nn

from olavlm.cache import files as cache_files
from olavlm.student.errors import TrainingError
from olavlm.student.run_files import load_tensors, save_tensors, write_json

from .identity import Identity, difference
from .parallel import Parallel

_BLOCK = 2**24


def save_step(run: Path, step: int, parallel: Parallel, identity: Identity, keep: int) -> None:
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
            _flush(private)  # before an older one goes: a power cut may come
            shutil.rmtree(folder, ignore_errors=True)
            private.rename(folder)
            cache_files.fsync_folder(folder.parent)
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


def _flush(folder: Path) -> None:
    """Have the disk keep all that is below."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            cache_files.fsync_folder(path)
        else:
            with path.open("rb") as f:
                os.fsync(f.fileno())


def check_agreed(first_step: int, run: Path, accelerator: Accelerator) -> None:
    """TrainingError if processes would go on from different steps: a run folder that not all nodes share."""
    steps = accelerator.gather(torch.tensor([first_step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise TrainingError(
            f"processes found different checkpoints in {run}, of steps {sorted(set(steps))}: put the run folder on a "
            "file system that all nodes share"
        )


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
