"""Finding and loading checkpoints: what is refused, and that hub and folder agree."""

import hashlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from olavlm.teachers import TeacherError, load_teacher
from olavlm.teachers.checkpoint import weights_digest

WEIGHTS = "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(name: str, model, **options) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(TeacherError) as caught:
        load_teacher(name, model=model, device="cpu", **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("name", "subfolder"), [("depth", ""), ("seg", ""), ("gen", "image_encoder")])
def test_hub_and_folder_are_the_same_teacher(name, subfolder, hub, tiny, teachers):
    hub("someone/teacher", tiny[name], subfolder)
    card = load_teacher(name, model="someone/teacher", device="cpu").card
    assert (card.model, card.revision) == ("someone/teacher", COMMIT)
    assert card.fingerprint() == teachers[name].card.fingerprint()
    assert teachers[name].card.revision is None


def test_a_copied_folder_is_the_same_teacher(tiny, teachers, tmp_path):
    shutil.copytree(tiny["depth"], tmp_path / "copy")
    card = load_teacher("depth", model=tmp_path / "copy", device="cpu").card
    assert card.model != teachers["depth"].card.model
    assert card.fingerprint() == teachers["depth"].card.fingerprint()


def test_changed_weights_are_another_teacher(tiny, teachers, tmp_path):
    shutil.copytree(tiny["depth"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / WEIGHTS)
    weights["backbone.layernorm.bias"] += 1e-3
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    card = load_teacher("depth", model=tmp_path, device="cpu").card
    assert card.fingerprint() != teachers["depth"].card.fingerprint()


def test_digest_of_one_file_is_its_sha256(tmp_path):
    (tmp_path / "any.name").write_bytes(b"abc")
    assert weights_digest((tmp_path / "any.name",)) == hashlib.sha256(b"abc").hexdigest()


def test_digest_of_shards_combines_the_sorted_digests(tmp_path):
    paths = [tmp_path / "b", tmp_path / "a"]
    for path, content in zip(paths, (b"one", b"two"), strict=True):
        path.write_bytes(content)
    digests = sorted(hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    expected = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert weights_digest(tuple(paths)) == weights_digest(tuple(reversed(paths))) == expected


def test_a_sharded_checkpoint_loads(tiny, teachers, pictures, hub, tmp_path):
    sharded = tmp_path / "sharded"
    CLIPVisionModelWithProjection.from_pretrained(tiny["gen"]).save_pretrained(sharded, max_shard_size="200KB")
    assert not (sharded / WEIGHTS).exists()
    hub("someone/sharded", sharded, "image_encoder")
    local = load_teacher("gen", model=sharded, device="cpu")
    assert local.encode(pictures).equal(teachers["gen"].encode(pictures))
    assert load_teacher("gen", model="someone/sharded", device="cpu").card.fingerprint() == local.card.fingerprint()

    shard = next(sharded.glob("*00001-of-*.safetensors"))
    shard.unlink()
    assert shard.name in refused("gen", sharded)


def test_other_variants_in_the_folder_do_not_count(tiny, teachers, tmp_path):
    shutil.copytree(tiny["gen"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.fp16.safetensors").write_bytes(b"another precision")
    card = load_teacher("gen", model=tmp_path, device="cpu").card
    assert card.fingerprint() == teachers["gen"].card.fingerprint()


def test_a_missing_folder(tmp_path):
    assert "no such folder" in refused("depth", tmp_path / "nowhere")


def test_a_hub_id_that_is_not_in_the_cache(hub):
    line = refused("depth", "someone/absent")
    assert line.startswith("someone/absent: ")
    assert "hub or its cache" in line


def test_a_hub_id_whose_weights_are_not_in_the_cache(hub, tiny):
    hub("someone/partial", tiny["depth"], leave_out=("*.safetensors",))
    assert "hub or its cache" in refused("depth", "someone/partial")


def test_a_revision_of_a_folder(tiny):
    assert "no revision 'main'" in refused("depth", tiny["depth"], revision="main")


def test_a_folder_without_config(tmp_path):
    assert str(tmp_path) in (line := refused("seg", tmp_path))
    assert "no config.json" in line


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(text, tiny, tmp_path):
    shutil.copytree(tiny["depth"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refused("depth", tmp_path)


@pytest.mark.parametrize(("name", "other"), [("depth", "seg"), ("seg", "gen"), ("gen", "llm")])
def test_another_architecture(name, other, tiny):
    line = refused(name, tiny[other])
    assert str(tiny[other]) in line
    assert json.loads((tiny[other] / "config.json").read_text())["model_type"] in line


def test_pickled_weights_are_not_read(tiny, tmp_path):
    shutil.copytree(tiny["depth"], tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    assert "only pickled weights" in refused("depth", tmp_path)


def test_no_weights(tiny, tmp_path):
    shutil.copytree(tiny["depth"], tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS).unlink()
    assert f"no {WEIGHTS}" in refused("depth", tmp_path)


def test_damaged_weights(tiny, tmp_path):
    shutil.copytree(tiny["depth"], tmp_path, dirs_exist_ok=True)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "cannot load it" in refused("depth", tmp_path)


def test_a_config_with_a_wrong_value(tiny, tmp_path):
    shutil.copytree(tiny["gen"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert "cannot load it" in refused("gen", tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("depth", "backbone.layernorm.weight"),
        ("seg", "model.pixel_level_module.encoder.hidden_states_norms.stage4.weight"),
        ("gen", "visual_projection.weight"),
    ],
)
def test_a_tensor_we_run_is_missing(name, tensor, tiny, tmp_path):
    """from_pretrained itself would draw it at random and go on."""
    folder = without_tensor(tiny[name], tmp_path, tensor)
    assert tensor.removeprefix("model.") in refused(name, folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("depth", "head.conv1.weight"),
        ("depth", "backbone.embeddings.mask_token"),
        ("seg", "model.pixel_level_module.decoder.mask_projection.weight"),
    ],
)
def test_a_tensor_we_do_not_run_may_be_missing(name, tensor, tiny, teachers, pictures, tmp_path):
    teacher = load_teacher(name, model=without_tensor(tiny[name], tmp_path, tensor), device="cpu")
    assert teacher.encode(pictures[:1]).equal(teachers[name].encode(pictures[:1]))


def test_a_tensor_of_another_shape(tiny, tmp_path):
    shutil.copytree(tiny["gen"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / WEIGHTS)
    weights["visual_projection.weight"] = weights["visual_projection.weight"][:-1].clone()
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    assert "another shape (such as visual_projection.weight)" in refused("gen", tmp_path)


def without_tensor(source, target, tensor: str):
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(target / WEIGHTS)
    del weights[tensor]
    save_file(weights, target / WEIGHTS, {"format": "pt"})
    return target
