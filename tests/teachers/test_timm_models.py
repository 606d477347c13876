"""timm's models as teachers: features and preprocessing are timm's own, and what cannot be used is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from olavlm.teachers import TeacherError, load_teacher
from olavlm.teachers.timm_models import preprocessing_of

DINOV2, SWIN = "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"
every_architecture = pytest.mark.parametrize(
    ("architecture", "grid"),
    [
        (DINOV2, 4),
        ("vit_small_patch16_dinov3", 16),
        ("vit_base_patch16_siglip_224", 4),
        ("vit_intern300m_patch14_448", 32),
        (SWIN, 7),
        ("convnext_tiny", 7),
    ],
)


def network_of(folder) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def normalised(teacher, pictures) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([teacher.prepare(picture) for picture in pictures])) / 255
    return (pixels - torch.tensor(teacher.card.mean).view(3, 1, 1)) / torch.tensor(teacher.card.std).view(3, 1, 1)


def refused(name: str, model=None, **options) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(TeacherError) as caught:
        load_teacher(name, model=model, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def dinov2(timm_folders, tmp_path):
    """A copy of a tiny checkpoint to change."""
    return shutil.copytree(timm_folders[DINOV2], tmp_path / "dinov2")


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@every_architecture
@torch.no_grad()
def test_tokens_are_the_models_last_ones(architecture, grid, timm_folders, teachers, pictures):
    teacher, network = teachers[f"timm:{architecture}"], network_of(timm_folders[architecture])
    features = network.forward_features(normalised(teacher, pictures[:2]))
    if features.ndim == 3:
        expected = features[:, network.num_prefix_tokens :]
    else:
        expected = features.flatten(1, 2) if architecture == SWIN else features.flatten(2).mT
    torch.testing.assert_close(teacher.encode(pictures[:2]), expected, atol=1e-5, rtol=0)
    assert (teacher.card.grid, teacher.card.dim) == ((grid, grid), network.num_features)


@every_architecture
@torch.no_grad()
def test_embedding_is_what_the_classifier_reads(architecture, grid, timm_folders, pictures):
    teacher = load_teacher(f"timm:{architecture}", model=timm_folders[architecture], recipe="embedding", device="cpu")
    network = network_of(timm_folders[architecture])
    pixels = normalised(teacher, pictures[:2])
    expected = network.forward_head(network.forward_features(pixels), pre_logits=True)[:, None]
    torch.testing.assert_close(teacher.encode(pictures[:2]), expected, atol=1e-5, rtol=0)
    assert teacher.card.grid == (1, 1)


@every_architecture
def test_tokens_are_row_major(architecture, grid, teachers):
    """A picture whose one bright cell is in row 1, column 2 differs most from a dark one at token grid + 2."""
    teacher = teachers[f"timm:{architecture}"]
    side = teacher.card.size[0] // grid
    dark = np.zeros((3, *teacher.card.size), dtype=np.uint8)
    bright = dark.copy()
    bright[:, side : 2 * side, 2 * side : 3 * side] = 255
    features = teacher.forward(torch.from_numpy(np.stack([dark, bright])))
    assert (features[1] - features[0]).norm(dim=-1).argmax() == grid + 2


def test_class_and_register_tokens_are_dropped(teachers, timm_folders):
    assert network_of(timm_folders[DINOV2]).num_prefix_tokens == 5
    assert teachers[f"timm:{DINOV2}"].card.tokens == 16


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("crop_mode", "crop_pct"), [("center", 0.9), ("squash", 0.9), ("border", 0.9), ("border", 1.0)]
)
def test_pixels_are_those_of_timms_own_transform(interpolation, crop_mode, crop_pct, timm_folders, pictures, tmp_path):
    folder = shutil.copytree(timm_folders["convnext_tiny"], tmp_path, dirs_exist_ok=True)
    with_config(folder, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation, mean=[0.5, 0.4, 0.3])
    teacher = load_teacher("timm:convnext_tiny", model=folder, device="cpu")
    config = timm.data.resolve_model_data_config(network_of(folder))
    steps = timm.data.create_transform(**config).transforms[:-2]  # up to where pixels become floats
    assert teacher.card.mean == (0.5, 0.4, 0.3)
    for picture in pictures:
        expected = picture
        for step in steps:
            expected = step(expected)
        np.testing.assert_array_equal(teacher.prepare(picture), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("side", [224, 336, 384])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 1.0), ("squash", 0.99), ("border", 0.99)])
def test_the_crop_is_timms_to_the_pixel(crop_mode, crop_pct, side):
    """Of an odd number of pixels too many timm leaves the even half."""
    config = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": "bicubic"}
    network = SimpleNamespace(pretrained_cfg=config | {"input_size": (3, side, side)})
    resizing = preprocessing_of(network, "model").resizing
    config = timm.data.resolve_model_data_config(network)
    steps = timm.data.create_transform(**config).transforms[:-2]
    for size in [(640, 427), (427, 640), (1024, 683), (500, 375)]:
        picture = Image.effect_noise(size, 80).convert("RGB")
        expected = picture
        for step in steps:
            expected = step(expected)
        np.testing.assert_array_equal(np.asarray(resizing(picture)), np.asarray(expected))


def test_a_file_and_a_folder_are_the_same_teacher(tmp_path):
    """A file alone is of the model that the name says; with a config.json beside it, of the one described there."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit.r160_in1k")
    timm.models.save_for_hf(network, tmp_path / "folder", safe_serialization=True)
    alone = tmp_path / "renamed.safetensors"
    shutil.copy(tmp_path / "folder" / "model.safetensors", alone)
    models = (tmp_path / "folder", tmp_path / "folder" / "model.safetensors", alone)
    cards = [load_teacher("timm:test_vit.r160_in1k", model=model, device="cpu").card for model in models]
    assert len({card.fingerprint() for card in cards}) == 1
    assert [card.model for card in cards] == [str(model) for model in models]
    assert (cards[0].grid, cards[0].mean, cards[0].recipe["resize"]) == (
        (10, 10),
        (0.5, 0.5, 0.5),
        "short edge to 168 bicubic, centre crop 160 rounded to even",
    )


def test_timms_own_weights_come_from_its_repository(hub, tmp_path):
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "folder", safe_serialization=True)
    local = load_teacher("timm:test_vit.r160_in1k", model=tmp_path / "folder", device="cpu").card
    assert "hub or its cache" in refused("timm:test_vit.r160_in1k")
    hub("timm/test_vit.r160_in1k", tmp_path / "folder")
    for name in ("timm:test_vit", "timm:test_vit.r160_in1k"):  # the first tag is the default
        card = load_teacher(name, device="cpu").card
        assert (card.model, len(card.revision)) == ("timm/test_vit.r160_in1k", 40)
        assert card.fingerprint() == local.fingerprint()
        again = load_teacher(name, model=card.model, revision=card.revision, device="cpu").card
        assert again == card
    hub("someone/mine", tmp_path / "folder")
    assert load_teacher("timm:test_vit", model="someone/mine", device="cpu").card.fingerprint() == local.fingerprint()


def test_a_model_that_timm_lacks():
    assert "near are convnext_tiny" in refused("timm:convnext_tyni", "weights.safetensors")
    assert "Use one of test_vit.r160_in1k" in refused("timm:test_vit.mine", "weights.safetensors")


def test_weights_of_another_architecture(timm_folders):
    line = refused(f"timm:{SWIN}", timm_folders[DINOV2])
    assert f"architecture {DINOV2}, not {SWIN}; use timm:{DINOV2}=" in line


def test_a_file_of_another_model(timm_folders, tmp_path):
    shutil.copy(timm_folders[DINOV2] / "model.safetensors", tmp_path / "alone.safetensors")
    line = refused("timm:test_vit", tmp_path / "alone.safetensors")
    assert "timm cannot load it as test_vit" in line
    assert "config.json" in line


def test_a_missing_tensor_is_not_drawn_at_random(dinov2):
    weights = load_file(dinov2 / "model.safetensors")
    del weights["blocks.1.attn.proj.weight"]
    save_file(weights, dinov2 / "model.safetensors")
    assert "blocks.1.attn.proj.weight" in refused(f"timm:{DINOV2}", dinov2)


def test_a_tensor_of_another_shape(dinov2):
    weights = load_file(dinov2 / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"][:-1].clone()
    save_file(weights, dinov2 / "model.safetensors")
    assert "norm.weight" in refused(f"timm:{DINOV2}", dinov2)


def test_damaged_weights(dinov2):
    content = (dinov2 / "model.safetensors").read_bytes()
    (dinov2 / "model.safetensors").write_bytes(content[:-100])
    assert "cannot load it" in refused(f"timm:{DINOV2}", dinov2)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.pth"])
def test_pickled_weights_are_not_read(name, dinov2):
    (dinov2 / "model.safetensors").rename(dinov2 / name)
    assert "only safetensors are read" in refused(f"timm:{DINOV2}", dinov2)
    assert "only safetensors are read" in refused(f"timm:{DINOV2}", dinov2 / name)


def test_what_is_not_there(dinov2, tmp_path):
    assert "no such file" in refused(f"timm:{DINOV2}", tmp_path / "none.safetensors")
    assert "no such folder or file" in refused(f"timm:{DINOV2}", tmp_path / "none")
    assert "no revision 'main'" in refused(f"timm:{DINOV2}", dinov2, revision="main")
    (dinov2 / "config.json").write_text("{}")
    assert "no config.json with 'architecture'" in refused(f"timm:{DINOV2}", dinov2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_size": [3, 224, 192]}, "224 x 192"),
        ({"mean": [0.5], "std": [0.5]}, "1 channels"),
        ({"interpolation": "cubical"}, "'cubical' is none of Pillow's"),
        ({"crop_mode": "tiles"}, "'tiles' is none of short edge, long edge, squash"),
    ],
)
def test_pictures_that_we_do_not_make(changes, text, timm_folders, tmp_path):
    folder = shutil.copytree(timm_folders["convnext_tiny"], tmp_path, dirs_exist_ok=True)
    assert text in refused("timm:convnext_tiny", with_config(folder, **changes))


def test_a_network_whose_tokens_have_no_known_order(tmp_path):
    """Hiera's are in the order of its windows."""
    arguments = {"embed_dim": 16}
    network = timm.create_model("hiera_tiny_224", **arguments)
    timm.models.save_for_hf(network, tmp_path, model_config={"model_args": arguments}, safe_serialization=True)
    assert "recipe 'tokens': the network does not offer it" in refused("timm:hiera_tiny_224", tmp_path)
    assert load_teacher("timm:hiera_tiny_224", model=tmp_path, recipe="embedding", device="cpu").card.dim == 128


def test_batch_statistics_stay_as_they_were_trained(tmp_path):
    """Looking what the network gives must not count as training."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    teacher = load_teacher("timm:test_resnet", model=tmp_path, device="cpu")
    picture = Image.effect_noise((160, 160), 80).convert("RGB")
    with torch.no_grad():
        expected = network.forward_features(normalised(teacher, [picture])).flatten(2).mT
    torch.testing.assert_close(teacher.encode([picture]), expected, atol=1e-5, rtol=0)
