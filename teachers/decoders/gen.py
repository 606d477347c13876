"""Gen features to pictures: Stable Diffusion unCLIP, fed with an image embedding and an empty prompt.

25 steps of the DPM-Solver from the same noise for every picture (seed 42), noise level 0, as OLA-VLM
(arXiv 2412.09585) has it. What is drawn is a picture with that embedding, not the photograph: the embedding says what
is there, hardly where. It needs diffusers (the extra `gen-decode`) and the whole checkpoint, some 5 GB beside the image
encoder that the features need.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

from olavlm.teachers.checkpoint import one_line, open_checkpoint, weights_digest
from olavlm.teachers.decoders.grid import square_grid
from olavlm.teachers.errors import TeacherError

STEPS, SEED, NOISE_LEVEL = 25, 42, 0


class GenDecoder:
    """Image embeddings [B, 1, dim] -> pictures, uint8 [height, width, 3], of the pipeline's own size.

    Args:
        pipeline: a `StableUnCLIPImg2ImgPipeline` on its device, with the scheduler that is wanted.
    """

    needs_images = False

    def __init__(self, name: str, pipeline: Any, *, weights_sha256: str, steps: int = STEPS) -> None:
        self.name, self.weights_sha256, self.steps = name, weights_sha256, steps
        self.dim = pipeline.image_encoder.config.projection_dim
        self._pipeline = pipeline

    @torch.no_grad()
    def decode(self, features: torch.Tensor, images: Sequence[Image.Image] | None = None) -> list[np.ndarray]:
        """Pictures of embeddings, one by one, so that none depends on its batch; see `Decoder.decode`."""
        if square_grid(features, self.dim, self.name) != 1:
            raise TeacherError(f"{features.shape[1]} tokens: {self.name} decodes one image embedding a photograph")
        pipeline, pictures = self._pipeline, []
        for embedding in features.to(pipeline.device, pipeline.dtype):
            drawn = pipeline(
                prompt="",
                image_embeds=embedding,
                num_inference_steps=self.steps,
                noise_level=NOISE_LEVEL,
                generator=torch.Generator("cpu").manual_seed(SEED),  # the same noise on every device
            )
            pictures.append(np.asarray(drawn.images[0].convert("RGB")))
        return pictures

    def picture(self, decoded: np.ndarray) -> Image.Image:
        """The picture itself."""
        return Image.fromarray(decoded)

    def legend(self, decoded: Sequence[np.ndarray], width: int) -> None:
        """None: a picture has no code of colours."""


def load_gen_decoder(*, name: str, model: str, revision: str | None, device: torch.device) -> GenDecoder:
    """See `load_decoder`. Weights are float16 on CUDA, float32 elsewhere.

    Raises:
        TeacherError: diffusers is not installed, or the checkpoint is not a whole unCLIP pipeline.
    """
    if find_spec("diffusers") is None:
        raise TeacherError(
            f"the decoder of {name} runs Stable Diffusion unCLIP, and the package diffusers is not installed; install "
            "it with: pip install 'olavlm[gen-decode]'"
        )
    from diffusers import DPMSolverMultistepScheduler, StableUnCLIPImg2ImgPipeline

    checkpoint = open_checkpoint(
        model, revision=revision, model_types=("clip_vision_model",), subfolder="image_encoder"
    )
    try:
        pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
            checkpoint.folder.parent if checkpoint.revision is None else model,
            revision=checkpoint.revision,
            torch_dtype=torch.float16 if device.type == "cuda" else torch.float32,
            use_safetensors=True,
            local_files_only=checkpoint.revision is None,
        )
    except Exception as error:  # each of its seven models may fail in a way of its own
        raise TeacherError(
            f"{model}: no unCLIP pipeline can be loaded from it ({one_line(error)}); name the checkpoint's whole "
            "folder, with model_index.json, or its hub id"
        ) from error
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return GenDecoder(name, pipeline.to(device), weights_sha256=weights_digest(checkpoint.weights))
