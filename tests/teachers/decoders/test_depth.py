"""The decoded map is the library's own neck and head's, on one map given four times and on the backbone's own four."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DepthAnythingForDepthEstimation

from olavlm.teachers import TeacherError, load_teacher
from olavlm.teachers.decoders import load_decoder


@pytest.fixture(scope="module")
def network(tiny):
    return DepthAnythingForDepthEstimation.from_pretrained(tiny["depth"]).eval()


@pytest.fixture(scope="module")
def decoder(tiny):
    return load_decoder("depth", model=tiny["depth"], device="cpu")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_the_library(network, feature_maps) -> np.ndarray:
    """Of four [B, 576, dim]: the whole model, whose backbone gives these maps."""
    class_token = torch.randn(len(feature_maps[0]), 1, feature_maps[0].shape[-1])
    states = [torch.cat([class_token, maps], dim=1) for maps in feature_maps]
    return network.head(network.neck(states, 24, 24), 24, 24).numpy()


@pytest.mark.parametrize("recipe", ["mean4", "last"])
def test_a_true_target_gives_what_the_teachers_own_head_gives(recipe, network, decoder, tiny, pictures):
    teacher = load_teacher("depth", model=tiny["depth"], recipe=recipe, device="cpu")
    targets = teacher.encode(pictures[:2])
    maps = decoder.decode(targets)
    assert [m.shape for m in maps] == [(336, 336)] * 2
    assert maps[0].dtype == np.float32
    np.testing.assert_allclose(np.stack(maps), by_the_library(network, [targets] * 4), atol=1e-4, rtol=0)
    assert maps[0].std() > 1e-3  # a flat map would agree with anything flat
    assert decoder.weights_sha256 == teacher.card.weights_sha256


@torch.no_grad()
def test_the_backbones_own_four_layers_give_the_predicted_depth(network, decoder, pixels):
    layers = [maps[:, 1:] for maps in network.backbone(pixels).feature_maps]
    expected = network(pixels).predicted_depth.numpy()
    np.testing.assert_allclose(np.stack(decoder.decode_layers(layers)), expected, atol=1e-4, rtol=0)
    one_for_all = np.stack(decoder.decode(layers[-1]))
    assert np.abs(one_for_all - expected).max() > 1e-3, "the layers do not differ, and the test shows nothing"


def test_rows_do_not_depend_on_their_batch(decoder):
    features = torch.randn(3, 16, decoder.dim)
    whole = decoder.decode(features)
    assert whole[0].shape == (56, 56)  # a grid of 4 x 4
    np.testing.assert_allclose(decoder.decode(features[1:2])[0], whole[1], atol=1e-5)


def test_its_picture_goes_from_far_to_close(decoder):
    picture = decoder.picture(np.array([[0.0, 1.0], [2.0, 4.0]], np.float32))
    assert picture.size == (2, 2)
    far, close = picture.getpixel((0, 0)), picture.getpixel((1, 1))
    assert far == (94, 79, 162)  # Spectral's last colour
    assert close == (158, 1, 66)  # its first
    legend = decoder.legend([], 100)
    assert (legend.getpixel((0, 0)), legend.getpixel((99, 0))) == (far, close)
    assert decoder.picture(np.ones((2, 2), np.float32)).getpixel((1, 1)) == far


def test_what_cannot_be_decoded_is_refused(decoder, tiny, tmp_path):
    with pytest.raises(TeacherError, match=r"takes \(B, tokens, 32\)"):
        decoder.decode(torch.zeros(1, 16, 31))
    with pytest.raises(TeacherError, match="15 tokens form no square"):
        decoder.decode(torch.zeros(1, 15, 32))
    with pytest.raises(TeacherError, match="not finite"):
        decoder.decode(torch.full((1, 16, 32), torch.nan))
    with pytest.raises(TeacherError, match="3 layers"):
        decoder.decode_layers([torch.zeros(1, 16, 32)] * 3)
    with pytest.raises(TeacherError, match="use one of depth, seg, gen"):
        load_decoder("timm:vit", model=tiny["depth"])


def test_a_checkpoint_without_a_head_is_refused(tiny, tmp_path):
    weights = load_file(tiny["depth"] / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    assert len(kept) < len(weights)
    (tmp_path / "config.json").write_text((tiny["depth"] / "config.json").read_text())
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    load_teacher("depth", model=tmp_path, device="cpu")  # which needs none
    with pytest.raises(TeacherError, match=r"lack 6 tensors .*such as head\."):
        load_decoder("depth", model=tmp_path, device="cpu")
