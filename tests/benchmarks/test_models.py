"""The miniature's models are checkpoints like any other: they load through the product, and are trained once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.student.text.chat_template import check_chat_template
from olavlm.student.text.conversation import encode, load_tokenizer
from olavlm.student.vision.encoders import VisionEncoder, load_image_transform
from olavlm.teachers import load_teacher, miniature
from olavlm.teachers.decoders import load_decoder
from olavlm.teachers.errors import TeacherError

ROOT = Path(__file__).parents[2]
NAMES = ("depth", "seg", "gen", "encoder", "llm")


@pytest.fixture(scope="module")
def made(module, tmp_path_factory):
    """(folder, scores) of all models at toy size."""
    folder = tmp_path_factory.mktemp("models")
    return folder, module("miniature.models").make_models(folder, "toy", 0)


@pytest.fixture(scope="module")
def photograph(module):
    (picture,) = module("miniature.world").pictures(0, [0])
    return Image.fromarray(picture.rgb)


def test_every_model_is_scored(made):
    folder, scores = made
    assert set(scores) == set(NAMES)
    for name in NAMES:
        record = json.loads((folder / name / "miniature.json").read_text())
        assert record["scores"] == scores[name]
        assert all(0 <= score < 10 for score in scores[name].values())


@pytest.mark.parametrize(
    ("name", "recipe", "tokens", "dim"),
    [("depth", "mean4", 64, 64), ("depth", "last", 64, 64), ("seg", "stage4", 64, 128), ("gen", "embedding", 1, 48)],
)
def test_teachers_load(made, photograph, name, recipe, tokens, dim):
    teacher = load_teacher(name, model=str(made[0] / name), recipe=recipe, device="cpu")
    features = teacher.encode([photograph])
    assert features.shape == (1, tokens, dim)
    assert torch.isfinite(features).all()
    assert features.std() > 0.01


def test_seg_is_not_resized_twice(made):
    """So that both recipes are the same features, each token of one part of the picture."""
    card = load_teacher("seg", model=str(made[0] / "seg"), device="cpu").card
    assert (card.size, card.grid, card.recipe["interpolation"]) == ((768, 768), (8, 8), "none")


def test_decoders_load(made, photograph):
    depth, seg = (load_decoder(name, model=str(made[0] / name), device="cpu") for name in ("depth", "seg"))
    assert depth.decode(torch.randn(1, 64, 64))[0].shape == (336, 336)
    assert seg.decode(torch.randn(1, 64, 128), [photograph])[0].shape == (96, 96)
    assert seg.classes[0] == "red sphere"
    assert seg.classes[-2:] == ["ground", "sky"]


def test_the_encoder_loads(made, photograph):
    folder = made[0] / "encoder"
    pixels = load_image_transform(folder)(photograph)
    assert VisionEncoder.from_pretrained(folder)(torch.from_numpy(pixels)[None]).shape == (1, 64, 96)


def test_the_student_masks_dialogues_as_they_were_learnt(module, made):
    """What the language model is trained on is what the student makes of the same turns, label by label."""
    train_lm, asked = module("miniature.train_lm"), module("miniature.dialogues").ASKED
    tokenizer = load_tokenizer(made[0] / "llm")
    check_chat_template(tokenizer)
    dialogues, kinds = module("miniature.dialogues").tell(0, 0, 16, (1, 2, 5)), set()
    for one, (ids, parts) in zip(dialogues, train_lm.encoded(tokenizer, dialogues), strict=True):
        (first, said, _), *rest = one.turns
        turns = [(f"{one.scene}\n{first}", said), *(turn[:2] for turn in rest)]
        spoken = [
            {"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        found = encode(tokenizer, spoken, "chat")
        assert found["input_ids"] == ids.tolist()
        assert found["labels"] == np.where(parts == asked, -100, ids).tolist()
        kinds |= set(parts.tolist())
    assert kinds == set(range(7)), "a question, and answers of six kinds"
    text = "Is a Grünfink there? (Z) 17"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_features_are_standardized_and_maps_stay(module):
    """The teachers' features have mean 0 and size 1; what their decoders make of a picture is what it was."""
    architectures, scales = module("miniature.architectures"), module("miniature.scales")
    torch.manual_seed(0)
    depth, seg = architectures.depth_anything().eval(), architectures.oneformer().eval()
    pictures, large = torch.randn(4, 3, 336, 336), torch.randn(2, 3, 768, 768)
    with torch.no_grad():
        for norm in (depth.backbone.layernorm, seg.pixel_level_module.encoder.hidden_states_norms["stage4"]):
            norm.weight.uniform_(0.1, 0.3)
            norm.bias.uniform_(-2, 2)
        for parameter in (*depth.neck.parameters(), *depth.head.parameters()):
            parameter *= 5  # or its maps are all but 0
        maps, stages = depth(pictures).predicted_depth, seg.pixel_level_module.encoder(large).feature_maps
        decoded = seg.pixel_level_module.decoder(list(stages), output_hidden_states=False).mask_features
        scales.standardize_depth(depth, pictures)
        scales.standardize_seg(seg, large)
        assert torch.allclose(depth(pictures).predicted_depth, maps, atol=1e-4 * maps.std())
        after = seg.pixel_level_module.encoder(large).feature_maps
        again = seg.pixel_level_module.decoder(list(after), output_hidden_states=False).mask_features
        assert torch.allclose(again, decoded, atol=1e-4)
        layers = torch.stack([layer[:, 1:] for layer in depth.backbone(pictures).feature_maps])
    both = torch.stack([layers.mean(0), layers[-1]])
    for features in (both, after[-1].movedim(1, -1)):
        assert features.flatten(0, -2).mean(0).abs().max() < 1e-4
        assert features.square().mean().sqrt() == pytest.approx(1, abs=1e-3)
    assert maps.std() > 0
    assert decoded.std() > 1e-2


def test_the_teachers_of_the_package_see_depth_and_masks(module):
    """Of a world that they never saw, through the product's own loaders and decoders."""
    held_out, score = module("miniature.lessons").lessons(5, 0, 48, 1), module("miniature.train_teachers")
    images = [Image.fromarray(rgb.transpose(1, 2, 0)) for rgb in held_out.rgb]

    def decoded(name: str, taught: str, **options) -> np.ndarray:
        model = str(miniature.folder(name))
        features = load_teacher(name, model=model, device="cpu", recipe=taught).encode(images)
        return np.stack(load_decoder(name, model=model, device="cpu", **options).decode(features, images))

    maps = decoded("depth", "mean4")
    places = ((np.arange(96) + 0.5) * maps.shape[-1] / 96).astype(int)  # maps are of the network's size
    maps = maps[:, places[:, None], places]
    assert score._depth_scores(maps, held_out, "")["depth questions"] > 0.9
    seen = score._class_scores_of(decoded("seg", "stage4-768", recipe="stage4-768", context="full"), held_out.classes)
    assert seen["pixels right"] > 0.85
    assert seen["mean IoU"] > 0.2
    with pytest.raises(TeacherError, match=r"'gan'.*depth, seg, gen"):
        miniature.folder("gan")
    files = [file for name in miniature.NAMES for file in miniature.folder(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6


def test_told_scenes_say_what_is_asked(module):
    """Distances told in steps order objects as the answers do."""
    text, world = module("miniature.text"), module("miniature.world")
    for facts, questions in world.described_scenes(1, range(48)):
        lines = text.told(facts, range(len(facts.names))).splitlines()
        told = [re.fullmatch(r"column \d+, row \d+, distance (\d+): a (.+)", line).groups() for line in lines]
        steps, depth = {name: int(distance) for distance, name in told}, questions[2]
        assert steps[depth.options[depth.letter]] < steps[depth.options[1 - depth.letter]]
        assert text.caption(facts).count("a ") == len(lines)


def test_what_answers_begin_with_is_one_token_that_starts_like_the_other(module):
    tokenizer, first = module("miniature.tokenizer").world_tokenizer(), module("miniature.tokenizer").FIRST
    weights = module("miniature.architectures").language_model(tokenizer).model.embed_tokens.weight
    ids = [tokenizer([word, f" {word}"], add_special_tokens=False)["input_ids"] for word in first]
    assert {len(tokens) for pair in ids for tokens in pair} == {1}
    ahead, behind = (torch.tensor([pair[i][0] for pair in ids]) for i in (0, 1))
    assert not set(ahead.tolist()) & set(behind.tolist())
    assert torch.equal(weights[ahead], weights[behind])
    assert torch.cdist(weights[ahead], weights[ahead]).fill_diagonal_(torch.inf).min() > 1


def test_pixels_are_pillows(module, photograph):
    pixels = module("miniature.pixels").pixels
    rgb = np.asarray(photograph).transpose(2, 0, 1)[None]
    for side in (336, 768):
        ours = pixels(rgb, side, (0, 0, 0), (1, 1, 1), "cpu")[0] * 255
        pillow = np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(ours.numpy() - pillow).max() <= 1.01


def test_a_finished_model_is_not_trained_again(module, made, capsys):
    folder, scores = made
    stamps = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in NAMES}
    (folder / "gen" / "miniature.json").unlink()  # as if it had been stopped
    again = module("miniature.models").make_models(folder, "toy", 0, only=["depth", "gen"])
    assert again == {name: scores[name] for name in ("depth", "gen")}, "and the same seed trains the same"
    assert "gen: step" in capsys.readouterr().out
    for name in NAMES:
        same = (folder / name / "model.safetensors").stat().st_mtime_ns == stamps[name]
        assert same == (name != "gen")
    with pytest.raises(ValueError, match="name another folder"):
        module("miniature.models").make_models(folder, "toy", 1, only=["depth"])
    with pytest.raises(ValueError, match="choose of depth"):
        module("miniature.models").make_models(folder, "toy", 0, only=["depht"])


def test_the_base_encoder_tells_places_and_is_scaled_exactly(module):
    """Places differ by row and column; scaling changes the size of features, and nothing that the blocks make of it."""
    architectures, scales = module("miniature.architectures"), module("miniature.scales")
    waves = architectures.waves(96).view(8, 8, 96)
    assert torch.equal(waves[2, 3, :48], waves[2, 7, :48])  # rows
    assert torch.equal(waves[2, 3, 48:], waves[5, 3, 48:])  # columns
    assert torch.cdist(waves.flatten(0, 1), waves.flatten(0, 1)).fill_diagonal_(9).min() > 0.5
    torch.manual_seed(0)
    model, pictures = architectures.base_encoder().eval(), torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2  # as training does
        before = model(pictures, output_hidden_states=True).hidden_states
        scales.at_unit_scale(model, pictures)
        after = model(pictures, output_hidden_states=True).hidden_states
    assert after[-2][:, 1:].square().mean() == pytest.approx(1, abs=1e-3)
    assert before[-2].square().mean() > 2
    alike = torch.cosine_similarity(before[-1].flatten(1), after[-1].flatten(1))
    assert alike.min() > 0.9999  # but for the normalisations' epsilon
    ratios = [float(states.norm() / scaled.norm()) for states, scaled in zip(before[-2:], after[-2:], strict=True)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01)
