"""The files of the packages to checkpoints of the library: `python -m benchmarks.overfit.convert PACKAGES OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .weights import ARCHITECTURE, ENCODER_FILE, LLM_FILE


def convert_llm(file: Path, out: Path) -> None:
    """A GGUF file, dequantised to float32, and the tokenizer in it."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)  # with it the library would not save the model, though it is plain now
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def convert_encoder(file: Path, out: Path) -> None:
    """The tensors of a state dict under timm's names; AssertionError if they are not timm's in order and shape."""
    given = torch.load(file, map_location="cpu", weights_only=True)
    own = timm.create_model(ARCHITECTURE).state_dict()
    assert [tensor.shape for tensor in given.values()] == [tensor.shape for tensor in own.values()], file
    save_file({name: tensor.contiguous() for name, tensor in zip(own, given.values(), strict=True)}, out)


if __name__ == "__main__":
    packages, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True)
    convert_llm(packages / LLM_FILE, folder / "llm")
    convert_encoder(packages / ENCODER_FILE, folder / "encoder.safetensors")
