"""Answers of a trained model, beside their photographs."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from olavlm.cache import BadImage, CacheError, ImageRoots, decode_rgb
from olavlm.cache.recorded_roots import reachable_root, started_in

from .page import block, empty, note, photograph
from .runs import Run
from .settings import Settings


def show_answers(run: Run, settings: Settings) -> str:
    """`RUN/answers.json`: a list of {image, prompt, answer}."""
    file = run.folder / "answers.json"
    if not file.is_file():
        return ""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        answers = [(e.get("image") and str(e["image"]), str(e["prompt"]), str(e["answer"])) for e in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return block("Answers", note(f"answers.json is not a list of image, prompt and answer: {e!r}"))
    figures = "".join(
        f'<div class="answer"><figure>{_answer_picture(run, settings, image)}</figure>'
        f'<div><p class="asked">{escape(prompt)}</p><p>{escape(answer) or "<i>(no words)</i>"}</p></div></div>'
        for image, prompt, answer in answers
    )
    return block("Answers", f'<div class="answers">{figures}</div>' if figures else "", "By the trained model.")


def _answer_picture(run: Run, settings: Settings, image: str | None) -> str:
    if not image:
        return empty("text only")
    base = started_in(run.folder, str(run.get("train", "output_dir") or ""))
    for file in (Path(image), run.folder / image, *([] if base is None else [base / image])):
        try:
            if file.is_file():
                return photograph(decode_rgb(file.read_bytes(), image), image)
        except (BadImage, OSError) as e:  # a name that is too long, too
            return empty(str(e))
    recorded = run.get("data", "images") or []
    specs = settings.images or ([recorded] if isinstance(recorded, str) else recorded)
    try:
        roots = ImageRoots([root for root in (reachable_root(spec, base) for spec in specs) if root])
        return photograph(roots.open(image), image)
    except (CacheError, OSError):
        return empty(f"{image}: not found")
