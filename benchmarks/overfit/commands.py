"""The product's commands, as a user runs them, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from .weights import BaseModels

MAX_NEW_TOKENS = 96
"""More than the longest answer that is learnt."""


def run(command: str, *words: object, text: str | None = None) -> str:
    """Standard output of `olavlm-COMMAND words`, `text` piped in; RuntimeError with what it said if it fails."""
    line = [sys.executable, "-m", f"olavlm.pipelines.{command}", *map(str, words)]
    done = subprocess.run(line, input=text, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"olavlm-{command} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def train(stage: str, recipe: Path, models: BaseModels, out: Path, data: Iterable[Path], **overrides: object) -> Path:
    """The run folder of a stage of the recipe."""
    said = {
        "model.llm": models.llm,
        "model.encoder": models.encoder,
        "data.file": json.dumps([str(file) for file in data]),
        "train.output_dir": out,
        **overrides,
    }
    run("train", stage, "--config", recipe, *(word for key, value in said.items() for word in (f"--{key}", value)))
    return out


def answers_by_name(checkpoint: Path, shown: Mapping[str, str], images: Path, question: str, folder: Path) -> dict:
    """The greedy answers to one question about a folder, by the names in it.

    Args:
        shown: for each name in the folder, the picture below `images` that lies there under it.
        folder: where that folder is made.
    """
    pictures, output = folder / "shown", folder / "answers.jsonl"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    for name, picture in shown.items():
        shutil.copy(images / picture, pictures / name)
    run(
        "generate",
        checkpoint,
        "--image",
        pictures,
        "--prompt",
        question,
        "--output",
        output,
        "--max-new-tokens",
        MAX_NEW_TOKENS,
    )
    return {line["image"]: line["answer"] for line in map(json.loads, output.read_text().splitlines())}


def answers_in_turn(checkpoint: Path, asked: Iterable[tuple[Path, str]]) -> list[str]:
    """The greedy answers to questions, each about a picture and in a dialogue of its own, by one process."""
    pairs = list(asked)
    lines = "".join(f"/image {picture}\n{question}\n" for picture, question in pairs)
    told = run(
        "generate", checkpoint, "--image", pairs[0][0], "--max-new-tokens", MAX_NEW_TOKENS, text=lines
    ).splitlines()
    answers = [line.strip() for line in told if line.strip()]
    if len(answers) != len(pairs):
        raise RuntimeError(f"{len(pairs)} questions, {len(answers)} lines of answers: {told}")
    return answers
