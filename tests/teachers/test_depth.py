import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DepthAnythingForDepthEstimation

from olavlm.teachers import TeacherError, load_teacher

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def backbone(tiny):
    return DepthAnythingForDepthEstimation.from_pretrained(tiny["depth"]).backbone.eval()


def squashed(images) -> torch.Tensor:
    arrays = [np.asarray(image.resize((336, 336), Image.Resampling.BICUBIC)) / 255 for image in images]
    return torch.tensor(np.stack([(array - MEAN) / STD for array in arrays])).permute(0, 3, 1, 2).float()


@torch.no_grad()
def block_outputs(backbone, pixels) -> list[torch.Tensor]:
    """Outputs of the encoder's blocks, run one after the other."""
    hidden, outputs = backbone.embeddings(pixels), []
    for block in backbone.encoder.layer:
        hidden = block(hidden)
        outputs.append(hidden)
    return outputs


def test_mean4_is_the_mean_of_four_normalised_blocks(backbone, teachers, pictures):
    outputs = block_outputs(backbone, squashed(pictures))
    with torch.no_grad():  # make_tiny's out_indices 2, 3, 5, 6 count from the embeddings, so blocks 1, 2, 4, 5
        expected = torch.stack([backbone.layernorm(outputs[block])[:, 1:] for block in (1, 2, 4, 5)]).mean(0)
    torch.testing.assert_close(teachers["depth"].encode(pictures), expected, atol=1e-5, rtol=0)
    assert teachers["depth"].card.recipe["layers"] == [1, 2, 4, 5]


def test_last_is_the_final_block(backbone, tiny, pictures):
    teacher = load_teacher("depth", model=tiny["depth"], recipe="last", device="cpu")
    with torch.no_grad():
        expected = backbone.layernorm(block_outputs(backbone, squashed(pictures))[-1])[:, 1:]
    torch.testing.assert_close(teacher.encode(pictures), expected, atol=1e-5, rtol=0)
    assert teacher.card.recipe["layers"] == [5]


def test_swapped_channels_are_noticed(teachers, pictures):
    """The public code fed blue and red swapped: such features must not pass for ours."""
    swapped = [Image.merge("RGB", image.split()[::-1]) for image in pictures]
    features, wrong = teachers["depth"].encode(pictures), teachers["depth"].encode(swapped)
    assert torch.nn.functional.cosine_similarity(features, wrong, dim=-1).mean() < 0.99


def test_tokens_are_row_major(backbone, teachers):
    """A picture whose one bright patch is in row 3, column 20 differs most from a dark one at token 3 * 24 + 20."""
    dark = np.zeros((336, 336, 3), dtype=np.uint8)
    bright = dark.copy()
    bright[3 * 14 : 4 * 14, 20 * 14 : 21 * 14] = 255
    features = teachers["depth"].encode([Image.fromarray(dark), Image.fromarray(bright)])
    assert (features[1] - features[0]).norm(dim=-1).argmax() == 3 * 24 + 20


@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("reshape_hidden_states", [True, False])
def test_backbone_settings_do_not_matter(apply_layernorm, reshape_hidden_states, tiny, teachers, pictures, tmp_path):
    folder = with_backbone_config(
        tiny["depth"], tmp_path, apply_layernorm=apply_layernorm, reshape_hidden_states=reshape_hidden_states
    )
    features = load_teacher("depth", model=folder, device="cpu").encode(pictures[:2])
    assert torch.equal(features, teachers["depth"].encode(pictures[:2]))


def test_layers_are_the_models_own(backbone, tiny, pictures, tmp_path):
    folder = with_backbone_config(
        tiny["depth"], tmp_path, out_indices=[1, 2, 3, 4], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    teacher = load_teacher("depth", model=folder, device="cpu")
    assert teacher.card.recipe["layers"] == [0, 1, 2, 3]
    outputs = block_outputs(backbone, squashed(pictures[:1]))
    with torch.no_grad():
        expected = torch.stack([backbone.layernorm(outputs[block])[:, 1:] for block in range(4)]).mean(0)
    torch.testing.assert_close(teacher.encode(pictures[:1]), expected, atol=1e-5, rtol=0)


def test_layers_counted_from_the_end(tiny, teachers, tmp_path):
    folder = with_backbone_config(tiny["depth"], tmp_path, out_indices=[-5, -4, -2, -1], out_features=None)
    card = load_teacher("depth", model=folder, device="cpu").card
    assert card.recipe["layers"] == [1, 2, 4, 5]
    assert card.fingerprint() == teachers["depth"].card.fingerprint()


def test_the_embeddings_are_no_layer(tiny, tmp_path):
    folder = with_backbone_config(tiny["depth"], tmp_path, out_indices=[0, 2, 4, 6], out_features=None)
    DepthAnythingForDepthEstimation.from_pretrained(folder)  # takes them
    with pytest.raises(TeacherError, match=r"out_features \['stem', 'stage2', .*; take recipe last") as caught:
        load_teacher("depth", model=folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert load_teacher("depth", model=folder, recipe="last", device="cpu").card.recipe["layers"] == [5]


@torch.no_grad()
def test_autocast_is_nearer_to_float32_than_a_network_cast_whole(backbone, tiny, teachers, pictures):
    """The residual stream stays float32, which counts more the more blocks there are."""
    half = load_teacher("depth", model=tiny["depth"], device="cpu", compute_dtype="bfloat16")
    exact, whole = teachers["depth"].encode(pictures), copy.copy(half)
    whole.network = copy.deepcopy(backbone).bfloat16()
    cast = whole.features(squashed(pictures).bfloat16()).float()
    assert (half.encode(pictures) - exact).norm() < 0.8 * (cast - exact).norm()


def test_only_the_blocks_up_to_the_last_layer_are_there(tiny, teachers, tmp_path):
    folder = with_backbone_config(
        tiny["depth"], tmp_path, out_indices=[1, 2, 3, 4], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    assert len(load_teacher("depth", model=folder, device="cpu").network.encoder.layer) == 4
    assert len(teachers["depth"].network.encoder.layer) == 6


def test_a_patch_size_that_does_not_divide_the_input(tiny, tmp_path):
    from transformers import DepthAnythingConfig

    config = DepthAnythingConfig.from_pretrained(tiny["depth"])
    config.backbone_config.patch_size = config.patch_size = 15
    DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="15 pixels do not divide"):
        load_teacher("depth", model=tmp_path, device="cpu")


def with_backbone_config(source, target, **changes):
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    config["backbone_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target
