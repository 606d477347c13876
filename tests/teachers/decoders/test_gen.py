"""unCLIP: what is asked of the pipeline, and what is said where it cannot be had."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.teachers import TeacherError
from olavlm.teachers.decoders import gen, load_decoder
from olavlm.teachers.decoders.gen import GenDecoder


class Pipeline:
    """Notes what it is asked."""

    image_encoder = SimpleNamespace(config=SimpleNamespace(projection_dim=48))
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self):
        self.calls = []

    def __call__(self, **options):
        noise = torch.rand(1, generator=options.pop("generator"))
        self.calls.append({**options, "noise": float(noise)})
        return SimpleNamespace(images=[Image.new("RGB", (8, 6), (len(self.calls), 0, 0))])


def test_each_embedding_is_drawn_alone_from_the_same_noise():
    pipeline = Pipeline()
    decoder = GenDecoder("gen", pipeline, weights_sha256="")
    features = torch.randn(2, 1, 48)
    pictures = decoder.decode(features)
    assert [p.shape for p in pictures] == [(6, 8, 3)] * 2
    assert [int(p[0, 0, 0]) for p in pictures] == [1, 2]
    assert decoder.picture(pictures[0]).size == (8, 6)
    first, second = pipeline.calls
    assert first["noise"] == second["noise"]
    assert (first["prompt"], first["num_inference_steps"], first["noise_level"]) == ("", 25, 0)
    assert torch.equal(second["image_embeds"], features[1].double())
    with pytest.raises(TeacherError, match="one image embedding"):
        decoder.decode(torch.randn(1, 4, 48))


def test_without_diffusers_one_line_says_so(tiny, monkeypatch):
    monkeypatch.setattr(gen, "find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"pip install 'olavlm\[gen-decode\]'"):
        load_decoder("gen", model=tiny["gen"], device="cpu")


def test_an_image_encoder_alone_is_no_pipeline(tiny, monkeypatch):
    class Absent:
        @classmethod
        def from_pretrained(cls, folder, **options):
            assert options["use_safetensors"]
            assert options["local_files_only"]
            raise OSError(f"no model_index.json in {folder}")

    fake = SimpleNamespace(StableUnCLIPImg2ImgPipeline=Absent, DPMSolverMultistepScheduler=None)
    monkeypatch.setattr(gen, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    with pytest.raises(TeacherError, match=r"whole folder, with model_index\.json"):
        load_decoder("gen", model=tiny["gen"], device="cpu")


def test_a_tiny_pipeline_draws(tiny, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="unCLIP runs with diffusers, the extra `gen-decode`")
    from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPVisionModelWithProjection

    from olavlm.teachers.tiny_clip_tokenizer import clip_tokenizer

    encoder, tokenizer = CLIPVisionModelWithProjection.from_pretrained(tiny["gen"]), clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4), class_embed_type="projection", projection_class_embeddings_input_dim=96,
        cross_attention_dim=16, norm_num_groups=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(), image_encoder=encoder,
        image_normalizer=diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(48),
        image_noising_scheduler=diffusers.DDPMScheduler(), tokenizer=tokenizer, text_encoder=CLIPTextModel(text),
        unet=unet, scheduler=diffusers.PNDMScheduler(skip_prk_steps=True), vae=vae,
    ).save_pretrained(tmp_path)  # fmt: skip
    decoder = load_decoder("gen", model=tmp_path, device="cpu")
    assert decoder.dim == 48
    decoder.steps = 3
    features = torch.randn(2, 1, 48)
    pictures = decoder.decode(features)
    assert pictures[0].shape == (16, 16, 3)
    assert not np.array_equal(*pictures)  # they depend on the embedding
    assert np.array_equal(decoder.decode(features[1:])[0], pictures[1])  # and on nothing else
