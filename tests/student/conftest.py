"""A tiny model of true architectures and batches for it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from olavlm.student.model import OlaVLM
from olavlm.student.task import Batch
from olavlm.student.text.conversation import IGNORE_INDEX, encode, load_tokenizer
from olavlm.student.tokens import TaskSpec

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are computed many times faster by one thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden_predictor():
    return np.load(GOLDEN / "predictor.npz")


@pytest.fixture(scope="session")
def golden_losses():
    return np.load(GOLDEN / "losses.npz")


@pytest.fixture(scope="session")
def golden_conversations():
    return json.loads((GOLDEN / "conversations.json").read_text())


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(tiny["llm"])


@pytest.fixture(scope="session")
def tasks():
    return (
        TaskSpec("gen", tokens=1, dim=32, layers=(2, 6)),
        TaskSpec("depth", tokens=16, dim=24, layers=(3,), weight=0.25, predictor_width="llm"),
        TaskSpec("seg", tokens=16, dim=40, layers=(2, 5)),
    )


@pytest.fixture
def build(tiny, tokenizer, tasks):
    """build(**options) -> an `OlaVLM` with weights that depend on nothing else."""

    def build_model(**options):
        torch.manual_seed(7)
        options = {"tasks": tasks, "num_task_tokens": 4} | options
        return OlaVLM.build(tiny["llm"], tiny["encoder"], tokenizer, **options)

    return build_model


@pytest.fixture
def make_batch(tokenizer, tasks):
    """make_batch([(question, answer, with image), ...], seed) -> a right-padded `Batch` with random pictures."""

    def make(samples, seed=0, template="llama_3"):
        torch.manual_seed(seed)
        encoded = []
        for question, answer, image in samples:
            turns = [
                {"from": "human", "value": f"<image>\n{question}" if image else question},
                {"from": "gpt", "value": answer},
            ]
            encoded.append(encode(tokenizer, turns, template))
        length = max(len(sample["input_ids"]) for sample in encoded)

        def padded(name, value):
            rows = [sample[name] + [value] * (length - len(sample[name])) for sample in encoded]
            return torch.tensor(rows)

        has_image = torch.tensor([image for _, _, image in samples])
        lengths = torch.tensor([len(sample["input_ids"]) for sample in encoded])
        targets = {task.name: torch.randn(len(samples), task.tokens, task.dim) for task in tasks}
        for target in targets.values():
            target[~has_image] = torch.nan
        return Batch(
            input_ids=padded("input_ids", tokenizer.pad_token_id),
            labels=padded("labels", IGNORE_INDEX),
            attention_mask=(torch.arange(length)[None] < lengths[:, None]).long(),
            pixel_values=torch.randn(len(samples), 3, 56, 56) * has_image[:, None, None, None],
            targets=targets,
            valid={task.name: has_image.clone() for task in tasks},
        )

    return make


@pytest.fixture
def samples():
    """Three with an image, one without, of different lengths."""
    return [
        ("What is on the table?", "Two blue cups.", True),
        ("Where is the bird? Describe the scene briefly.", "Above the tree, to the left of the roof.", True),
        ("Name three kinds of vehicles.", "A motorcycle, a truck and an airplane.", False),
        ("Describe.", "A dog.", True),
    ]
