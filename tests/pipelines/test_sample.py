"""The bundled sample: real photographs, each named with its origin, in LLaVA's own JSON format."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image, ImageOps

SAMPLE = Path(str(files("olavlm.pipelines") / "sample"))
IMAGES = sorted((SAMPLE / "images").iterdir())
ORIENTATION = 0x0112


def read_samples(name):
    return json.loads((SAMPLE / name).read_text(encoding="utf-8"))


PT, IFT = read_samples("pt.json"), read_samples("ift.json")
ALL = PT + IFT


def origin_rows():
    """The cells of each row of the table in ORIGINS.md, keyed by file name."""
    lines = (SAMPLE / "ORIGINS.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows}


def open_image(name):
    with Image.open(SAMPLE / "images" / name) as image:
        image.load()
        return image


def test_the_sample_is_small():
    assert 16 <= len(IMAGES) <= 24
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 4_000_000


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_each_image_opens(path):
    image = open_image(path.name)
    assert min(image.size) >= 200
    assert max(image.size) <= 640
    assert path.stat().st_size < 200_000


def test_the_images_are_as_varied_as_real_data():
    opened = [open_image(path.name) for path in IMAGES]
    assert {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA")} <= {
        (image.format, image.mode) for image in opened
    }
    upright = [ImageOps.exif_transpose(image) for image in opened]
    assert any(image.width > image.height for image in upright)
    assert any(image.width == image.height for image in upright)
    assert any(image.width < image.height for image in upright)


def test_an_exif_tag_turns_one_image_upright():
    turned = {path.name: open_image(path.name) for path in IMAGES}
    turned = {name: image for name, image in turned.items() if image.getexif().get(ORIENTATION, 1) != 1}
    assert list(turned) == ["koala.jpg"]
    assert turned["koala.jpg"].getexif()[ORIENTATION] == 6
    assert turned["koala.jpg"].size == (640, 480)
    assert ImageOps.exif_transpose(turned["koala.jpg"]).size == (480, 640)


def test_the_alpha_is_real():
    alpha = open_image("kingfisher.png").getchannel("A")
    counts = alpha.histogram()
    total = alpha.width * alpha.height
    assert counts[0] > 0.1 * total
    assert counts[255] > 0.3 * total
    assert sum(counts[1:255]) > 0.02 * total


def test_the_palette_holds_many_colours():
    assert len(open_image("windmills.png").getcolors()) > 128


def test_the_cmyk_image_shows_a_blue_sky():
    """A reader that mistakes the sense of the inks would show it brown."""
    red, green, blue = open_image("colosseum.jpg").convert("RGB").getpixel((320, 10))
    assert red < green < blue
    assert blue > 180


def test_every_image_is_there_and_used():
    used = {sample["image"] for sample in ALL if "image" in sample}
    assert used == {path.name for path in IMAGES}
    assert {sample["image"] for sample in PT} == used


def test_every_image_has_a_free_origin():
    rows = origin_rows()
    assert set(rows) == {path.name for path in IMAGES}
    for row in rows.values():
        assert len(row) == 6
        assert all(row)
        assert row[3] in ("CC0", "public domain")
        assert row[4].startswith(("scikit-image, ", "GCompris, "))


def test_the_mixture():
    assert all("image" in sample for sample in PT)
    assert all(len(sample["conversations"]) == 2 for sample in PT)
    assert sum("image" not in sample for sample in IFT) >= 4
    assert any(len(sample["conversations"]) > 2 for sample in IFT if "image" in sample)
    assert any(len(sample["conversations"]) > 2 for sample in IFT if "image" not in sample)
    assert len(PT) >= len(IMAGES)
    assert 30 <= len(IFT) <= 40


def test_ids_are_unique():
    assert len({sample["id"] for sample in ALL}) == len(ALL)


@pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample["id"])
def test_each_conversation_is_well_formed(sample):
    assert set(sample) <= {"id", "image", "conversations"}
    turns = sample["conversations"]
    assert turns
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert all(set(turn) == {"from", "value"} and turn["value"].strip() == turn["value"] != "" for turn in turns)
    assert sum(turn["value"].count("<image>") for turn in turns) == int("image" in sample)
    if "image" in sample:
        first = turns[0]["value"]
        assert first.startswith("<image>\n") or first.endswith("\n<image>")
