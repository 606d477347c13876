"""Finding, identifying and loading a teacher's Hugging Face checkpoint: safetensors only, complete or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from olavlm.teachers.errors import TeacherError

WEIGHTS, WEIGHTS_INDEX, SAFETENSORS = "model.safetensors", "model.safetensors.index.json", ".safetensors"
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
MIRRORS = {"stabilityai/stable-diffusion-2-1-unclip": "sd2-community/stable-diffusion-2-1-unclip"}
"""Of teachers' own checkpoints that their owners have withdrawn from the hub since."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on this machine; one in the hub's cache is a folder like any other."""

    model: str
    """What the user named: a hub id or a folder."""
    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    revision: str | None
    """Commit of the hub repository; None for a folder."""

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; {} where the folder has none."""
        path = self.folder / name
        return _read_json(path, self.model) if path.is_file() else {}


def weights_digest(weights: tuple[Path, ...]) -> str:
    """SHA-256 of a checkpoint's weights, in hex, whatever its files are called and wherever they lie.

    One file: the digest of its bytes, as the hub shows it. Shards: the digest of their sorted hex digests.
    """
    digests = []
    for path in weights:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def open_checkpoint(
    model: str, *, revision: str | None, model_types: tuple[str, ...], subfolder: str = ""
) -> Checkpoint:
    """Find the checkpoint `model`: a folder on this machine, else a hub id (from the hub's cache when offline).

    Args:
        model: folder or hub id.
        revision: branch, tag or commit of a hub repository.
        model_types: the `model_type` values in config.json that the teacher can run.
        subfolder: where in the repository the checkpoint lies; a local folder may also be the subfolder itself.

    Raises:
        TeacherError: no such folder or repository, no config.json, another architecture, no safetensors.
    """
    root = Path(model).expanduser()
    if root.is_dir():
        if revision is not None:
            raise TeacherError(
                f"{model}: a folder has no revision {revision!r}; leave the revision out or name a hub id"
            )
        folder = root / subfolder if (root / subfolder).is_dir() else root
        if not (folder / "config.json").is_file():
            raise TeacherError(f"{folder}: no config.json; name the folder that save_pretrained wrote")
    else:
        folder, revision = _from_hub(model, revision, subfolder)
    config = _read_json(folder / "config.json", model)
    if config.get("model_type") not in model_types:
        raise TeacherError(
            f"{model}: its config.json says model_type {config.get('model_type')!r}, "
            f"this teacher runs {' or '.join(model_types)}; name another model or another teacher"
        )
    return Checkpoint(model, folder, config, _weight_files(folder, model), revision)


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TeacherError(f"{model}: {path.name} cannot be read ({one_line(error)}); fetch it again") from error
    if not isinstance(values, dict):
        raise TeacherError(f"{model}: {path.name} is not a JSON object; fetch it again")
    return values


def _weight_files(folder: Path, model: str) -> tuple[Path, ...]:
    """The files from_pretrained would load, in its order of preference."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / WEIGHTS_INDEX).is_file():
        weight_map = _read_json(folder / WEIGHTS_INDEX, model).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if not files or missing:
            raise TeacherError(f"{model}: {WEIGHTS_INDEX} names files that are missing ({missing}); fetch it again")
        return tuple(files)
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
    raise TeacherError(
        f"{model}: no {WEIGHTS}{', only pickled weights' if pickled else ''}, and only safetensors are read; "
        "save it again with save_pretrained, or name a revision that has them"
    )


def _from_hub(repository: str, revision: str | None, subfolder: str) -> tuple[Path, str]:
    """Folder in the hub's cache with the files a teacher needs, and the commit it is a snapshot of."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(filename: str) -> Path:
        return Path(hf_hub_download(repository, filename, subfolder=subfolder or None, revision=revision))

    with _hub_errors(repository):
        folder = fetch("config.json").parent
        # The repository's root in the cache is .../snapshots/COMMIT; later files are pinned to that commit.
        revision = (folder.parent if subfolder else folder).name
        for optional in (PROCESSOR, PREPROCESSOR):
            with suppress(EntryNotFoundError):
                fetch(optional)
        try:
            fetch(WEIGHTS)
        except EntryNotFoundError as no_single_file:
            try:
                index = fetch(WEIGHTS_INDEX)
            except EntryNotFoundError:
                if isinstance(no_single_file, LocalEntryNotFoundError):
                    raise no_single_file from None  # the hub was not reached, so nobody knows what it has
            else:
                for shard in set(_read_json(index, repository).get("weight_map", {}).values()):
                    fetch(shard)
    return folder, revision


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What goes wrong with the hub, as one line for the user."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise TeacherError(f"{repository}: no such folder or file, and not a hub id; give one of them") from error
    except TeacherError:
        raise
    except Exception as error:  # the hub client's errors and its transport's share no base class
        remedy = "check the name and the network, or name a folder"
        if repository in MIRRORS:
            remedy = f"its owner withdrew it there: name {MIRRORS[repository]}, which has the same weights, or a folder"
        raise TeacherError(
            f"{repository}: no such folder, and not to be had from the Hugging Face hub or its cache "
            f"({type(error).__name__}); {remedy}"
        ) from error


def open_weights(model: str, *, revision: str | None, config: str, weights: tuple[str, ...], marker: str) -> Checkpoint:
    """Find a checkpoint that is one safetensors file, as timm and open_clip keep theirs: a file, a folder or a hub id.

    Args:
        model: file, folder or hub id.
        revision: branch, tag or commit of a hub repository.
        config: what the library calls its configuration. A folder or repository must have it; beside a file named
            itself it counts where it is there.
        weights: what the library calls the weights, best first.
        marker: a key of the configuration without which it is not the library's.

    Raises:
        TeacherError: nothing there, no configuration of the library, no safetensors.
    """
    path = Path(model).expanduser()
    if not path.exists() and path.suffix != SAFETENSORS:
        file, revision = fetch_weights(model, revision, weights, config=config)
    elif revision is not None:
        raise TeacherError(f"{model}: a file has no revision {revision!r}; leave the revision out or name a hub id")
    elif path.is_dir():
        file = next((path / name for name in weights if (path / name).is_file()), None)
    else:
        file = path
    if file is None or file.suffix != SAFETENSORS:
        raise TeacherError(
            f"{model}: no {' or '.join(weights)}, and only safetensors are read; write the tensors with "
            "safetensors.torch.save_file"
        )
    if not file.is_file():
        raise TeacherError(f"{model}: no such file; check the path")
    described = _read_json(file.parent / config, model) if (file.parent / config).is_file() else {}
    if marker not in described:
        if not path.is_file():
            raise TeacherError(f"{model}: no {config} with {marker!r} in it; name the file of weights itself")
        described = {}
    return Checkpoint(model, file.parent, described, (file,), revision)


def fetch_weights(
    repository: str, revision: str | None, names: tuple[str, ...], *, config: str | None = None
) -> tuple[Path | None, str | None]:
    """The first of the files `names` that a hub repository has, None for none, and the commit it is of.

    Args:
        config: another file, fetched first; it must be there.

    Raises:
        TeacherError: no such repository, no `config` in it, or the hub is not reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(filename: str) -> Path:
        return Path(hf_hub_download(repository, filename, revision=revision))

    with _hub_errors(repository):
        if config is not None:
            revision = fetch(config).parent.name
        absent: EntryNotFoundError | None = None
        for name in names:
            try:
                file = fetch(name)
                return file, file.parent.name
            except EntryNotFoundError as error:
                absent = error
        if isinstance(absent, LocalEntryNotFoundError):
            raise absent  # the hub was not reached, so nobody knows what it has
    return None, revision


def load_model(
    cls: type, checkpoint: Checkpoint, *, part: str | tuple[str, ...] = "", unused: tuple[str, ...] = ()
) -> Any:
    """`cls.from_pretrained` on the folder, in float32, with every tensor of the part we run taken from the file.

    from_pretrained draws tensors that the file lacks at random and goes on; here that is an error.

    Args:
        cls: a transformers model class.
        checkpoint: what `open_checkpoint` found.
        part: prefix, or prefixes, of the parameters that are run.
        unused: pieces of parameter names inside that part which the features do not depend on.

    Raises:
        TeacherError: unreadable weights, weights of other shapes, or missing ones.
    """
    try:
        with quiet():
            model, report = cls.from_pretrained(
                checkpoint.folder,
                dtype="float32",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported like the missing ones
            )
    except Exception as error:  # a damaged file fails in any of three libraries, each with errors of its own
        raise TeacherError(
            f"{checkpoint.model}: {cls.__name__} cannot load it ({one_line(error)}); fetch or save it again"
        ) from error
    drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    drawn = sorted(name for name in drawn if name.startswith(part) and not any(piece in name for piece in unused))
    if drawn:
        raise TeacherError(
            f"{checkpoint.model}: its weights lack {len(drawn)} tensors of {cls.__name__} or have another shape "
            f"(such as {drawn[0]}); fetch or save the whole model again"
        )
    return model


def one_line(error: Exception) -> str:
    return shorten(str(error), 300) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its load report, a table of parts we drop; we raise on what matters."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
