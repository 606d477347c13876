"""`score` over a store of targets: what is printed is what the parts give, and what does not fit is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.cache import FeatureStore, ImageRoots
from olavlm.pipelines import probe
from olavlm.pipelines.downstream import command, fid
from olavlm.pipelines.downstream.da2k import is_right, read_pairs
from olavlm.teachers.decoders import load_decoder
from olavlm.teachers.tiny import SEG_CLASSES


def main(words):
    return probe.main(["score", *words])


@pytest.fixture(scope="module")
def store(store32):
    return str(store32)


@pytest.fixture(scope="module")
def names(store32):
    return [FeatureStore(store32).rows.image_of(row) for row in range(3)]


@pytest.fixture
def annotations(names, tmp_path):
    random = np.random.default_rng(0)
    points = [
        [{"point1": p, "point2": q, "closer_point": "point1"} for p, q in random.integers(0, 90, (20, 2, 2)).tolist()]
        for _ in names
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(dict(zip(names, points, strict=True))))
    return file


def test_da2k_of_the_targets(store, names, annotations, tiny, sample_images, tmp_path, capsys):
    out = tmp_path / "scores" / "da2k.json"
    words = ["--task", "da2k", "--source", store, "--annotations", str(annotations), "--images", str(sample_images),
             "--output", str(out), "--device", "cpu", "--batch-size", "2"]  # fmt: skip
    assert main(words) == 0
    result = json.loads(out.read_text())
    decoder, roots, right = load_decoder("depth", model=tiny["depth"], device="cpu"), ImageRoots([sample_images]), []
    for image, pairs in read_pairs(annotations).items():
        depth = decoder.decode(torch.from_numpy(FeatureStore(store)["depth"][image])[None])[0].astype(np.float64)
        size = roots.open(image).size[::-1]
        right += [is_right(depth, pair, size) for pair in pairs]
    assert 0 < np.mean(right) < 1
    assert result["mean"] == result["layers"]["targets"]["accuracy"] == np.mean(right)
    assert result["layers"]["targets"]["pairs"] == 60
    assert f"targets      accuracy {np.mean(right):.4f}" in capsys.readouterr().out


def test_the_mean_is_over_layers_and_what_is_left_out_is_named(
    store, names, annotations, sample_images, tmp_path, capsys, monkeypatch
):
    """A source of two layers, one the targets and one a constant, that lacks one image."""

    class Probe(command.StoreSource):
        layers = ("layer 1", "layer 2")

        def read(self, images):
            features = torch.from_numpy(self.group.read([self.store.rows.row_of(i) for i in images])[0])
            valid = np.array([image != names[0] for image in images])
            return {"layer 1": features, "layer 2": torch.zeros_like(features)}, valid

    monkeypatch.setattr(command, "open_source", lambda args, teacher: Probe(args.source, teacher))
    words = ["--task", "da2k", "--source", store, "--annotations", str(annotations), "--images", str(sample_images),
             "--output", str(tmp_path / "s.json"), "--device", "cpu"]  # fmt: skip
    assert main(words) == 1
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["left_out"] == [f"{names[0]}: no features"]
    first, second = (result["layers"][f"layer {i}"]["accuracy"] for i in (1, 2))
    assert result["mean"] == (first + second) / 2
    assert f"left out: {names[0]}: no features" in capsys.readouterr().out


def test_miou_of_the_targets(store, names, sample_images, tiny, tmp_path):
    """Annotated with what the decoder says of the targets, of which a part is made void and a part wrong."""
    store_, roots = FeatureStore(store), ImageRoots([sample_images])
    decoder = load_decoder("seg", model=tiny["seg"], device="cpu", context="zero")
    order = [3, 0, 5, 1, 4, 2]  # of the file's categories: not the model's
    categories = [{"id": 10 + i, "name": SEG_CLASSES[i], "isthing": 1, "supercategory": "x"} for i in order]
    content = {"categories": categories, "images": [], "annotations": []}
    (tmp_path / "panoptic_val2017").mkdir()
    truth, said = [], []
    for number, image in enumerate(names[:2]):
        photograph = roots.open(image)
        classes = decoder.decode(torch.from_numpy(store_["seg"][image])[None], [photograph])[0]
        true = classes.copy()
        true[:20] = (true[:20] + 1) % 6
        truth.append(np.delete(true, slice(20, 40), axis=0).ravel())
        said.append(np.delete(classes, slice(20, 40), axis=0).ravel())
        ids = true + 1000
        ids[20:40] = 0
        rgb = np.stack([ids % 256, ids // 256, ids * 0], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(tmp_path / "panoptic_val2017" / f"{number}.png")
        segments = [{"id": int(i), "category_id": int(i) - 1000 + 10, "iscrowd": 0} for i in np.unique(ids) if i]
        content["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        size = {"height": photograph.height, "width": photograph.width}
        content["images"].append({"id": number, "file_name": image, **size})
    (tmp_path / "panoptic_val2017.json").write_text(json.dumps(content))
    truth, said = np.concatenate(truth), np.concatenate(said)
    ious = {
        i: ((truth == i) & (said == i)).sum() / ((truth == i) | (said == i)).sum() for i in map(int, np.unique(truth))
    }
    words = ["--task", "miou", "--source", store, "--annotations", str(tmp_path / "panoptic_val2017.json"),
             "--images", str(sample_images), "--context", "zero", "--device", "cpu",
             "--output", str(tmp_path / "s.json")]  # fmt: skip
    assert main(words) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["decoder"]["context"] == "zero"
    (layer,) = result["layers"].values()
    assert layer["images"] == 2
    assert layer["classes"] == {SEG_CLASSES[i]: pytest.approx(ious.get(i)) for i in range(6)}
    assert layer["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert 0 < layer["miou"] < 1
    other = tmp_path / "other"  # the first photograph is of another size than its annotation
    shutil.copytree(sample_images, other)
    Image.new("RGB", (31, 17)).save(other / names[0])
    assert main([str(other) if word == str(sample_images) else word for word in words]) == 1
    result = json.loads((tmp_path / "s.json").read_text())
    assert [line.partition(":")[0] for line in result["left_out"]] == [names[0]]
    assert result["layers"]["targets"]["images"] == 1


def test_fid_draws_once_and_compares(store, names, sample_images, tmp_path, monkeypatch, capsys):
    """With a decoder and a network in place of unCLIP and Inception, neither of which is here."""
    drawn = []

    class Draws:
        name, dim, needs_images = "gen", 48, False
        weights_sha256 = FeatureStore(store)["gen"].card["weights_sha256"]

        def decode(self, features, images=None):
            drawn.extend(features)
            grey = features.flatten(1).mean(dim=1).sigmoid()
            return [np.full((512, 512, 3), int(255 * g), np.uint8) for g in grey]

    def load(teacher, **options):
        assert teacher == "gen"
        return Draws()

    monkeypatch.setattr("olavlm.teachers.decoders.load_decoder", load)
    monkeypatch.setattr("olavlm.pipelines.downstream.fid.Inception", lambda weights, device: brightness)
    reference, pictures = tmp_path / "reference", tmp_path / "pictures"
    roots = ["--images", str(sample_images)]
    assert main(["--task", "fid-reference", *roots, "--output", str(reference), "--limit", "4"]) == 0
    made = sorted(reference.rglob("*.png"))
    assert len(made) == 4
    assert Image.open(made[0]).size == (256, 256)
    again = ["--output", str(tmp_path / "again"), "--limit", "4", "--inception", "weights.pth"]
    assert main(["--task", "fid-reference", *roots, *again]) == 0
    mu, sigma = fid.read_statistics(tmp_path / "again.npz")
    assert (mu.shape, sigma.shape) == ((1,), (1, 1))
    coco = tmp_path / "instances.json"
    coco.write_text(json.dumps({"images": [{"id": i, "file_name": name} for i, name in enumerate(names)]}))
    words = ["--task", "fid", "--source", store, *roots, "--annotations", str(coco), "--pictures", str(pictures),
             "--reference", str(reference), "--inception", "weights.pth",
             "--output", str(tmp_path / "s.json")]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*words[:1], "panoptic", *words[2:]])
    assert main(words) == 0
    assert len(drawn) == 3
    assert main(words) == 0
    assert len(drawn) == 3  # those that are there are not drawn again
    (layer,) = json.loads((tmp_path / "s.json").read_text())["layers"].values()
    a, b = (brightness(Image.open(f) for f in sorted(place.rglob("*.png"))) for place in (pictures, reference))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert layer == {"fid": pytest.approx(expected), "pictures": 3, "reference_pictures": 4}
    assert main([*words, "--limit", "2"]) == 0  # the third lies there, and is not asked for
    (layer,) = json.loads((tmp_path / "s.json").read_text())["layers"].values()
    a = brightness(Image.open(pictures / "targets" / f"{name}.png") for name in names[:2])
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert layer == {"fid": pytest.approx(expected), "pictures": 2, "reference_pictures": 4}
    assert len(drawn) == 3
    assert main(["--task", "fid-reference", *roots, *again, "--limit", "3"]) == 0
    assert fid.read_statistics(tmp_path / "again.npz")[0] == pytest.approx(brightness(map(Image.open, made[:3])).mean())
    note = pictures / "targets" / "drawn-of.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"card": "another"}))
    assert main(words) == 1
    assert "pictures of other features" in capsys.readouterr().err


def brightness(pictures):
    return np.array([[np.asarray(p.convert("L")).mean()] for p in pictures])


def test_a_dataset_for_extraction(names, annotations, tmp_path):
    out = tmp_path / "da2k.json"
    assert main(["--task", "da2k", "--annotations", str(annotations), "--dataset", str(out), "--prefix", "x/"]) == 0
    samples = json.loads(out.read_text())
    assert [s["image"] for s in samples] == [f"x/{name}" for name in names]
    assert samples[0]["conversations"][0]["value"] == "<image>\nDescribe the image."


def test_what_does_not_fit_is_one_line(store, annotations, sample_images, tmp_path, tiny, capsys):
    words = ["--task", "da2k", "--source", store, "--images", str(sample_images), "--device", "cpu"]
    complete = [*words, "--annotations", str(annotations)]
    for arguments, status, message in (
        (words, 2, "--task da2k needs --annotations"),
        ([*complete, "--key", "seg"], 1, "features of 'seg', and depth is scored"),
        ([*complete, "--key", "nothing"], 1, "has no 'nothing'"),
        ([*complete, "--source", str(tmp_path)], 1, "is not a feature store"),
        ([*complete, "--prefix", "other/"], 1, "other/"),
    ):
        assert main(arguments) == status, arguments
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.startswith("olavlm-probe: error: ")
        assert errors.count("\n") == 1


@pytest.mark.parametrize("flag", ["--limit", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_numbers_of_images_are_positive(flag, value, store, annotations, sample_images, capsys):
    words = ["--task", "da2k", "--source", store, "--images", str(sample_images), "--annotations", str(annotations)]
    with pytest.raises(SystemExit) as ended:
        main([*words, flag, value])
    assert ended.value.code == 2
    assert f"{value} is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["da2k", "fid"])
def test_nothing_scored_is_a_failure(task, store, names, annotations, sample_images, tmp_path, capsys, monkeypatch):
    class Empty(command.StoreSource):
        def read(self, images):
            features, valid = super().read(images)
            return features, valid & False

    monkeypatch.setattr(command, "open_source", lambda args, teacher: Empty(args.source, teacher))
    decoder = SimpleNamespace(weights_sha256=FeatureStore(store)[command.TEACHER_OF[task]].card["weights_sha256"])
    monkeypatch.setattr("olavlm.teachers.decoders.load_decoder", lambda *_, **__: decoder)
    coco = tmp_path / "instances.json"
    coco.write_text(json.dumps({"images": [{"file_name": name} for name in names]}))
    said = str(annotations if task == "da2k" else coco)
    words = ["--task", task, "--source", store, "--annotations", said, "--images", str(sample_images),
             "--pictures", str(tmp_path / "pictures"), "--output", str(tmp_path / "s.json")]  # fmt: skip
    assert main(words) == 1
    errors = capsys.readouterr().err
    assert f"nothing was scored: {names[0]}: no features (3 left out in all); check" in errors
    assert not (tmp_path / "s.json").exists()


def test_another_checkpoint_does_not_decode(store, annotations, sample_images, tmp_path, capsys):
    from olavlm.teachers.tiny import make_tiny

    other = make_tiny(tmp_path / "other", seed=1)["depth"]
    words = ["--task", "da2k", "--source", store, "--images", str(sample_images), "--annotations", str(annotations)]
    assert main([*words, "--device", "cpu", "--model", str(other)]) == 1
    assert "did not make" in capsys.readouterr().err
