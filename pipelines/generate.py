"""olavlm-generate: ask a trained model about an image, about every image of a folder, or in a dialogue.

olavlm-generate runs/ift --image cat.jpg --prompt "What is on the sofa?"
olavlm-generate runs/ift --image photos --prompt "Describe the image." --output answers.jsonl
olavlm-generate runs/ift --image cat.jpg                 a dialogue at the terminal
olavlm-generate runs/ift --prompt "Name three animals."  without an image

A fusion baseline (`model.fusion`) needs its teachers for that; where they have moved, `--teacher depth=FOLDER` says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from PIL import Image

from olavlm.cache import BadImage, ImageRoots, decode_rgb

from .cli import JobFailed, Progress, UsageError, add_device_argument, command, quiet_models, seed, versions

if TYPE_CHECKING:
    from olavlm.student.text.dialogue import Dialogue

    NewDialogue = Callable[[Image.Image | None], Dialogue]
    """Starts a dialogue about an image, or about none."""

DIALOGUE_HELP = "/image FILE: another image and a new dialogue; /new: a new dialogue; /quit or Ctrl-D: leave"


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-generate",
        description="Answer a question about an image, the same question about every image of a folder (a JSON line an "
        "image), or, without --prompt, questions at the terminal.",
        epilog='example: olavlm-generate runs/ift --image cat.jpg --prompt "What is on the sofa?"',
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder of olavlm-train")
    p.add_argument("--image", metavar="FILE|DIR", type=Path, help="without one, questions are asked as text alone")
    p.add_argument("--prompt", metavar="TEXT", help="without one, a dialogue at the terminal")
    p.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="file for a folder's answers, with a record of the run in FILE.run.json; standard output by default",
    )
    add_teacher_argument(p)
    p.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="the longest answer (%(default)s)")
    p.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0, the default, is greedy; above it, sampled"
    )
    p.add_argument("--top-p", metavar="P", type=float, default=1.0, help="sample from this much of the probability")
    p.add_argument("--seed", metavar="N", type=seed, default=0, help="random seed of sampling (%(default)s)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of LLM and encoder (default: the run's)"
    )
    add_device_argument(p)
    return p


def add_teacher_argument(p: argparse.ArgumentParser) -> None:
    """Adds `--teacher` to a command that asks fusion baselines; `places_of` reads it."""
    p.add_argument(
        "--teacher",
        metavar="NAME=MODEL",
        action="append",
        default=[],
        help="where a fusion baseline finds a teacher that it was trained with: a hub id or folder; repeatable",
    )


@command("olavlm-generate")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    check_usage(args)
    of_folder = args.image is not None and args.image.is_dir()
    image = None if args.image is None or of_folder else open_image(args.image)
    # Only now, so that help and a wrong flag are answered at once.
    import torch

    from olavlm.student import load_checkpoint
    from olavlm.student.text.dialogue import Dialogue
    from olavlm.teachers.base import resolve_device

    device = resolve_device(args.device)
    quiet_models()
    model, tokenizer = load_checkpoint(args.checkpoint, args.dtype and getattr(torch, args.dtype))
    model = model.to(device)
    if args.teacher or (model.fused_teachers and args.image is not None):  # or they are loaded once there is an image
        model.load_teachers(places_of(args.teacher))
    new_dialogue: NewDialogue = partial(
        Dialogue,
        model,
        tokenizer,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    if of_folder:
        if args.output is not None:
            record_run(args)
        answer_folder(new_dialogue, args.image, args.prompt, args.output)
    elif args.prompt is not None:
        stream_answer(new_dialogue(image), args.prompt)
    else:
        talk(new_dialogue, image, sys.stdin)
    return 0


def check_usage(args: argparse.Namespace) -> None:
    """UsageError for arguments that cannot be, or not together."""
    if not 0 <= args.temperature < math.inf:
        raise UsageError(f"--temperature is {args.temperature}: 0 for greedy answers, or above")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p is {args.top_p}: above 0 and at most 1")
    if args.top_p < 1 and not args.temperature:
        raise UsageError("--top-p is for sampling; add --temperature, such as 0.7")
    places_of(args.teacher)
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {args.max_new_tokens}: at least 1")
    try:
        (args.prompt or "").encode()
    except UnicodeEncodeError:
        raise UsageError(f"--prompt {args.prompt!r} is not UTF-8") from None
    of_folder = args.image is not None and args.image.is_dir()
    if of_folder and args.prompt is None:
        raise UsageError(f"--image {args.image} is a folder; add the --prompt to ask about each of its images")
    if args.output is not None and not of_folder:
        raise UsageError("--output is for the answers about a folder of images")


def places_of(teachers: list[str]) -> dict[str, str]:
    """Models by the names of teachers; UsageError for what is not NAME=MODEL, or a name that comes twice."""
    places: dict[str, str] = {}
    for text in teachers:
        name, _, model = text.partition("=")
        if not name or not model:
            raise UsageError(f"--teacher {text}: give NAME=MODEL, such as depth=FOLDER")
        if name in places:
            raise UsageError(f"--teacher {name} is given twice: {places[name]} and {model}")
        places[name] = model
    return places


def open_image(file: Path) -> Image.Image:
    """The picture, RGB and upright; BadImage or OSError if it cannot be read."""
    return decode_rgb(file.read_bytes(), str(file))


def record_run(args: argparse.Namespace) -> None:
    """What was asked for and by which versions, beside the answers: `answers.jsonl.run.json`."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    content = {"arguments": asked, "versions": versions()}
    args.output.with_name(f"{args.output.name}.run.json").write_text(json.dumps(content, indent=1) + "\n")


def stream_answer(dialogue: Dialogue, question: str) -> None:
    """Print an answer as it comes."""
    from transformers import TextStreamer

    dialogue.ask(question, TextStreamer(dialogue.tokenizer, skip_prompt=True, skip_special_tokens=True))


def answer_folder(new_dialogue: NewDialogue, folder: Path, prompt: str, output: Path | None) -> None:
    """Ask about every image below a folder, in the order of their names, a JSON line each.

    Raises:
        JobFailed: no image there, or images that could not be read; they have a line with the reason.
    """
    known = set(Image.registered_extensions())
    images = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix.lower() in known)
    if not images:
        raise JobFailed(f"--image {folder}: no image in this folder")
    roots, progress, bad = ImageRoots([str(folder)]), Progress(len(images), "images", "generate"), 0
    with output.open("w", encoding="utf-8") if output is not None else contextlib.nullcontext(sys.stdout) as lines:
        for file in images:
            record = {"image": str(file.relative_to(folder)), "prompt": prompt}
            try:
                record["answer"] = new_dialogue(roots.open(record["image"])).ask(prompt)
            except BadImage as e:
                record["error"] = str(e)
                bad += 1
            print(json.dumps(record, ensure_ascii=False), file=lines, flush=True)
            progress.update(1)
    progress.close()
    if bad:
        raise JobFailed(f"{bad} of {len(images)} images in {folder} could not be read; their lines have the reason")


def talk(new_dialogue: NewDialogue, image: Image.Image | None, questions: TextIO) -> None:
    """A dialogue of lines typed, or piped in; ends with them."""
    if questions.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
        print(DIALOGUE_HELP)
    dialogue = new_dialogue(image)
    for line in _lines(questions):
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "/quit":
            return
        if word == "/new":
            dialogue = new_dialogue(dialogue.image)
        elif word == "/image":
            try:
                dialogue = new_dialogue(open_image(Path(rest.strip()).expanduser()))
            except (BadImage, OSError) as e:
                print(e)
        elif word.startswith("/"):
            print(DIALOGUE_HELP)
        else:
            stream_answer(dialogue, line.strip())


def _lines(questions: TextIO) -> Iterator[str]:
    if not questions.isatty():
        yield from questions
        return
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


if __name__ == "__main__":
    sys.exit(main())
