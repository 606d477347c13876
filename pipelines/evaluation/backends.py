"""Which of lmms-eval's models asks a checkpoint, with which arguments, and what it is loaded by.

| what the user names | lmms-eval's model |
|---|---|
| a run folder of olavlm-train | `olavlm`, ours (`lmms_model.py`) |
| a LLaVA of transformers, as olavlm-export writes them | `llava_hf` |
| another image-text model of transformers | `olavlm_transformers`, ours (`lmms_transformers.py`) |
| a served model, by `--endpoint` | `openai` |
| anything, by `--backend` | that one |
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olavlm.pipelines.cli import JobFailed, UsageError
from olavlm.student.errors import StudentError
from olavlm.teachers import TeacherError

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms

OURS, SERVED, GENERIC = "olavlm", "openai", "olavlm_transformers"
BACKENDS = {OURS: OURS, "llava": "llava_hf", "llava_next": "llava_hf", "llava_onevision": "llava_hf"}
"""By the `model_type` of a config; GENERIC for the rest."""

ONE_BY_ONE = ("llava_hf",)
"""Those that answer one question at a time."""

KEY = "api_key"
"""The argument that a served model's key is given in."""

SECRETS = ("key", "token", "secret", "password")
"""Ends of the names of arguments that are written nowhere."""

NO_KEY = "none"
"""What a server that asks for none is given: the client wants one."""

TEACHER = "teacher_"
"""Prefix of arguments of OURS that give the place of a fused teacher, such as `teacher_depth=FOLDER`."""

_NAMES_OF_CHECKPOINT = ("pretrained", "model", "model_version", "model_path")
_CONCURRENT = 16


@dataclass(frozen=True)
class Backend:
    """A model of lmms-eval by its registered name, and what it is made with."""

    name: str
    checkpoint: str
    """Run folder, folder, hub id, or name of a served model."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """What the user asked for, of which a model that does not take it is refused: dtype, batch_size."""

    own: Mapping[str, Any] = field(default_factory=dict)
    """Arguments in lmms-eval's own terms."""

    device: str = "auto"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What nobody may read in a file or on the terminal, such as the key of a served model."""
        return tuple(str(value) for name, value in self.own.items() if is_secret(name) and value != NO_KEY)

    @property
    def chunk(self) -> int:
        """Questions that it is given together."""
        return max(int(self.options.get("batch_size", 1)), 2 * int(self.own.get("num_concurrent", 0)))


def choose(
    checkpoint: str,
    *,
    options: Mapping[str, Any],
    device: str = "auto",
    name: str | None = None,
    own: Mapping[str, Any] | None = None,
    endpoint: str | None = None,
    api_key: str | None = None,
) -> Backend:
    """The backend for a checkpoint.

    Args:
        checkpoint: what the user named.
        options: dtype, batch_size, where the user gave them.
        device: auto, cpu, cuda, cuda:N.
        name, own: `--backend` and its arguments.
        endpoint, api_key: of a served model.

    Raises:
        ModelError, JobFailed: a checkpoint that answers no questions about pictures, or is none.
    """
    own = dict(own or {})
    if endpoint is not None:
        together = options.get("batch_size", _CONCURRENT)
        given = {"base_url": endpoint, "num_concurrent": together, KEY: api_key or NO_KEY}
        return Backend(name or SERVED, checkpoint, options, given | own, device)
    if name is None:
        model_type = model_type_of(checkpoint)
        name = BACKENDS.get(model_type, GENERIC)
        if name == GENERIC:
            refuse_without_sight(checkpoint, model_type)
    if name in ONE_BY_ONE and options.get("batch_size", 1) != 1:
        raise UsageError(f"--batch-size {options['batch_size']}: lmms-eval's {name} answers one question at a time")
    return Backend(name, checkpoint, options, own, device)


def is_secret(argument: str) -> bool:
    """Whether the value of an argument of that name is one."""
    return argument.lower().endswith(SECRETS)


def model_type_of(checkpoint: str) -> str:
    """The `model_type` of a checkpoint's config; ModelError if there is none."""
    from transformers import AutoConfig

    from olavlm.student.adapter import is_adapter
    from olavlm.student.loading import load_errors

    folder = Path(checkpoint)
    if folder.exists():
        if is_adapter(folder):
            return OURS
        with load_errors(checkpoint):
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if not isinstance(found, dict) or "model_type" not in found:
                raise ValueError("its config.json names no model_type")
            if found["model_type"] == OURS:
                return OURS
    with load_errors(checkpoint):
        return AutoConfig.from_pretrained(checkpoint).model_type


def refuse_without_sight(checkpoint: str, model_type: str) -> None:
    """JobFailed for a model that is no image-text model of transformers: an LLM, a teacher, an encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise JobFailed(
            f"{checkpoint} holds a {model_type!r} model, which answers no questions about pictures; give a run folder "
            "of olavlm-train, an image-text model of transformers, or --backend"
        )


def load(backend: Backend, processes: int) -> lmms:
    """The model itself.

    Raises:
        UsageError: lmms-eval has no such model, or it does not take an option.
        StudentError, TeacherError, JobFailed: it cannot be loaded, or there is no such device.
    """
    from lmms_eval.models import get_model, list_available_models

    from .one_bos import begin_once

    names = list_available_models(include_aliases=True)
    if backend.name not in names:
        near = get_close_matches(backend.name, names, 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"--backend {backend.name}: lmms-eval has no such model{hint}")
    try:
        model_class = get_model(backend.name)
        model = model_class(**arguments_of(model_class, backend, processes))
    except (StudentError, TeacherError, JobFailed, UsageError):
        raise
    except ImportError as error:
        raise JobFailed(
            f"lmms-eval's {backend.name} needs a package that is missing ({error}): pip install "
            '"olavlm[eval]", or what the message names'
        ) from error
    except AssertionError as error:
        if processes > 1:
            raise JobFailed(
                f"lmms-eval's {backend.name} runs in several processes on CUDA alone ({error}); start one process"
            ) from error
        raise JobFailed(f"lmms-eval's {backend.name} refuses {backend.checkpoint}: {_line(error)}") from error
    except Exception as error:  # of a library that may raise anything
        raise JobFailed(f"lmms-eval's {backend.name} does not load {backend.checkpoint}: {_line(error)}") from error
    begin_once(model)
    return model


def arguments_of(model_class: type, backend: Backend, processes: int) -> dict[str, Any]:
    """Arguments of a model's class; UsageError for an option that the class does not take."""
    from olavlm.teachers.base import resolve_device

    taken = parameters_of(model_class)
    arguments = dict(backend.own)
    if not any(name in arguments for name in _NAMES_OF_CHECKPOINT):
        key = next((name for name in _NAMES_OF_CHECKPOINT if name in taken), "pretrained")
        arguments[key] = backend.checkpoint
    if "device" in taken:
        arguments.setdefault("device", str(resolve_device(backend.device)))
        if "device_map" in taken and processes == 1:  # their defaults are '', which transformers 5 refuses, and CUDA
            arguments.setdefault("device_map", arguments["device"])
    if "trust_remote_code" in taken:  # some classes do unless told not to
        arguments.setdefault("trust_remote_code", False)
    for name, value in backend.options.items():
        if name in taken:
            arguments.setdefault(name, value)
        elif name == "dtype":
            raise UsageError(f"--dtype {value}: lmms-eval's {backend.name} does not let one choose; leave it out")
    return arguments


def parameters_of(model_class: type) -> set[str]:
    """Names of what a class, or one that it hands the rest to, is made with."""
    names: set[str] = set()
    for base in model_class.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            names |= set(parameters)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return names - {"self"}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
