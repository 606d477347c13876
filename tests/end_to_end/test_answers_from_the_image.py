"""A model trained by the commands answers from the image: other pictures under the same names, other answers."""

import json
import shutil

import pytest

from olavlm.pipelines import generate
from olavlm.student.training.trainer import train

QUESTION = "What is in the picture?"
ANSWERS = {"cat.jpg": "Four cats.", "rocket.jpg": "A red boat.", "koala.jpg": "Two birds.", "chair.jpg": "The table."}
"""Some of them wrong, so that only what was learnt can be the answer."""
SWAPPED = dict(zip(ANSWERS, [*list(ANSWERS)[1:], *list(ANSWERS)[:1]], strict=True))
"""By the name that a picture is given, which one it is: the next."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same question about every picture, so that nothing but the picture can tell the answer."""
    samples = [
        {
            "id": image,
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for image, answer in ANSWERS.items()
    ]
    file = tmp_path_factory.mktemp("data") / "questions.json"
    file.write_text(json.dumps(samples))
    return file


@pytest.fixture
def ask(sample_images, tmp_path, capsys):
    """ask(checkpoint, pictures) -> the answers of olavlm-generate by name, `pictures` saying which one a name shows."""

    def run(checkpoint, pictures):
        folder, output = tmp_path / "asked", tmp_path / "answers.jsonl"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, picture in pictures.items():
            shutil.copy(sample_images / picture, folder / name)
        words = ["--prompt", QUESTION, "--output", str(output), "--max-new-tokens", "12", "--device", "cpu"]
        assert generate.main([str(checkpoint), "--image", str(folder), *words]) == 0
        return {line["image"]: line["answer"] for line in map(json.loads, output.read_text().splitlines())}

    return run


def test_answers_follow_the_pictures(recipe, data, tmp_path, ask):
    no_tasks = {f"tasks.{name}": "null" for name in ("gen", "depth", "seg")}
    common = {**no_tasks, "data.file": data, "train.batch_size": 4, "train.save_every": 1000}
    pt = train(recipe("pt", **common, **{"train.epochs": 1}), "pt", {})
    settings = {"init.from": pt, "train.epochs": 60, "train.lr": 4e-3, "train.max_grad_norm": 1.0}
    ift = train(recipe("ift", **common, **settings), "ift", {})
    same = dict(zip(ANSWERS, ANSWERS, strict=True))
    assert ask(ift, same) == ANSWERS
    assert ask(ift, SWAPPED) == {name: ANSWERS[picture] for name, picture in SWAPPED.items()}
    assert not set(ask(pt, same).values()) & set(ANSWERS.values()), "control: before it was trained it knew none"
