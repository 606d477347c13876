import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import OneFormerModel
from transformers.models.oneformer.image_processing_pil_oneformer import OneFormerImageProcessorPil

from olavlm.teachers import TeacherError, load_teacher
from olavlm.teachers.preprocessor import Preprocessor
from olavlm.teachers.seg import processed_side

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def backbone(tiny):
    return OneFormerModel.from_pretrained(tiny["seg"]).pixel_level_module.encoder.eval()


@pytest.fixture
def seg_folder(tiny, tmp_path):
    """A copy of the tiny checkpoint to change."""
    return shutil.copytree(tiny["seg"], tmp_path / "seg")


def normalised(images) -> torch.Tensor:
    arrays = [(np.asarray(image) / 255 - MEAN) / STD for image in images]
    return torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2).float()


def squashed(images) -> list[Image.Image]:
    return [image.resize((768, 768), Image.Resampling.BICUBIC) for image in images]


@torch.no_grad()
def last_map(backbone, pixels) -> torch.Tensor:
    """The last stage's map from the Swin's own hidden states, normalised by hand."""
    hidden = backbone.swin(pixels, output_hidden_states=True, always_partition=True).reshaped_hidden_states[-1]
    norm = backbone.hidden_states_norms["stage4"]
    hidden = hidden.permute(0, 2, 3, 1)
    centred = hidden - hidden.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    return (scaled * norm.weight + norm.bias).permute(0, 3, 1, 2)


def test_stage4_is_the_interpolated_last_map(backbone, teachers, pictures):
    processed = [image.resize((800, 800), Image.Resampling.BILINEAR) for image in squashed(pictures[:2])]
    maps = last_map(backbone, normalised(processed))
    assert maps.shape[2:] == (25, 25)
    expected = F.interpolate(maps, (24, 24), mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(teachers["seg"].encode(pictures[:2]), expected, atol=1e-5, rtol=0)
    assert teachers["seg"].card.size == (800, 800)


def test_stage4_768_is_the_last_map_itself(backbone, tiny, pictures):
    teacher = load_teacher("seg", model=tiny["seg"], recipe="stage4-768", device="cpu")
    maps = last_map(backbone, normalised(squashed(pictures[:2])))
    features = teacher.encode(pictures[:2])
    torch.testing.assert_close(features, maps.flatten(2).mT, atol=1e-5, rtol=0)
    torch.testing.assert_close(features[1, 3 * 24 + 20], maps[1, :, 3, 20], atol=1e-5, rtol=0)  # row-major
    assert teacher.card.size == (768, 768)


def test_the_whole_models_backbone_gives_the_same(backbone, teachers, pictures):
    pixels = torch.from_numpy(teachers["seg"].prepare(pictures[0]))[None]
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        maps = backbone(normalised([image])).feature_maps[-1]
    expected = F.interpolate(maps, (24, 24), mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(teachers["seg"].forward(pixels), expected, atol=1e-5, rtol=0)


def test_no_other_stage_is_normalised(teachers, pictures, monkeypatch):
    def refuse(*_):
        raise AssertionError("computed for nothing")

    network, expected = teachers["seg"].network, teachers["seg"].encode(pictures[:1])
    for norm in (*(network.hidden_states_norms[f"stage{stage}"] for stage in (1, 2, 3)), network.swin.layernorm):
        monkeypatch.setattr(norm, "forward", refuse)
    assert torch.equal(teachers["seg"].encode(pictures[:1]), expected)


def test_a_backbone_that_ends_early(seg_folder):
    config = json.loads((seg_folder / "config.json").read_text())
    config["backbone_config"] |= {"out_features": ["stage1", "stage2", "stage3"], "out_indices": [1, 2, 3]}
    (seg_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="ends with stage3, not stage4"):
        load_teacher("seg", model=seg_folder, device="cpu")


def test_a_folder_that_names_class_info_file_loads_offline(seg_folder, teachers):
    """With that entry, building OneFormer's processor asks the hub even for a local folder."""
    entries = {"class_info_file": "coco_panoptic.json", "repo_path": "shi-labs/oneformer_demo", "num_text": 134}
    (seg_folder / "preprocessor_config.json").write_text(
        json.dumps(entries | {"size": {"shortest_edge": 800, "longest_edge": 1333}, "image_mean": list(MEAN)})
    )
    teacher = load_teacher("seg", model=seg_folder, device="cpu")
    assert teacher.card.fingerprint() == teachers["seg"].card.fingerprint()


def test_the_folders_own_preprocessing_is_followed(seg_folder, backbone, pictures):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    (seg_folder / "preprocessor_config.json").write_text(
        json.dumps({"size": 672, "max_size": 2000, "resample": 3, "image_mean": mean, "image_std": std})
    )
    teacher = load_teacher("seg", model=seg_folder, device="cpu")
    image = squashed(pictures[:1])[0].resize((672, 672), Image.Resampling.BICUBIC)
    pixels = torch.tensor((np.asarray(image) / 255 - mean) / std).permute(2, 0, 1)[None].float()
    expected = F.interpolate(last_map(backbone, pixels), (24, 24), mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(teacher.encode(pictures[:1]), expected, atol=1e-5, rtol=0)
    assert teacher.card.size == (672, 672)
    assert teacher.card.mean == tuple(mean)


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("rescaling", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_pixels_of_another_range(rescaling, do_normalize, seg_folder, backbone, pictures):
    fields = {"do_normalize": do_normalize, **rescaling}
    (seg_folder / "preprocessor_config.json").write_text(json.dumps(fields))
    teacher = load_teacher("seg", model=seg_folder, device="cpu")
    pixels = OneFormerImageProcessorPil(**fields)(squashed(pictures[:1]), return_tensors="pt")["pixel_values"].float()
    expected = F.interpolate(last_map(backbone, pixels), (24, 24), mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(teacher.encode(pictures[:1]), expected, atol=1e-4, rtol=0)


def test_the_usual_rescaling_changes_no_fingerprint(seg_folder, teachers):
    fields = {"do_rescale": True, "rescale_factor": 0.00392156862745098}
    (seg_folder / "preprocessor_config.json").write_text(json.dumps(fields))
    card = load_teacher("seg", model=seg_folder, device="cpu").card
    assert card.fingerprint() == teachers["seg"].card.fingerprint()


def test_a_processor_saved_by_transformers_5_is_followed(seg_folder, hub, tiny):
    """It has the image processor in the file of the whole processor, and no file of its own; from the hub, too."""
    (seg_folder / "preprocessor_config.json").unlink(missing_ok=True)
    section = {"size": {"shortest_edge": 672, "longest_edge": 672}, "image_mean": [0.5, 0.4, 0.3], "image_std": None}
    whole = {"processor_class": "OneFormerProcessor", "image_processor": section}
    (seg_folder / "processor_config.json").write_text(json.dumps(whole))
    hub("someone/saved", seg_folder)
    local, remote = (load_teacher("seg", model=model, device="cpu").card for model in (seg_folder, "someone/saved"))
    assert (local.size, local.mean, local.std) == ((672, 672), (0.5, 0.4, 0.3), tuple(STD))
    assert remote.fingerprint() == local.fingerprint()
    (seg_folder / "preprocessor_config.json").write_text(json.dumps({"size": 640}))  # transformers reads the section
    assert load_teacher("seg", model=seg_folder, device="cpu").card == local
    (seg_folder / "processor_config.json").write_text(json.dumps({"image_processor": "section"}))
    with pytest.raises(TeacherError, match=r"processor_config\.json: its image_processor is 'section'"):
        load_teacher("seg", model=seg_folder, device="cpu")


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        ({}, 800),
        ({"do_resize": False}, 768),
        ({"size": 640, "max_size": 2560}, 640),
        ({"size": {"shortest_edge": 900, "longest_edge": 850}}, 850),
        ({"size": {"shortest_edge": 512}}, 512),
        ({"size": {"shortest_edge": 512, "longest_edge": None}}, 512),
        ({"size": {"height": 512, "width": 512}}, 512),
    ],
)
def test_processed_side(processor, side):
    assert processed_side(Preprocessor(processor), 768) == side


def test_a_size_that_is_no_square_is_refused():
    with pytest.raises(TeacherError, match="stage4-768"):
        processed_side(Preprocessor({"size": {"height": 512, "width": 640}}), 768)


def test_null_counts_as_absent(seg_folder, teachers):
    names = ("size", "max_size", "resample", "image_mean", "image_std", "do_resize", "do_normalize", "rescale_factor")
    (seg_folder / "preprocessor_config.json").write_text(json.dumps(dict.fromkeys(names)))
    card = load_teacher("seg", model=seg_folder, device="cpu").card
    assert card.fingerprint() == teachers["seg"].card.fingerprint()


def test_pixels_that_are_not_normalised(seg_folder):
    (seg_folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [0.5] * 3}))
    card = load_teacher("seg", model=seg_folder, device="cpu").card
    assert (card.mean, card.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resample", 9),
        ("resample", "bilinear"),
        ("size", "800"),
        ("size", {"shortest_edge": "800"}),
        ("size", {"height": [512], "width": [512]}),
        ("size", 0),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("do_resize", "no"),
        ("do_normalize", 1),
        ("do_rescale", 0),
        ("rescale_factor", 0),
        ("rescale_factor", -1 / 255),
        ("rescale_factor", float("nan")),
        ("rescale_factor", "1/255"),
        ("rescale_factor", True),
    ],
)
def test_a_value_that_cannot_be_used_is_one_line(field, value, seg_folder):
    (seg_folder / "preprocessor_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(TeacherError) as caught:
        load_teacher("seg", model=seg_folder, device="cpu")
    assert str(caught.value).startswith(f"{seg_folder}: preprocessor_config.json: {field} is {value!r}; ")
    assert "\n" not in str(caught.value)


def test_tensor_names_of_older_checkpoints_load(seg_folder, teachers, pictures):
    """The published checkpoints name the backbone's tensors without `swin.` and lack the layernorm it never uses."""
    weights = load_file(seg_folder / "model.safetensors")
    old = {name.replace("encoder.swin.", "encoder."): tensor for name, tensor in weights.items()}
    old = {
        name: tensor
        for name, tensor in old.items()
        if not name.startswith("model.pixel_level_module.encoder.layernorm")
    }
    assert len(old) == len(weights) - 2
    save_file(old, seg_folder / "model.safetensors", {"format": "pt"})
    features = load_teacher("seg", model=seg_folder, device="cpu").encode(pictures[:1])
    assert torch.equal(features, teachers["seg"].encode(pictures[:1]))
