"""`--teacher base`: found by the command and by Ray's workers, verified live, and what is wrong said in one line."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from olavlm.cache import FeatureStore
from olavlm.pipelines import extract, store, train
from olavlm.student.training.metrics import read_metrics
from olavlm.student.vision.encoders import VisionEncoder
from olavlm.student.vision.image_transform import ImageTransform
from olavlm.teachers import TeacherError, load_teacher

PAGE = (Path(__file__).parents[2] / "docs" / "encoder-features.md").read_text()


def test_the_page_works_and_what_is_stored_is_verified_live(
    tiny, pt_json, sample_images, tmp_path, monkeypatch, capsys
):
    """As a user runs it, with a Ray of its own."""
    monkeypatch.chdir(tmp_path)
    for name, target in {"tiny": tiny["encoder"].parent, "pt.json": pt_json, "images": sample_images}.items():
        Path(name).symlink_to(target)
    extraction, training = re.findall(r"^olavlm-.*$", PAGE, flags=re.M)
    here = ["--batch-size", "4", "--device", "cpu", "--workers", "1"]
    assert extract.main([*shlex.split(extraction)[1:], *here]) == 0
    features = FeatureStore("features")["base"]
    assert features.coverage().valid == 10
    assert features.card["model"] == str(tmp_path / "tiny" / "encoder"), "workers are elsewhere"
    assert (features.card["geometry"], features.card["recipe"]["layers"]) == ("square", [-2])

    assert train.main([*shlex.split(training)[1:], "--data.workers", "0"]) == 0
    assert len(read_metrics(Path("runs/pt/metrics.jsonl"))) == 2
    capsys.readouterr()
    assert store.main(["verify", "features", "--teacher", "base", "--live", "3", "--json"]) == 0
    live = json.loads(capsys.readouterr().out)["live"]["teachers"]
    assert live["base"]["rows"] == 3
    assert live["base"]["worst"] > 0.9999


def test_reference_is_what_pt_sees_and_names_do_not_count(tiny):
    square, reference, pad = (
        load_teacher("base", model=tiny["encoder"], geometry=geometry, device="cpu").card
        for geometry in ("square", "reference", "pad")
    )
    assert reference == square
    assert pad.fingerprint() != square.fingerprint()
    relative = load_teacher("base", model=os.path.relpath(tiny["encoder"]), device="cpu").card
    assert relative.fingerprint() == square.fingerprint()
    other = load_teacher("base", model=tiny["encoder"], recipe="layer-1", device="cpu").card
    assert other.fingerprint() != square.fingerprint()


def test_a_reduced_dtype_is_the_trainers_mixed_precision(tiny):
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    pixels = torch.from_numpy(ImageTransform(56)(image))[None]
    with torch.autocast("cpu", torch.bfloat16):
        expected = VisionEncoder.from_pretrained(tiny["encoder"])(pixels).float()
    teacher = load_teacher("base", model=tiny["encoder"], compute_dtype="bfloat16", device="cpu")
    features = teacher.encode([image])
    assert torch.equal(features, expected)
    with torch.autocast("cpu", torch.bfloat16):
        exact = load_teacher("base", model=tiny["encoder"], device="cpu").encode([image])
    assert not torch.equal(exact, features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "base: name a recipe's model.encoder, as in --teacher base=MODEL"),
        ({"model": "encoder", "revision": "main"}, "base: revision 'main' is not for it"),
        ({"model": "encoder", "recipe": "layer9"}, "base: select_layer=9: the encoder has 4 blocks"),
        ({"model": "llm"}, "base: .*'llama' is no known encoder"),
        ({"model": "timm:no_such"}, "base: .*timm .* has no model 'no_such'"),
    ],
)
def test_what_is_wrong_is_one_line(tiny, options, message, monkeypatch):
    monkeypatch.chdir(tiny["encoder"].parent)
    with pytest.raises(TeacherError, match=message):
        load_teacher("base", device="cpu", **options)


def test_a_batch_that_is_not_of_prepared_pictures(tiny):
    teacher = load_teacher("base", model=tiny["encoder"], device="cpu")
    assert teacher.encode([]).shape == (0, 16, 64)
    with pytest.raises(TeacherError, match=r"batch of torch.uint8 \(1, 3, 56, 56\): base takes float32"):
        teacher.forward(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))
