import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from olavlm.student.encoders import ImageTransform, VisionEncoder, load_image_transform
from olavlm.student.errors import ModelError


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_features_are_the_librarys_hidden_state(tiny, select_layer):
    encoder = VisionEncoder.from_pretrained(tiny["encoder"], select_layer)
    pixels = torch.randn(2, 3, 56, 56)
    expected = CLIPVisionModel.from_pretrained(tiny["encoder"])(pixels, output_hidden_states=True)
    features = encoder(pixels)
    assert torch.equal(features, expected.hidden_states[select_layer][:, 1:])
    assert features.shape == (2, encoder.num_tokens, encoder.width)


def test_is_frozen_and_in_evaluation_mode(tiny):
    encoder = VisionEncoder.from_pretrained(tiny["encoder"]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 56, 56, requires_grad=True)).requires_grad


def test_whole_clip_model_folder(tiny, tmp_path):
    """As openai/clip-vit-large-patch14-336 is published."""
    tower = CLIPVisionModel.from_pretrained(tiny["encoder"])
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    model = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict(), text_config=text))
    model.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(encoder(pixels), expected)
    assert load_image_transform(tmp_path).size == 56


def test_bad_checkpoints(tiny, tmp_path):
    with pytest.raises(ModelError, match="cannot load a model from '/nowhere/at/all'"):
        VisionEncoder.from_pretrained("/nowhere/at/all")
    with pytest.raises(ModelError, match="'llama' is no known encoder; choose one of: clip_vision_model"):
        VisionEncoder.from_pretrained(tiny["llm"])
    folder = shutil.copytree(tiny["encoder"], tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("fc1.weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of the model, such as .*fc1\.weight"):
        VisionEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="select_layer=-6: the encoder has 4 blocks"):
        VisionEncoder.from_pretrained(tiny["encoder"], select_layer=-6)


@pytest.mark.parametrize("size", [(56, 56), (200, 90), (61, 133), (20, 31)])
def test_square_is_clips_own_processing(size):
    image = picture(*size)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    ours = ImageTransform(56)(image)
    assert ours.dtype == np.float32
    assert ours.shape == (3, 56, 56)
    # The library's processor may resize with another filter implementation; a wrong crop would differ by whole units.
    assert np.abs(ours - expected).mean() < 0.02


def test_square_by_hand():
    """A picture twice as wide as high, at its final height: the crop is its middle, in RGB, normalised."""
    image = picture(112, 56)
    transform = ImageTransform(56)
    expected = np.asarray(image)[:, 28:84].transpose(2, 0, 1) / 255.0
    expected = (expected - np.reshape(transform.mean, (3, 1, 1))) / np.reshape(transform.std, (3, 1, 1))
    np.testing.assert_allclose(transform(image), expected, atol=1e-5)


def test_pad_by_hand():
    image = picture(56, 28)
    transform = ImageTransform(56, geometry="pad")
    pixels = transform(image)
    fill = (np.array([122, 116, 104]) / 255 - transform.mean) / transform.std
    for rows in (slice(0, 14), slice(42, 56)):
        np.testing.assert_allclose(pixels[:, rows], np.broadcast_to(fill[:, None, None], (3, 14, 56)), atol=1e-5)
    expected = np.asarray(image).transpose(2, 0, 1) / 255.0
    expected = (expected - np.reshape(transform.mean, (3, 1, 1))) / np.reshape(transform.std, (3, 1, 1))
    np.testing.assert_allclose(pixels[:, 14:42], expected, atol=1e-5)


def test_transform_of_a_checkpoint(tiny, tmp_path):
    folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
    preprocessor = folder / "preprocessor_config.json"
    preprocessor.write_text(
        json.dumps({"crop_size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    transform = load_image_transform(folder, "pad")
    assert transform == ImageTransform(56, (0.5,) * 3, (0.25,) * 3, "pad")
    assert pickle.loads(pickle.dumps(transform)) == transform
    transform.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert (saved["image_mean"], saved["crop_size"]) == ([0.5] * 3, {"height": 56, "width": 56})
    preprocessor.write_text(json.dumps({"crop_size": 224}))
    with pytest.raises(ModelError, match="crops to 224, the model takes 56"):
        load_image_transform(folder)
    preprocessor.unlink()
    assert load_image_transform(folder) == ImageTransform(56)


def test_unknown_geometry():
    with pytest.raises(ValueError, match="geometry='round' must be one of square, pad"):
        ImageTransform(56, geometry="round")
