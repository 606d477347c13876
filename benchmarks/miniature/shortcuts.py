"""How far one gets in a world without seeing it, or by what is not depth: words and fixed rules must be near chance.

*Text*: a logistic regression for each task and option, on the words of question and options (and pairs of a word with
its place among the options), trained on one set of pictures' questions and asked on another. *Size*, *height*,
*picture*: fixed rules that choose the larger object, the lower one, and the one nearer in the picture. *Flat*: where
objects are in the picture, how large they are seen and which shape they have, all of it together, which blocks do not
balance, weighed by a logistic regression and by boosted trees: what answers to Depth and Distance have to exceed to
tell of depth. It is a lower bound of what no depth gives, for nobody knows the best answerer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from ..figures import Count
from .questions import TASKS, Question
from .scenes import SIDE
from .solids import SHAPES
from .text import prompt
from .world import Picture, stream

CHANCE = {"Count": 0.25, "Relation": 0.5, "Depth": 0.5, "Distance": 0.5}


def text_alone(learnt: Sequence[Question], asked: Sequence[Question], steps: int = 120) -> float:
    """Accuracy on the `asked` of a classifier of letters by words, learnt from the `learnt`; both of one task."""
    words = sorted({word for question in learnt for word in _words(question)})
    place = {word: i for i, word in enumerate(words)}
    x, y = _counts(learnt, place), np.array([q.letter for q in learnt])
    weights = np.zeros((len(place) + 1, max(len(q.options) for q in learnt)), np.float32)
    truth = np.eye(weights.shape[1], dtype=np.float32)[y]
    for _ in range(steps):
        scores = x @ weights
        chance = np.exp(scores - scores.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        weights -= 2.0 * (x.T @ (chance - truth) / len(x) + 1e-3 * weights)
    said = (_counts(asked, place) @ weights).argmax(axis=1)
    return float((said == [q.letter for q in asked]).mean())


def _words(question: Question) -> Iterable[str]:
    text = re.findall(r"[a-z0-9]+", prompt(question).lower())
    yield from text
    for i, option in enumerate(question.options):
        yield from (f"{i}:{word}" for word in [option, *option.split()])
    yield from (f"{one} {other}" for one, other in pairwise(text))


def _counts(questions: Sequence[Question], place: dict[str, int]) -> np.ndarray:
    x = np.zeros((len(questions), len(place) + 1), np.float32)
    x[:, -1] = 1
    for row, question in enumerate(questions):
        for word in _words(question):
            if word in place:
                x[row, place[word]] = 1
    return x / np.sqrt(x.sum(axis=1, keepdims=True))


def by_rule(pictures: Sequence[Picture]) -> dict[str, float]:
    """Accuracy of the rules on Depth and Distance."""
    right: dict[str, list[bool]] = {"larger is closer": [], "lower is closer": [], "closer in the picture": []}
    for picture in pictures:
        depth, distance = (picture.questions[TASKS.index(task)] for task in ("Depth", "Distance"))
        facts = picture.facts
        first, second = depth.about
        right["larger is closer"].append((facts.area[first] <= facts.area[second]) == depth.letter)
        right["lower is closer"].append((facts.row[first] <= facts.row[second]) == depth.letter)
        at = np.stack([facts.column, facts.row], axis=1)
        reference, first, second = distance.about
        gaps = [np.hypot(*(at[reference] - at[i])) for i in (first, second)]
        right["closer in the picture"].append((gaps[0] > gaps[1]) == distance.letter)
    return {rule: float(np.mean(answers)) for rule, answers in right.items()}


def flat(learnt: Sequence[Picture], asked: Sequence[Picture], task: str, steps: int = 20) -> float:
    """Accuracy, on the `asked`, of places and seen sizes, weighed as the `learnt` say; `task` is Depth or Distance."""
    (x, y), (told, truth) = _flat_facts(learnt, task), _flat_facts(asked, task)
    size = x.std(axis=0)
    x, told, weights = x / size, told / size, np.zeros(x.shape[1])
    for _ in range(steps):  # Newton's, with a ridge
        chance = 1 / (1 + np.exp(-x @ weights))
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + np.eye(len(weights))
        weights -= np.linalg.solve(curvature, x.T @ (chance - y) + weights)
    return float(((told @ weights > 0) == truth).mean())


def trees(learnt: Sequence[Picture], asked: Sequence[Picture], task: str, seed: int = 0) -> float:
    """As `flat`, by boosted trees, which find out what goes with what; each question is learnt and answered in both
    orders of its options."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    (x, y), (told, truth) = _both_orders(learnt, task), _both_orders(asked, task)
    model = HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.06, max_leaf_nodes=20, l2_regularization=1.0, random_state=seed
    ).fit(x, y)
    chance = model.predict_proba(told)[:, 1]
    half = len(asked)
    return float(((chance[:half] > chance[half:]) == truth[:half]).mean())


def _both_orders(pictures: Sequence[Picture], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each question, what is seen of its objects, and the letter; then again with its options changed round."""
    rows, letters = [], []
    for back in (False, True):
        for picture in pictures:
            facts, question = picture.facts, picture.questions[TASKS.index(task)]
            *others, first, second = question.about
            shape = np.array([SHAPES.index(name.split()[-1]) for name in facts.names], float)
            seen = np.stack([facts.row, np.log(facts.area), np.abs(facts.column - SIDE / 2)], axis=1)
            two = [second, first] if back else [first, second]
            told = [*seen[two].ravel(), *(seen[two[1]] - seen[two[0]]), *shape[two]]
            for other in others:
                across, down = np.abs(facts.column - facts.column[other]), np.abs(facts.row - facts.row[other])
                gap, larger = np.hypot(across, down), np.abs(np.log(facts.area / facts.area[other]))
                beside = np.stack([across, down, gap, larger], axis=1)[two]
                told += [*seen[other], shape[other], *beside.ravel(), *(beside[1] - beside[0])]
                told.append(np.log(gap[two[1]] / gap[two[0]]))
            rows.append(told)
            letters.append(question.letter != back)
    return np.array(rows, float), np.array(letters)


def _flat_facts(pictures: Sequence[Picture], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each question, by how much the second option exceeds the first in what is seen of it, and the letter."""
    rows, letters = [], []
    for picture in pictures:
        facts, question = picture.facts, picture.questions[TASKS.index(task)]
        *others, first, second = question.about
        seen = np.stack([facts.row, np.log(facts.area), facts.area], axis=1)
        for other in others:
            across, down = np.abs(facts.column - facts.column[other]), np.abs(facts.row - facts.row[other])
            larger = np.abs(np.log(facts.area / facts.area[other]))
            seen = np.column_stack([seen, across, down, np.hypot(across, down), larger])
        rows.append(seen[second] - seen[first])
        letters.append(question.letter)
    return np.array(rows, float), np.array(letters)


def interval(chance: float, asked: int) -> float:
    """Half of the 95% interval of the accuracy of guessing."""
    return 1.96 * float(np.sqrt(chance * (1 - chance) / asked))


def measured(seed: int, learn: int, count: int, processes: int | None = None) -> list[Count]:
    """Figures of a world: `learn` pictures to learn from, `count` others to ask about."""
    seen = list(stream(seed, 0, learn + count, processes))
    learnt, asked = seen[:learn], seen[learn:]
    alone = {
        task: _beside(text_alone([p.questions[i] for p in learnt], [p.questions[i] for p in asked]), task, count)
        for i, task in enumerate(TASKS)
    }
    rules = {rule: _beside(accuracy, "Depth", count) for rule, accuracy in by_rule(asked).items()}
    places = {
        f"{task}, {how}": _beside(answer(learnt, asked, task), task, count)
        for task in ("Depth", "Distance")
        for how, answer in (("a linear rule", flat), ("boosted trees", trees))
    }
    return [
        Count(f"Words alone, learnt from {learn} pictures' questions, asked {count} others'", alone),
        Count(f"Rules that see no depth, {count} pictures", rules),
        Count(f"Places, seen sizes and shapes, learnt from {learn} pictures, asked of {count} others", places),
    ]


def _beside(accuracy: float, task: str, asked: int) -> dict[str, float]:
    return {"accuracy": accuracy, "chance": CHANCE[task], "95% of guessing, ±": interval(CHANCE[task], asked)}
