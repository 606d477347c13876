"""Model cards: what an exported model is, what it was trained with, what it scores, and how to run it.

    write_card(folder, "my-model", read_history("runs/ift"), "llava-hf", rows, notes)

A card is published, so it names models and datasets by their hub ids or the last part of a path, never this machine's
folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from olavlm.cache import CacheError, Dataset
from olavlm.cache.recorded_roots import started_in

from .cli import versions
from .reporting.runs import Run, read_run

SCORES = Path("benchmarks", "scores.json")
"""In a run folder, by `olavlm-eval`."""

PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": "liuhaotian/LLaVA-Pretrain",
    "llava_v1_5_mix665k.json": "liuhaotian/LLaVA-Instruct-150K",
}
"""Datasets on the hub, by the names of their files there."""

_TITLES = {"pt": "PT, pre-training", "vpt": "VPT, visual pre-training", "ift": "IFT, instruction tuning"}
_TRAINED_WITH = ("epochs", "max_steps", "seed", "lr", "warmup", "weight_decay", "max_grad_norm", "mixed_precision",
                 "freeze_tokens")  # fmt: skip
_OF_THE_MACHINE = ("attention", "packing", "kernels", "store", "local_cache", "local_cache_gb", "key")
"""Fields of any section that say where or how, not what."""

_TOKEN = re.compile(r"<[^<>\s]+>")
"""Outside of code, Markdown takes `<image>` and `<s>` for HTML and shows nothing."""

_STOCK = """\
```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}", backend="pil")  # the pixels of the training

question = [{{"type": "image", "path": "cat.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True).strip())
```

It needs transformers 5: older versions leave the vision tower at random values, with no more than a warning.
"""
_ADAPTER = """\
```python
from PIL import Image

from olavlm.student import load_checkpoint

model, tokenizer = load_checkpoint("{name}")  # reads the two base models, too
print(model.answer(tokenizer, Image.open("cat.jpg"), "What is this?"))
```

Training goes on from it with `olavlm-train ift --config RECIPE.yaml --init.from {name}`.
"""
_LIBRARIES = {"llava-hf": ("transformers", _STOCK), "adapter": ("olavlm", _ADAPTER)}
"""What loads the model, and how, by what it was exported to."""


@dataclass(frozen=True)
class History:
    """A run and those that it started from, in order of training."""

    runs: list[Run]
    start: str | None
    """The whole model of elsewhere that the first run started from."""
    lost: str | None = None
    """What the first run started from, where that is not there any more."""


def read_history(folder: str | Path) -> History:
    """What run folders say, as far back as they can be found; nothing is asked of a model that no run left."""
    runs: list[Run] = []
    seen: set[Path] = set()
    at: Path | None = Path(folder)
    start = lost = None
    while at is not None and at.is_dir() and at.resolve() not in seen:
        seen.add(at.resolve())
        start = _source(at)
        if not (at / "metrics.jsonl").is_file():
            break
        runs.insert(0, read_run(at, at.name))
        before = runs[0].get("init", "from")
        at = _started_from(runs[0], before) if before else None
        lost = before if at is None else None
    return History(runs, start, lost)


def _started_from(run: Run, recorded: str) -> Path | None:
    """The folder `init.from`, seen from here or from where the run was started; None where there is none."""
    base = started_in(run.folder, str(run.get("train", "output_dir") or ""))
    folders = [Path(recorded), *([] if base is None else [base / recorded])]
    return next((folder for folder in folders if folder.is_dir()), None)


def write_card(
    folder: Path,
    name: str,
    history: History,
    kind: str,
    rows: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> None:
    """Writes `README.md`, the model card, into the folder of an exported model.

    Args:
        name: of the model.
        kind: what it was exported to.
        rows: what the model is, names and values.
        notes: what its users should know, a sentence each.
    """
    library, snippet = _LIBRARIES[kind]
    bases = [history.start] if history.start else [_base(history, part) for part in ("llm", "encoder")]
    bases = [] if history.lost else list(dict.fromkeys(filter(None, bases)))
    files = [Path(file).name for run in history.runs for file in _listed(run.get("data", "file"))]
    front = {
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        "base_model": [base for base in bases if _is_hub_id(base)],
        "datasets": list(dict.fromkeys(PUBLISHED[file] for file in files if file in PUBLISHED)),
        "tags": ["olavlm", "llava"],
    }
    sections = [
        f"---\n{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)}---",
        f"# {name}",
        _introduction(kind, [_name(base) for base in bases], history.runs),
        f"## How to run it\n\n{snippet.format(name=name).rstrip()}",
        "\n".join("- " + _TOKEN.sub(lambda token: f"`{token[0]}`", note) for note in notes),
        f"## What it is\n\n{_table(('', ''), rows)}" if rows else "",
        _training(history),
        _scores(history.runs[-1].folder if history.runs else None),
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.",
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def _introduction(kind: str, bases: Sequence[str], runs: Sequence[Run]) -> str:
    distilled = any(run.get("tasks") and run.stage in (run.get("losses", "stages") or []) for run in runs)
    what = {
        "llava-hf": "A vision-language model, as a stock LLaVA",
        "adapter": "An adapter: projector, task tokens and predictors of a vision-language model, without its base "
        "models",
    }[kind]
    how = " Features of teachers were distilled into its language model ([OLA-VLM](https://arxiv.org/abs/2412.09585))."
    origin = f", trained from {' and '.join(bases)}" if bases else ""
    return f"{what}{origin}.{how if distilled else ''}"


def _training(history: History) -> str:
    runs = history.runs
    if not runs:
        return "## Training\n\nThe folder that was exported holds no record of a training."
    lost = f"It started from {_name(history.lost)}, which was not there at the export." if history.lost else ""
    rows = [_stage_row(run) for run in runs]
    head = ("stage", "data", "samples in the files", "of which used", "samples seen", "steps", "global batch")
    blocks = [
        f"### {_TITLES.get(run.stage or '', run.stage or run.name)}\n\n{_teachers(run)}```yaml\n{_recipe(run)}```"
        for run in runs
    ]
    return "\n\n".join(["## Training", *filter(None, [lost]), _table(head, rows), *blocks])


def _teachers(run: Run) -> str:
    """Whose features a run distilled or was fed."""
    told = []
    for task, card in run.teachers.items():
        model, recipe = _name(str(card.get("model") or card.get("name"))), card.get("recipe")
        recipe = recipe.get("name") if isinstance(recipe, dict) else recipe
        told.append(f"{task} of {model} ({recipe}, fingerprint {str(card.get('fingerprint'))[:16]})")
    return f"Features: {'; '.join(told)}. Their teachers' weights have licences of their own.\n\n" if told else ""


def _stage_row(run: Run) -> tuple[str, ...]:
    files = _listed(run.get("data", "file"))
    fraction, batch = run.get("data", "fraction"), run.global_batch
    steps = int(run.metrics[-1]["step"]) if run.metrics else 0
    return (
        str(run.stage),
        ", ".join(Path(file).name for file in files),
        _number(_count(files)),
        "all" if fraction in (1, None) else f"{100 * fraction:g} %",
        _number(steps * batch if batch else None),
        _number(steps),
        _number(batch),
    )


def _count(files: Sequence[str]) -> int | None:
    """Samples in dataset files; None where they are no longer there, or no longer datasets."""
    if not files or not all(_exists(file) for file in files):
        return None
    try:
        return len(Dataset(files))
    except (CacheError, OSError):
        return None


def _recipe(run: Run) -> str:
    """The fields of the resolved recipe that decide the result, as YAML."""
    kept = {name: run.get(name) for name in ("model", "tasks", "losses", "targets", "lora")}
    kept["train"] = {name: run.get("train", name) for name in _TRAINED_WITH}
    if (run.get("lora") or {}).get("rank") is None:
        del kept["lora"]
    if run.stage not in (run.get("losses", "stages") or []):
        del kept["losses"], kept["targets"]
    return yaml.safe_dump(_public(kept), sort_keys=False, default_flow_style=None, width=110)


def _public(value: Any) -> Any:
    """Without fields of the machine, those that are not set, and folders."""
    if isinstance(value, dict):
        found = {str(k): _public(v) for k, v in value.items() if k not in _OF_THE_MACHINE or isinstance(v, dict)}
        return {k: v for k, v in found.items() if v not in (None, {})}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return _name(value) if isinstance(value, str) else value


def _scores(run: Path | None) -> str:
    """Tables of `olavlm-eval`, or what is wrong with them."""
    heading = "## Scores\n\n"
    if run is None or not (run / SCORES).is_file():
        return f"{heading}None were measured before the export."
    try:
        tasks = json.loads((run / SCORES).read_text(encoding="utf-8"))["tasks"]
        rows = [
            (str(name), str(figure), *(_figure(found.get(k)) for k in ("value", "low", "high")), _number(task["items"]))
            for name, task in tasks.items()
            for figure, found in task["figures"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        return f"{heading}{SCORES.as_posix()} of the run is no file of olavlm-eval: {type(e).__name__}."
    head = ("benchmark", "figure", "value", "low", "high", "items")
    return f"{heading}Of the run that was exported, by `olavlm-eval`.\n\n{_table(head, rows)}"


def _source(folder: Path) -> str | None:
    """What a folder that `olavlm-export` wrote was made of."""
    try:
        return json.loads((folder / "export.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _base(history: History, part: str) -> str | None:
    return history.runs[0].get("model", part) if history.runs else None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


_FOLDER = re.compile(r"(?:^|(?<=[=:]))(?:~|\.{1,2})?/[^=]*")


def _name(text: str) -> str:
    """The text with the last part alone of a local path."""
    if _exists(text):
        return Path(text).name
    return _FOLDER.sub(lambda path: Path(path[0]).name, text)


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not _exists(text) and text[0] not in "./"


def _exists(text: str) -> bool:
    """Whether it is a path that leads somewhere; a text of any length may be asked about."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
