"""olavlm-export: our models to those of other projects, and theirs to ours.

olavlm-export runs/ift my-model --to llava-hf                                a stock LLaVA that needs none of our code
olavlm-export runs/pt my-adapter --to adapter                                what PT trained, without the base models
olavlm-export llava-hf/llava-1.5-7b-hf start --from llava-hf --to olavlm     stock LLaVA, as a starting point
olavlm-export shi-labs/OLA-VLM-CLIP-ViT-Llama3-8b ola --from visper-lm --to olavlm     a model of the authors
olavlm-train ift --config RECIPE.yaml --init.from start

The first two write a model card.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import JobFailed, UsageError, command, quiet_models, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from olavlm.student.formats.llava_hf import Converted
    from olavlm.student.model import OlaVLM

RECORD = "export.json"


def arguments() -> argparse.ArgumentParser:
    sources, kinds = (list(dict.fromkeys(names)) for names in zip(*CONVERSIONS, strict=True))
    p = argparse.ArgumentParser(
        prog="olavlm-export",
        description="Turn a checkpoint of one kind into another. To llava-hf: a trained model becomes a stock LLaVA "
        "(LlavaForConditionalGeneration, LlavaProcessor, chat template) with the same logits, in which task tokens are "
        "vocabulary rows. To adapter: what PT trained, without its base models. From llava-hf to olavlm: a stock LLaVA "
        "becomes a model without task tokens, with the same logits, that olavlm-train starts from and olavlm-generate "
        "asks. From visper-lm to olavlm: a checkpoint that the authors of OLA-VLM / VisPer-LM published, pretrained or "
        "finetuned, with the same logits, task tokens and predictors.",
        epilog="example: olavlm-export runs/ift my-model --to llava-hf; or: olavlm-export runs/pt my-adapter "
        "--to adapter; or: olavlm-export llava-hf/llava-1.5-7b-hf start --to olavlm",
        allow_abbrev=False,
    )
    p.add_argument("source", metavar="SOURCE", help="checkpoint folder or hub id")
    p.add_argument("out", metavar="OUT", type=Path, help="new folder")
    p.add_argument("--from", dest="source_kind", choices=sources, help="what SOURCE is; its config says it by default")
    p.add_argument("--to", dest="kind", choices=kinds, required=True, help="what OUT is")
    p.add_argument(
        "--template",
        metavar="NAME",
        help="prompt template of the model: llama_3, phi_3, vicuna_v1, or chat, the tokenizer's own; by default the "
        "one that its chat template writes, or that the language model of visper-lm was trained with",
    )
    p.add_argument(
        "--encoder",
        metavar="NAME",
        help="where the vision tower lies, if not where the checkpoint says (from visper-lm)",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of all weights; by default that of the language model's (to llava-hf)",
    )
    return p


@command("olavlm-export")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise JobFailed(f"{args.out} exists; name another folder, or remove it")
    place = args.out.resolve()  # a link to an empty folder is one
    if place == Path.cwd() or place.is_mount():
        raise JobFailed(f"{args.out} cannot be replaced, as the working folder or a mount; name a new folder in it")
    quiet_models()
    args.source_kind = args.source_kind or kind_of(args.source)
    check_usage(args)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as staging:
        folder = Path(staging, "model")
        CONVERSIONS[args.source_kind, args.kind](args, folder)
        folder.rename(place)  # appears whole or not at all
    print(f"{args.out}: done", flush=True)
    return 0


def check_usage(args: argparse.Namespace) -> None:
    """UsageError for a conversion that there is not, or an option of another one."""
    if (args.source_kind, args.kind) not in CONVERSIONS:
        kinds = [kind for source, kind in CONVERSIONS if source == args.source_kind]
        raise UsageError(f"{args.source} is {args.source_kind}; --to takes {', '.join(kinds)} for it, not {args.kind}")
    if args.dtype is not None and args.kind != "llava-hf":
        raise UsageError("--dtype is for --to llava-hf")
    if args.template is not None and args.source_kind == "olavlm":
        raise UsageError("--template is for models of others; ours say theirs")
    if args.encoder is not None and args.source_kind != "visper-lm":
        raise UsageError("--encoder is for --from visper-lm; other checkpoints hold their vision tower")


def kind_of(source: str) -> str:
    """What a checkpoint is, by its config. ModelError without one, JobFailed for none that we know."""
    from olavlm.student.adapter import ADAPTER_CONFIG  # the import registers our config
    from olavlm.student.loading import read_config_fields

    if any(Path(source, name).is_file() for name in (ADAPTER_CONFIG, "stage.json")):  # a run, finished or not
        return "olavlm"
    fields = read_config_fields(source)
    model_type = fields.get("model_type")
    if "mm_vision_tower" in fields:  # as LLaVA's own code writes it, whatever it calls the model
        return "visper-lm"
    if model_type is None:
        raise JobFailed(f"{source} has no config.json that names a kind of model; give a checkpoint folder or a hub id")
    if model_type not in KINDS:
        raise JobFailed(
            f"{source} holds a {model_type!r} model; --from takes {', '.join(dict.fromkeys(KINDS.values()))}"
        )
    return KINDS[model_type]


def llava_hf_to_olavlm(args: argparse.Namespace, folder: Path) -> None:
    """StudentError for a checkpoint that cannot be taken, and why."""
    from olavlm.student.formats.llava_hf import from_llava_hf

    write_olavlm(args, from_llava_hf(args.source, args.template), folder)


def visper_lm_to_olavlm(args: argparse.Namespace, folder: Path) -> None:
    """StudentError for a checkpoint that cannot be taken, and why."""
    from olavlm.student.formats.visper_lm import from_visper_lm

    write_olavlm(args, from_visper_lm(args.source, args.template, args.encoder), folder)


def write_olavlm(args: argparse.Namespace, converted: Converted, folder: Path) -> None:
    """A model that was read from elsewhere, and a record of how; says what it is."""
    from olavlm.student.run_files import write_json

    model, config = converted.model, converted.model.config
    for note in converted.notes:
        print(note)
    print(
        f"{config.text_config.model_type} of {config.text_config.vocab_size} vocabulary rows, "
        f"{config.vision_config.model_type} of {model.vision.num_tokens} image tokens at layer {config.select_layer}; "
        f"template {config.template}, geometry {config.geometry}"
    )
    if model.tasks:
        names = ", ".join(task.name for task in model.tasks)
        print(
            f"{config.num_task_tokens} tokens each of {names}, with{'' if config.with_predictors else 'out'} predictors"
        )
    model.save_pretrained(folder)
    record = {"source": args.source, "from": args.source_kind, "to": args.kind, "template": config.template}
    write_json(folder / RECORD, record | {"notes": converted.notes, "versions": versions()})


def olavlm_to_llava_hf(args: argparse.Namespace, folder: Path) -> None:
    """StudentError for a run that cannot be loaded, or that stock LLaVA cannot hold, and why."""
    from olavlm.student.adapter import load_checkpoint

    write_llava_hf(args, *load_checkpoint(args.source), folder)


def visper_lm_to_llava_hf(args: argparse.Namespace, folder: Path) -> None:
    """StudentError for a checkpoint that cannot be taken, or that stock LLaVA cannot hold, and why."""
    from olavlm.student.formats.visper_lm import from_visper_lm

    converted = from_visper_lm(args.source, args.template, args.encoder)
    write_llava_hf(args, converted.model, converted.model.tokenizer, folder, converted.notes)


def write_llava_hf(
    args: argparse.Namespace,
    model: OlaVLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    notes: Sequence[str] = (),
) -> None:
    """A model of ours as stock LLaVA, with its card and the notes of how it was read; says what it is."""
    import torch

    from olavlm.student.formats.llava_hf_export import to_llava_hf

    exported = to_llava_hf(model, tokenizer, args.dtype and getattr(torch, args.dtype))
    exported.save(folder)
    config, tokens = model.config, exported.text.task_tokens
    tasks = ", ".join(task.name for task in model.tasks)
    rows = [
        ("language model", f"{config.text_config.model_type}, {exported.model.config.text_config.vocab_size:,} rows"),
        ("encoder", f"{config.vision_config.model_type}, layer {config.select_layer}"),
        ("images", f"{config.image_transform.size} pixels, geometry {config.geometry}"),
        ("tokens for an image", f"{model.num_image_tokens}, and {len(tokens)} task tokens{tasks and f' ({tasks})'}"),
        ("prompt template", config.template),
        ("weights", str(exported.model.dtype).removeprefix("torch.")),
    ]
    write_records(args, folder, rows, [*notes, *exported.notes])


def olavlm_to_adapter(args: argparse.Namespace, folder: Path) -> None:
    """JobFailed for a run that left no adapter, ModelError for one that is damaged."""
    from olavlm.student.adapter import copy_adapter, is_adapter

    if not is_adapter(args.source):
        raise JobFailed(
            f"{args.source} holds a whole model, of which the language model was trained too; an adapter is what pt "
            "trained: give the run folder of pt, or take --to llava-hf"
        )
    folder.mkdir()
    adapter = copy_adapter(Path(args.source), folder)
    places = {"llm": adapter.llm, "encoder": adapter.encoder} if adapter.whole is None else {"whole": adapter.whole}
    local = [name for name, place in places.items() if Path(place).exists()]
    notes = [
        f"{name} in adapter.json is a folder of the machine that trained it; write a hub id there for other machines"
        for name in local
    ]
    tasks = ", ".join(f"{task.name} at {list(task.layers)}" for task in adapter.tasks)
    rows = [("recipe", f"sha256 {adapter.recipe_hash}"), ("tasks", tasks or "none")]
    write_records(args, folder, rows, notes)


def write_records(args: argparse.Namespace, folder: Path, rows: list[tuple[str, str]], notes: list[str]) -> None:
    """The model card, and what is printed of it."""
    from .model_card import History, read_history, write_card

    for note in notes:
        print(note)
    print("; ".join(f"{name}: {value}" for name, value in rows))
    ours = args.source_kind == "olavlm"
    history = read_history(args.source) if ours else History([], start=args.source)
    write_card(folder, args.out.name, history, args.kind, rows, notes)


KINDS = {
    "llava": "llava-hf",
    "olavlm": "olavlm",
    **dict.fromkeys(("ola_llama", "ola_phi3", "llava_llama", "llava_phi3"), "visper-lm"),
}
"""By the `model_type` of a config."""

CONVERSIONS: dict[tuple[str, str], Callable[[argparse.Namespace, Path], None]] = {
    ("olavlm", "llava-hf"): olavlm_to_llava_hf,
    ("olavlm", "adapter"): olavlm_to_adapter,
    ("llava-hf", "olavlm"): llava_hf_to_olavlm,
    ("visper-lm", "olavlm"): visper_lm_to_olavlm,
    ("visper-lm", "llava-hf"): visper_lm_to_llava_hf,
}
"""By what SOURCE is and what OUT is to be. Another pair is another entry."""


if __name__ == "__main__":
    sys.exit(main())
