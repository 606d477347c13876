"""What holds for every teacher."""

import ast
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import olavlm.teachers
from olavlm.teachers import TEACHERS, Teacher, TeacherError, load_teacher, look_up

NAMES = [
    "depth",
    "seg",
    "gen",
    "timm:vit_small_patch14_reg4_dinov2",
    "timm:swin_tiny_patch4_window7_224",
    "timm:convnext_tiny",
    "open_clip:tiny",
]
every_recipe = pytest.mark.parametrize(
    ("name", "recipe"), [(name, recipe) for name in NAMES for recipe in look_up(name)[0].recipes]
)
every_teacher = pytest.mark.parametrize("name", NAMES)


def test_every_kind_of_teacher_is_tried():
    assert {name.partition(":")[0] for name in NAMES} == TEACHERS.keys()


@every_recipe
def test_shapes_and_types_are_the_cards(name, recipe, checkpoints, pictures):
    teacher = load_teacher(name, model=checkpoints[name], recipe=recipe, device="cpu")
    assert isinstance(teacher, Teacher)
    features = teacher.encode(pictures[:2])
    assert features.shape == (2, teacher.card.tokens, teacher.card.dim)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert not features.requires_grad
    assert teacher.card.grid[0] * teacher.card.grid[1] == teacher.card.tokens
    assert teacher.card.recipe["name"] == recipe


@every_recipe
def test_one_by_one_equals_a_batch(name, recipe, checkpoints, pictures):
    teacher = load_teacher(name, model=checkpoints[name], recipe=recipe, device="cpu")
    batch = teacher.encode(pictures)
    alone = torch.cat([teacher.encode([image]) for image in pictures])
    torch.testing.assert_close(alone, batch, atol=1e-5, rtol=0)


@every_teacher
def test_different_pictures_differ(name, teachers, pictures):
    """The tiny weights are worth testing with: features vary over pictures about as much as within one."""
    features = teachers[name].encode(pictures)
    assert features.std(dim=0).mean() > 0.2 * features.std()


@every_teacher
def test_prepare_has_one_shape_for_every_picture(name, teachers, pictures):
    teacher = teachers[name]
    for image in [*pictures, Image.new("L", (40, 3)), Image.new("RGBA", (3, 40)), Image.new("P", (1, 1))]:
        pixels = teacher.prepare(image)
        assert pixels.shape == (3, *teacher.card.size)
        assert pixels.dtype == np.uint8


@every_teacher
def test_prepare_is_the_same_from_many_threads(name, teachers, pictures):
    teacher = teachers[name]
    alone = [teacher.prepare(image) for image in pictures]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(teacher.prepare, pictures * 3), alone * 3, strict=True):
            np.testing.assert_array_equal(got, expected)


@every_teacher
def test_forward_of_prepared_pictures_is_encode(name, teachers, pictures):
    teacher = teachers[name]
    batch = torch.from_numpy(np.stack([teacher.prepare(image) for image in pictures[:2]]))
    assert torch.equal(teacher.forward(batch), teacher.encode(pictures[:2]))


@every_teacher
def test_a_colour_of_the_mean_is_normalised_to_zero(name, teachers, monkeypatch):
    teacher, seen = teachers[name], []
    monkeypatch.setattr(teacher, "features", lambda pixels: seen.append(pixels) or pixels)
    pixels = torch.full((1, 3, *teacher.card.size), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    teacher.forward(pixels)
    expected = [(0.2 - mean) / std for mean, std in zip(teacher.card.mean, teacher.card.std, strict=True)]
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor(expected))


@every_teacher
def test_autocast_of_the_caller_does_not_change_features(name, teachers, pictures):
    expected = teachers[name].encode(pictures[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teachers[name].encode(pictures[:1]), expected)


@every_teacher
def test_half_precision_is_close_and_another_teacher(name, checkpoints, teachers, pictures):
    half = load_teacher(name, model=checkpoints[name], device="cpu", compute_dtype="bfloat16")
    exact = teachers[name].encode(pictures)
    features = half.encode(pictures)
    assert features.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(features, exact, dim=-1).mean() > 0.99
    assert not torch.equal(features, exact)
    assert half.card.fingerprint() != teachers[name].card.fingerprint()


@every_teacher
@torch.no_grad()
def test_half_precision_is_autocast(name, checkpoints, teachers, pictures):
    """To the bit, though the weights are rounded once, at load."""
    half = load_teacher(name, model=checkpoints[name], device="cpu", compute_dtype="bfloat16")
    exact, pixels = teachers[name], torch.from_numpy(half.prepare(pictures[0]))[None]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (half.card.mean, half.card.std))
    normalised = (pixels / 255 - mean) / std
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = exact.features(normalised).float()
    assert torch.equal(half.forward(pixels), expected)


@every_teacher
@pytest.mark.parametrize("geometry", ["square", "pad"])
def test_all_of_the_frame_is_seen(name, geometry, checkpoints, teachers, pictures):
    """Also by a model whose own preprocessing would cut the edges off."""
    framed = load_teacher(name, model=checkpoints[name], device="cpu", geometry=geometry)
    wide, reference = pictures[0], teachers[name]
    if geometry == "square":
        by_hand = wide.crop((80, 0, 560, 480))
    else:
        by_hand = Image.new("RGB", (640, 640), tuple(int(255 * mean) for mean in reference.card.mean))
        by_hand.paste(wide, (0, 80))
    if name == "seg":
        by_hand = by_hand.resize((768, 768), Image.Resampling.BICUBIC).resize((800, 800), Image.Resampling.BILINEAR)
    expected = np.asarray(by_hand.resize(reference.card.size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(framed.prepare(wide), expected)
    assert framed.card.geometry == geometry
    assert framed.card.fingerprint() != reference.card.fingerprint()
    rest = {"geometry": geometry, "recipe": framed.card.recipe}
    assert framed.card == dataclasses.replace(reference.card, **rest)


@every_teacher
def test_no_pictures_give_no_rows(name, teachers):
    card = teachers[name].card
    assert teachers[name].encode([]).shape == (0, card.tokens, card.dim)


@every_teacher
def test_a_batch_that_prepare_did_not_make_is_refused(name, teachers):
    with pytest.raises(TeacherError, match="stack what prepare"):
        teachers[name].forward(torch.zeros(1, 3, *teachers[name].card.size))


@every_teacher
def test_loading_does_not_touch_the_callers_random_numbers(name, checkpoints):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_teacher(name, model=checkpoints[name], device="cpu")
    assert torch.equal(torch.rand(1), expected)


def test_teachers_import_nothing_of_ours():
    folder = Path(olavlm.teachers.__file__).parent
    imported = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or ""))
    assert "olavlm.teachers.card" in imported  # the walk sees imports
    ours = {module for module in imported if module.startswith(("olavlm", "."))}
    assert all(module.startswith("olavlm.teachers.") for module in ours), ours
    assert not {module.split(".")[0] for module in imported} & {"ray", "zarr"}


def test_importing_the_package_imports_no_model_library():
    code = "import sys, olavlm.teachers; print(sorted({'torch', 'transformers', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
