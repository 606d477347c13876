"""olavlm-export: models of other projects to ours.

olavlm-export llava-hf/llava-1.5-7b-hf start --from llava-hf --to olavlm     stock LLaVA, as a starting point
olavlm-export shi-labs/OLA-VLM-CLIP-ViT-Llama3-8b ola --from visper-lm --to olavlm     a model of the authors
olavlm-train ift --config RECIPE.yaml --init.from start
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import JobFailed, UsageError, command, quiet_models, versions

if TYPE_CHECKING:
    from olavlm.student.formats.llava_hf import Converted

RECORD = "export.json"


def arguments() -> argparse.ArgumentParser:
    sources, kinds = (list(dict.fromkeys(names)) for names in zip(*CONVERSIONS, strict=True))
    p = argparse.ArgumentParser(
        prog="olavlm-export",
        description="Turn a checkpoint of one kind into another. From llava-hf to olavlm: a stock LLaVA "
        "(LlavaForConditionalGeneration) becomes a model without task tokens, with the same logits, that olavlm-train "
        "starts from and olavlm-generate asks. From visper-lm to olavlm: a checkpoint that the authors of OLA-VLM / "
        "VisPer-LM published, pretrained or finetuned, with the same logits, task tokens and predictors.",
        epilog="example: olavlm-export llava-hf/llava-1.5-7b-hf start --from llava-hf --to olavlm",
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
        help="of visper-lm: where its vision tower lies, if not where the checkpoint says",
    )
    return p


@command("olavlm-export")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise JobFailed(f"{args.out} exists; name another folder, or remove it")
    quiet_models()
    args.source_kind = args.source_kind or kind_of(args.source)
    if args.encoder is not None and args.source_kind != "visper-lm":
        raise UsageError("--encoder is for --from visper-lm; other checkpoints hold their vision tower")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}-", dir=args.out.parent) as staging:
        folder = Path(staging, "model")
        CONVERSIONS[args.source_kind, args.kind](args, folder)
        folder.rename(args.out)  # appears whole or not at all
    print(f"{args.out}: done", flush=True)
    return 0


def kind_of(source: str) -> str:
    """What a checkpoint is, by its config. ModelError without one, UsageError for none that we know."""
    from transformers import PreTrainedConfig

    from olavlm.student.loading import load_errors

    with load_errors(source):
        fields, _ = PreTrainedConfig.get_config_dict(source)
    model_type = fields.get("model_type")
    if model_type not in KINDS:
        raise UsageError(
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
    from olavlm.student.training.checkpoint import write_json

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


KINDS = {
    "llava": "llava-hf",
    **dict.fromkeys(("ola_llama", "ola_phi3", "llava_llama", "llava_phi3"), "visper-lm"),
}
"""By the `model_type` of a config."""

CONVERSIONS: dict[tuple[str, str], Callable[[argparse.Namespace, Path], None]] = {
    ("llava-hf", "olavlm"): llava_hf_to_olavlm,
    ("visper-lm", "olavlm"): visper_lm_to_olavlm,
}
"""By what SOURCE is and what OUT is to be. Another pair is another entry."""


if __name__ == "__main__":
    sys.exit(main())
