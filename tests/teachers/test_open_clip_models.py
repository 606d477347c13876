"""open_clip's image towers as teachers, and that the unCLIP image encoder is the same through it and transformers."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from olavlm.cache import decode_rgb
from olavlm.teachers import TeacherError, load_teacher

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def refused(name: str, model=None, **options) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(TeacherError) as caught:
        load_teacher(name, model=model, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(open_clip_folder, tmp_path):
    """A copy of the tiny checkpoint to change."""
    return shutil.copytree(open_clip_folder, tmp_path / "open_clip")


def with_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def written(folder, vision: dict, **preprocessing):
    """A tiny model of random weights and its network."""
    config = {
        "embed_dim": 24,
        "vision_cfg": vision,
        "text_cfg": {"vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    return folder, model


def normalised(teacher, pictures) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([teacher.prepare(picture) for picture in pictures])) / 255
    return (pixels - torch.tensor(teacher.card.mean).view(3, 1, 1)) / torch.tensor(teacher.card.std).view(3, 1, 1)


def test_the_unclip_encoder_is_the_same_as_through_transformers(teachers, sample_images):
    """The same weights in both libraries' layouts, on photographs, from the file to the embedding."""
    pictures = [decode_rgb(path.read_bytes(), path.name) for path in sorted(sample_images.iterdir())]
    ours, theirs = teachers["open_clip:tiny"], teachers["gen"]
    assert len(pictures) >= 16
    for picture in pictures:
        np.testing.assert_array_equal(ours.prepare(picture), theirs.prepare(picture))
    features, expected = ours.encode(pictures), theirs.encode(pictures)
    assert features.shape == expected.shape
    cosine = torch.nn.functional.cosine_similarity(features, expected, dim=-1)
    assert cosine.min() >= 0.9999
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    between = torch.nn.functional.cosine_similarity(features[1:], expected[:-1], dim=-1)
    assert between.min() < 0.99  # the control: pictures do differ


@torch.no_grad()
def test_embedding_is_encode_image(open_clip_folder, teachers, pictures):
    teacher = teachers["open_clip:tiny"]
    model = open_clip.create_model(f"local-dir:{open_clip_folder}", load_weights=False)
    model.visual.load_state_dict(
        {name.removeprefix("visual."): tensor for name, tensor in load_file(open_clip_folder / WEIGHTS).items()},
        strict=False,
    )
    expected = model.eval().encode_image(normalised(teacher, pictures))[:, None]
    torch.testing.assert_close(teacher.encode(pictures), expected, atol=1e-5, rtol=0)
    assert teacher.card.recipe["quick_gelu"]


@torch.no_grad()
def test_tokens_are_the_towers_normalised_patches(open_clip_folder, teachers, pictures):
    teacher = load_teacher("open_clip:tiny", model=open_clip_folder, recipe="tokens", device="cpu")
    tower, pixels = teacher.network, normalised(teacher, pictures)
    patches = tower.conv1(pixels).flatten(2).mT
    hidden = torch.cat([tower.class_embedding.expand(len(pictures), 1, -1), patches], 1) + tower.positional_embedding
    hidden = tower.ln_pre(hidden)
    for block in tower.transformer.resblocks:
        hidden = block(hidden)
    torch.testing.assert_close(teacher.encode(pictures), tower.ln_post(hidden)[:, 1:], atol=1e-5, rtol=0)
    assert (teacher.card.grid, teacher.card.dim) == ((7, 7), 32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixels_are_those_of_open_clips_own_transform(resize_mode, interpolation, folder, pictures):
    settings = {"resize_mode": resize_mode, "interpolation": interpolation, "mean": [0.5] * 3, "fill_color": 9}
    teacher = load_teacher("open_clip:tiny", model=with_config(folder, preprocess_cfg=settings), device="cpu")
    steps = open_clip.image_transform(224, is_train=False, **settings).transforms[:-3]
    assert teacher.card.mean == (0.5, 0.5, 0.5)
    # Of the second picture's 319 rows too many torchvision cuts 160 above, we 159, as CLIP's image processor and `gen`.
    for picture in (pictures[0], *pictures[2:]):
        expected = picture
        for step in steps:
            expected = step(expected)
        np.testing.assert_array_equal(teacher.prepare(picture), np.asarray(expected).transpose(2, 0, 1))


@torch.no_grad()
@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_a_tower_of_timm(model, tmp_path, pictures):
    vision = {"image_size": 160, "timm_model_name": model, "timm_pool": "avg", "timm_proj": "linear"}
    folder, clip = written(tmp_path, vision, resize_mode="squash")
    teacher = load_teacher("open_clip:mine", model=folder, device="cpu")
    pixels = normalised(teacher, pictures)
    torch.testing.assert_close(teacher.encode(pictures), clip.encode_image(pixels)[:, None], atol=1e-5, rtol=0)
    tokens = load_teacher("open_clip:mine", model=folder, recipe="tokens", device="cpu")
    features = clip.visual.trunk.forward_features(pixels)
    expected = features[:, 1:] if features.ndim == 3 else features.flatten(2).mT
    torch.testing.assert_close(tokens.encode(pictures), expected, atol=1e-5, rtol=0)
    assert tokens.card.recipe["resize"] == "squash to 160 bicubic"


@torch.no_grad()
def test_a_tower_that_gives_its_tokens_too(tmp_path, pictures):
    vision = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    pooling = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
    folder, clip = written(tmp_path, vision | pooling)
    teacher = load_teacher("open_clip:coca", model=folder, device="cpu")
    expected, tokens = clip.visual(normalised(teacher, pictures))
    assert tokens.ndim == 3
    torch.testing.assert_close(teacher.encode(pictures), expected[:, None], atol=1e-5, rtol=0)
    assert "recipe 'tokens'" in refused("open_clip:coca", folder, recipe="tokens")  # its norm is behind the pooling


def test_a_file_of_a_registered_model(hub, open_clip_folder, tmp_path, monkeypatch):
    """Weights of a tag come from open_clip's hub repository; the tag knows of QuickGELU and preprocessing."""
    config = json.loads((open_clip_folder / CONFIG).read_text())["model_cfg"] | {"quick_gelu": False}
    (tmp_path / "tiny-registered.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny-registered.json")
    tag = {"quick_gelu": True, "hf_hub": "someone/tiny-clip/", "resize_mode": "squash", "mean": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-registered", {"photos": tag})

    name = "open_clip:tiny-registered/photos"
    hub("someone/tiny-clip", open_clip_folder)
    card = load_teacher(name, device="cpu").card
    assert (card.model, len(card.revision)) == ("someone/tiny-clip", 40)
    assert (card.recipe["quick_gelu"], card.recipe["resize"], card.mean) == (True, "squash to 224 bicubic", (0.5,) * 3)
    assert load_teacher(name, model=card.model, revision=card.revision, device="cpu").card == card

    shutil.copy(open_clip_folder / WEIGHTS, tmp_path / "alone.safetensors")
    alone = load_teacher(name, model=tmp_path / "alone.safetensors", device="cpu").card
    assert alone.fingerprint() == card.fingerprint()
    untagged = load_teacher("open_clip:tiny-registered", model=tmp_path / "alone.safetensors", device="cpu").card
    assert (untagged.recipe["quick_gelu"], untagged.recipe["resize"]) == (
        False,
        "short edge to 224 bicubic, centre crop 224",
    )
    assert "name a file, open_clip:tiny-registered=FILE" in refused("open_clip:tiny-registered")
    assert "no such pretrained weights; tiny-registered has photos" in refused("open_clip:tiny-registered/drawings")


def test_a_model_that_open_clip_lacks(open_clip_folder, tmp_path):
    shutil.copy(open_clip_folder / WEIGHTS, tmp_path / "alone.safetensors")
    assert "near are ViT-H-1" in refused("open_clip:ViT-H-15", tmp_path / "alone.safetensors")
    assert "laion2b_s32b_b79k" in refused("open_clip:ViT-H-14/laion3b")


def test_the_folder_of_another_model(open_clip_folder):
    line = refused("open_clip:ViT-H-14", open_clip_folder)
    assert "is not that of ViT-H-14" in line
    assert "width 32, not 1280" in line


def test_a_missing_tensor_is_not_drawn_at_random(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["visual.ln_post.bias"]
    save_file(weights, folder / WEIGHTS)
    assert "lack 1 tensors of the image tower (such as ln_post.bias)" in refused("open_clip:tiny", folder)


def test_the_tower_alone_may_be_in_the_file(folder, teachers, pictures):
    weights = load_file(folder / WEIGHTS)
    tower = {name.removeprefix("visual."): tensor for name, tensor in weights.items() if name.startswith("visual.")}
    save_file(tower, folder / WEIGHTS)
    features = load_teacher("open_clip:tiny", model=folder, device="cpu").encode(pictures)
    assert torch.equal(features, teachers["open_clip:tiny"].encode(pictures))


def test_what_cannot_be_read(folder, tmp_path):
    weights = load_file(folder / WEIGHTS)
    weights["visual.proj"] = weights["visual.proj"][:-1].clone()
    save_file(weights, folder / WEIGHTS)
    assert "cannot load it" in refused("open_clip:tiny", folder)
    (folder / WEIGHTS).rename(folder / "open_clip_pytorch_model.bin")
    assert "only safetensors are read" in refused("open_clip:tiny", folder)
    assert "no such file" in refused("open_clip:tiny", tmp_path / "none.safetensors")
