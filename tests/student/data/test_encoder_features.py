"""The base encoder's features from a store in place of images: the same training, less what it costs."""

import gc
import json
import re
import shlex
import shutil
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from olavlm.cache import BadImage, Dataset, DatasetError, FeatureStore, ImageRoots, StoreBuilder, pending
from olavlm.pipelines import extract
from olavlm.pipelines.dry_run import dry_run
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.student import OlaVLM, TargetsError
from olavlm.student.data.encoder_features import (
    EncoderFeatures,
    check_encoder_features,
    extract_command,
    on_device,
    store_key,
    tower_digest,
)
from olavlm.student.errors import ModelError, RecipeError, SampleError, TrainingError
from olavlm.student.training.memory import BatchShape, estimate_memory
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train
from olavlm.student.vision.encoders import VisionEncoder
from olavlm.teachers import store_key as key_of_extract

ROW_BYTES = 2 * 16 * 64  # float16, 16 tokens of width 64: the tiny encoder's


@pytest.fixture(scope="module")
def encoder_store(tiny, pt_json, sample_images, tmp_path_factory):
    """encoder_store(geometry, dtype, ...) -> folder of a finished store of the tiny encoder, extracted without Ray."""

    @cache
    def make(
        geometry: str = "square",
        dtype: str = "float32",
        data: Path = pt_json,
        images: Path = sample_images,
        encoder: Path = tiny["encoder"],
        layer: str | None = None,
    ) -> str:
        folder = str(tmp_path_factory.mktemp("encoder") / "features")
        spec = TeacherSpec("base", "base", str(encoder), recipe=layer, geometry=geometry)
        builder = StoreBuilder(folder)
        builder.extend_plan(Dataset([data]).images())
        builder.ensure_teacher("base", spec.load("cpu").card.to_dict(), dtype=dtype, shard_rows=4)
        worker = ShardExtractor(folder, [spec], [str(images)], batch_size=4, device="cpu", threads=1)
        worker.load()
        worker.extract(pending(FeatureStore(folder)["base"]))
        return folder

    return make


def losses(recipe, stage="pt") -> tuple[Path, list[dict[str, float]]]:
    folder = train(recipe, stage, {})
    kept = ("loss/", "supervised_tokens", "bad_images")
    return folder, [
        {name: value for name, value in step.items() if name.startswith(kept)}
        for step in read_metrics(folder / "metrics.jsonl")
    ]


def assert_near(ours: list[dict[str, float]], theirs: list[dict[str, float]], within: float) -> None:
    assert len(ours) == len(theirs) > 0
    for ours_now, theirs_now in zip(ours, theirs, strict=True):
        assert ours_now == pytest.approx(theirs_now, rel=within)


@pytest.fixture
def blind(monkeypatch):
    """No image can be opened any more, and no encoder run."""

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened, or an encoder run")

    monkeypatch.setattr(ImageRoots, "read", refuse)
    monkeypatch.setattr(VisionEncoder, "forward", refuse)


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("float16", 1e-3), ("int8", 1e-2)])
def test_pt_has_the_same_losses_and_sees_no_image(recipe, encoder_store, tmp_path, request, dtype, within):
    few = {"train.max_steps": 2}
    _, theirs = losses(recipe(**few, **{"train.output_dir": tmp_path / "images"}))
    store = encoder_store(dtype=dtype)
    request.getfixturevalue("blind")
    folder, ours = losses(recipe(**few, **{"data.encoder_features": store, "train.output_dir": tmp_path / "features"}))
    assert_near(ours, theirs, within)
    assert (ours != theirs) == (dtype != "float32"), "they come from the store, where they are rounded"
    trained, expected = (load_file(f / "adapter.safetensors") for f in (folder, tmp_path / "images"))
    assert trained.keys() == expected.keys()
    if dtype == "float32":
        torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lost", ["some", "all"])
def test_images_that_teachers_in_the_loop_cannot_read_count_as_bad(
    recipe, encoder_store, store32, pt_json, sample_images, tmp_path, lost
):
    """Nobody else reads them. All of them gone is no run whose losses are zero to its end."""
    images = shutil.copytree(sample_images, tmp_path / "images")
    settings = {"data.encoder_features": encoder_store(), "data.images": images, "targets.source": "online"}
    made = recipe(**settings, **{"targets.store": store32, "train.max_steps": 3})

    def lose(step, *_):
        if step == 1 and lost == "all":
            images.rename(tmp_path / "elsewhere")
        elif step == 1:
            for sample in json.loads(pt_json.read_text())[::2]:
                (images / sample["image"]).write_bytes(b"")

    if lost == "all":
        with pytest.raises(TrainingError, match="the images are gone: none of 10 images tried can be read"):
            train(made, "pt", {}, lose)
        assert len(read_metrics(tmp_path / "pt" / "metrics.jsonl")) == 1
    else:
        steps = read_metrics(train(made, "pt", {}, lose) / "metrics.jsonl")
        assert len(steps) == 3
        assert steps[0]["bad_images"] == 0 < sum(step["bad_images"] for step in steps)


def test_control_without_features_images_are_opened(recipe, blind):
    with pytest.raises(AssertionError, match="an image was opened"):
        losses(recipe(**{"train.max_steps": 1}))


def test_teachers_in_the_loop_need_the_images_all_the_same(recipe, encoder_store, tmp_path):
    """Without any they would call every target invalid, and nothing would be distilled."""
    settings = {"data.encoder_features": encoder_store(), "data.images": tmp_path, "targets.source": "online"}
    with pytest.raises(DatasetError, match="none of 10 images tried can be read"):
        train(recipe(**settings), "pt", {})


def test_vpt_and_ift_with_text_only_samples_end_in_the_same_whole_model(recipe, encoder_store, ift_json, tmp_path):
    start, _ = losses(recipe(**{"train.max_steps": 1, "train.output_dir": tmp_path / "start"}))
    stores = {dtype: encoder_store("pad", dtype, ift_json) for dtype in ("float32", "float16")}
    ends = {}
    for name in ("images", *stores):
        previous, told, more = start, [], {"data.encoder_features": stores.get(name, "null")}
        for stage in ("vpt", "ift"):
            made = recipe(stage, **more, **{
                "init.from": previous, "train.output_dir": tmp_path / name / stage, "data.file": ift_json,
                "data.group_by_modality": stage == "ift", "data.workers": int(stage == "ift"),
                "train.batch_size": 2, "train.max_steps": {"vpt": 1, "ift": 4}[stage],
            })  # fmt: skip
            previous, steps = losses(made, stage)
            told += steps
        ends[name] = previous, told
    assert_near(ends["float32"][1], ends["images"][1], 1e-5)
    assert_near(ends["float16"][1], ends["images"][1], 1e-3)
    theirs, ours = (load_file(ends[name][0] / "model.safetensors") for name in ("images", "float16"))
    assert ours.keys() == theirs.keys()
    frozen = [name for name in theirs if name.startswith("vision.")]
    assert frozen
    assert all(torch.equal(ours[name], theirs[name]) for name in frozen)
    assert OlaVLM.from_pretrained(ends["float16"][0]).vision.tower is not None


def test_a_quarantined_image_is_what_an_unreadable_one_is(recipe, encoder_store, pt_json, sample_images, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(sample_images, images)
    victim = json.loads(pt_json.read_text())[1]["image"]
    (images / victim).write_bytes(b"no image")
    settings = {"data.images": images, "train.batch_size": 10, "train.max_steps": 1}
    _, theirs = losses(recipe(**settings, **{"train.output_dir": tmp_path / "a"}))
    store = encoder_store(images=images)
    _, ours = losses(recipe(**settings, **{"data.encoder_features": store, "train.output_dir": tmp_path / "b"}))
    assert ours[0]["bad_images"] == 1
    assert_near(ours, theirs, 1e-5)
    (tmp_path / "none").mkdir()
    alone = {"data.images": tmp_path / "none", "train.batch_size": 1, "train.max_steps": 10}
    _, ours = losses(recipe(**alone, **{"data.encoder_features": store, "train.output_dir": tmp_path / "c"}))
    assert sum(step["bad_images"] for step in ours) == 1, "alone in its batch it is no sign of images that are gone"

    rows = EncoderFeatures(recipe(**{"data.encoder_features": store}))
    good = FeatureStore(store).rows.image_of(5)
    stored, bad = rows.load([good, None, victim])
    assert list(bad) == [2]
    assert victim in bad[2]
    np.testing.assert_array_equal(stored["features"][0].numpy(), rows.group[5])
    assert not stored["features"][1:].any()
    assert rows.load([None, None]) == (None, {})
    with pytest.raises(KeyError, match=r"'new.jpg' is not in the store's plan"):
        rows.load([good, "new.jpg"])
    with pytest.raises(BadImage):
        rows.group[victim]


@pytest.mark.parametrize(("dtype", "crosses"), [("int8", torch.int8), ("int4", torch.float32)])
def test_what_crosses_to_the_device(recipe, encoder_store, dtype, crosses):
    rows = EncoderFeatures(recipe(**{"data.encoder_features": encoder_store(dtype=dtype)}))
    stored, _ = rows.load([rows.group.plan.image_of(3), rows.group.plan.image_of(0)])
    assert stored["features"].dtype == crosses
    features = on_device(stored, torch.device("cpu"))
    np.testing.assert_allclose(features.numpy(), rows.group.read([3, 0])[0], rtol=1e-6)


class TestForward:
    def test_features_in_place_of_pixels(self, build, make_batch, samples):
        model, batch = build(), make_batch(samples)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            features = model.vision(batch["pixel_values"])
        features[2] = torch.nan  # of the one without an image: not read
        with_pixels = model(**inputs, pixel_values=batch["pixel_values"])
        model.vision.set_tower_aside(keep=True)
        assert not any(name.startswith("vision.") for name in model.state_dict())
        given = model(**inputs, image_features=features)
        assert torch.equal(given.text_loss_sum, with_pixels.text_loss_sum)
        for name, prediction in with_pixels.predictions.items():
            assert torch.equal(given.predictions[name], prediction), name
        other = model(**inputs, image_features=features.flip(0).nan_to_num())
        assert not torch.equal(other.text_loss_sum, with_pixels.text_loss_sum)  # the control

        with pytest.raises(ModelError, match="set aside"):
            model(**inputs, pixel_values=batch["pixel_values"])
        with pytest.raises(SampleError, match="no pixel_values"):
            model(**inputs)
        model.vision.restore_tower()
        assert torch.equal(model(**inputs, pixel_values=batch["pixel_values"]).text_loss_sum, with_pixels.text_loss_sum)

    def test_a_tower_that_is_not_kept_is_gone(self, tiny):
        encoder = VisionEncoder.from_pretrained(tiny["encoder"])
        shape = encoder.grid, encoder.num_tokens, encoder.width
        weights = [weakref.ref(parameter) for parameter in encoder.parameters()]
        encoder.set_tower_aside(keep=False)
        gc.collect()  # its modules refer to each other
        assert {weight() for weight in weights} == {None}
        encoder.restore_tower()
        assert encoder.tower is None
        assert (encoder.grid, encoder.num_tokens, encoder.width) == shape == ((4, 4), 16, 64)


class TestRefused:
    def check(self, recipe, stage, dataset, *parts):
        with pytest.raises(TargetsError) as error:
            check_encoder_features(recipe, Dataset([dataset]), stage)
        assert all(part in str(error.value) for part in parts), str(error.value)
        return str(error.value)

    @pytest.mark.parametrize(("stage", "geometry"), [("pt", "square"), ("ift", "pad"), ("pt", "reference")])
    def test_features_of_this_stage_are_given(self, recipe, encoder_store, pt_json, stage, geometry):
        made = recipe(stage, **{"data.encoder_features": encoder_store(geometry)})
        group = check_encoder_features(made, Dataset([pt_json]), stage)
        assert group.key == "base"
        assert group.missing_rows().tolist() == []

    def test_another_geometry_or_layer(self, recipe, encoder_store, pt_json):
        store = encoder_store()
        made = recipe("ift", **{"data.encoder_features": store})
        self.check(
            made, "ift", pt_json, "geometry is 'square', the base encoder's in ift is 'pad'", " --geometry pad ",
            "--store ANOTHER_STORE",
        )  # fmt: skip
        made = recipe(**{"data.encoder_features": store, "model.select_layer": -1, "data.encoder_features_key": "base"})
        self.check(made, "pt", pt_json, "layer is 'layer-2'", "pt is 'layer-1'", "--recipe layer-1 --as base")
        made = recipe(**{"data.encoder_features": store, "model.select_layer": -1})
        self.check(made, "pt", pt_json, "lacks base-layer-1 (it has base)", "--recipe layer-1")

    def test_another_size(self, recipe, encoder_store, pt_json, tiny, tmp_path):
        folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5] * 3}))
        made = recipe(**{"data.encoder_features": encoder_store(), "model.encoder": folder})
        self.check(made, "pt", pt_json, "mean is (0.48", "(0.5, 0.5, 0.5)")

    def test_another_teacher_no_store_and_images_that_it_lacks(
        self, recipe, encoder_store, store32, pt_json, ift_json, tmp_path
    ):
        made = recipe(**{"data.encoder_features": store32, "data.encoder_features_key": "depth"})
        self.check(made, "pt", pt_json, "teacher is 'depth'")
        made = recipe(**{"data.encoder_features": tmp_path / "none"})
        self.check(made, "pt", pt_json, "not a feature store", "olavlm-extract --teacher base=")
        made = recipe(**{"data.encoder_features": encoder_store(data=ift_json)})
        self.check(made, "pt", pt_json, "are not in the plan", " --dtype float32 ")

    def test_other_weights(self, recipe, encoder_store, tiny, tmp_path):
        folder = shutil.copytree(tiny["encoder"], tmp_path / "encoder")
        tower = CLIPVisionModel.from_pretrained(folder)
        with torch.no_grad():
            next(tower.parameters()).add_(0.1)
        tower.save_pretrained(folder)
        made = recipe(**{"data.encoder_features": encoder_store(), "model.encoder": folder, "train.max_steps": 1})
        with pytest.raises(TargetsError, match=r"whose weights are not those of this run's encoder; name another"):
            train(made, "pt", {})

    def test_a_key_without_a_store(self, recipe):
        with pytest.raises(RecipeError, match=r"encoder_features is None: .*_key needs a store"):
            recipe(**{"data.encoder_features_key": "base"})


@pytest.mark.parametrize(
    ("settings", "stage", "key"),
    [
        ({}, "pt", "base"),
        ({"model.select_layer": -1}, "ift", "base-layer-1"),
        ({"model.select_layer": 3, "data.encoder_features_key": "mine"}, "pt", "mine"),
    ],
)
def test_the_command_makes_what_the_recipe_asks_for(recipe, tiny, settings, stage, key):
    made = recipe(stage, **settings, **{"data.encoder_features": "new"})
    assert store_key(made) == key
    if made.data.encoder_features_key is None:
        assert key == key_of_extract("base", f"layer{made.model.select_layer}")
    _, *words = shlex.split(extract_command(made, stage))
    args = extract.arguments().parse_args(words)
    (spec,) = extract.teacher_specs(args)
    assert (spec.key, spec.model, args.store) == (key, str(tiny["encoder"]), "new")
    card = spec.load("cpu").card
    assert (card.geometry, card.recipe["name"]) == (made.base_geometry(stage), f"layer{made.model.select_layer}")


def test_the_digest_is_of_weights_and_not_of_their_dtype(tiny):
    tower = VisionEncoder.from_pretrained(tiny["encoder"]).tower
    half = VisionEncoder.from_pretrained(tiny["encoder"], dtype=torch.bfloat16).tower
    assert tower_digest(half) == tower_digest(tower)
    assert re.fullmatch("[0-9a-f]{64}", tower_digest(tower))
    with torch.no_grad():
        list(tower.parameters())[-1][0] += 0.01
    assert tower_digest(half) != tower_digest(tower)


def test_a_dry_run_prints_the_bytes_and_the_estimate_drops_the_tower(recipe, encoder_store, tiny, capsys):
    made = recipe(**{"data.encoder_features": encoder_store(dtype="float16")})
    dry_run(made, "pt")
    out = capsys.readouterr().out
    assert f"encoder: not run; 16 x 64 float16 an image from {made.data.encoder_features}/base" in out
    assert f"{ROW_BYTES / 1e6:.3f} MB each, {10 * ROW_BYTES / 1e9:.3f} GB an epoch" in out

    shape = BatchShape(samples=4, text_tokens=50, supervised_tokens=12, global_batch=8)
    with_tower, without = (estimate_memory(r, "pt", [], shape, vocabulary=1025, distil=False) for r in (recipe(), made))
    tower = sum(p.numel() * 4 for p in VisionEncoder.from_pretrained(tiny["encoder"]).parameters())
    assert with_tower.weights - without.weights == tower > 0
    assert with_tower.activations > without.activations
    assert with_tower.gradients == without.gradients
