"""Tiny checkpoints, pictures and teachers that the tests of this folder share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported: no test may ask the network

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.teachers import load_teacher, make_tiny


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """On networks this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def teachers(tiny):
    """The three teachers with their default recipes."""
    return {name: load_teacher(name, model=tiny[name], device="cpu") for name in ("depth", "seg", "gen")}


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Wide, tall and square RGB pictures with structure at several scales."""
    return [picture(640, 480, 1), picture(213, 517, 2), picture(336, 336, 3), picture(90, 61, 4)]


def picture(width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 2)
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))
