"""What is learnt and what is asked, made of the bundled sample.

The same question is asked about every picture, so that only the picture can tell the answer. The dialogues' questions
are each about one picture; asked about another one, the answer should be another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SAMPLE = Path("pipelines/sample")
QUESTION = "Describe this photograph in one sentence."


@dataclass(frozen=True)
class Asked:
    """A question about a picture."""

    picture: str
    question: str
    learnt: str
    """The answer that was learnt for it."""


def captions(sample: Path = SAMPLE, limit: int | None = None) -> list[Asked]:
    """The one question about each picture, with the first of its bundled captions."""
    found: dict[str, Asked] = {}
    for entry in json.loads((sample / "pt.json").read_text()):
        answer = entry["conversations"][1]["value"].strip()
        found.setdefault(entry["image"], Asked(entry["image"], QUESTION, answer))
    return list(found.values())[:limit]


def questions(pictures: Iterable[str], sample: Path = SAMPLE) -> list[Asked]:
    """First questions of bundled dialogues about these pictures, of those that are one line, as a terminal takes."""
    found, wanted = [], set(pictures)
    for entry in json.loads((sample / "ift.json").read_text()):
        first, answer = (turn["value"] for turn in entry["conversations"][:2])
        question = first.replace("<image>", "").strip()
        if entry.get("image") in wanted and "\n" not in question:
            found.append(Asked(entry["image"], question, answer.strip()))
    return found


def as_dataset(asked: Iterable[Asked], file: Path) -> Path:
    """A LLaVA file of one turn each."""
    samples = [
        {
            "id": f"{number}_{one.picture}",
            "image": one.picture,
            "conversations": [
                {"from": "human", "value": f"<image>\n{one.question}"},
                {"from": "gpt", "value": one.learnt},
            ],
        }
        for number, one in enumerate(asked)
    ]
    file.write_text(json.dumps(samples, indent=1))
    return file


def swapped(pictures: Iterable[str]) -> dict[str, str]:
    """For every picture the next one, for the last the first."""
    names = list(dict.fromkeys(pictures))
    return dict(zip(names, [*names[1:], *names[:1]], strict=True))
