"""Fusion baselines: trained from the cache and with teachers in the loop, saved, resumed, and asked about an image."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from olavlm.cache import FeatureStore
from olavlm.pipelines import train as train_command
from olavlm.student import ModelError, OlaVLM, RecipeError, SampleError, TargetsError, load_checkpoint
from olavlm.student.data.targets import OnlineTargets
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.text.conversation import encode_prompt
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import train
from olavlm.teachers.tiny import make_tiny

FUSIONS = ("feature_concat", "token_concat")
ORDER = ("gen", "depth", "seg")
BASELINE = {"model.num_task_tokens": 0, "losses.stages": "[]", "train.max_steps": 2, "train.warmup": 0}


@pytest.fixture
def run(recipe, store32, tmp_path):
    def start(fusion, stage="pt", name="run", **overrides):
        settings = {"model.fusion": fusion, **BASELINE, "targets.store": store32, "train.output_dir": tmp_path / name}
        settings |= overrides
        folder = train(recipe(stage, **settings), stage, {})
        return folder, read_metrics(folder / "metrics.jsonl")

    return start


@pytest.fixture(scope="module")
def mixed(pt_json, ift_json, tmp_path_factory):
    """Three samples over images of the store, and two of text alone."""
    texts = [sample for sample in json.loads(ift_json.read_text()) if "image" not in sample]
    file = tmp_path_factory.mktemp("mixed") / "mixed.json"
    file.write_text(json.dumps(json.loads(pt_json.read_text())[:3] + texts))
    return file


def text_losses(metrics):
    return [line["loss/text"] for line in metrics]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_trains_in_pt_and_ift_and_what_they_leave_behind(run, fusion, mixed, monkeypatch):
    seen = []
    check = OptimizerStep._check

    def spy(self, *arguments):
        model = self.parallel.model
        seen.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        return check(self, *arguments)

    monkeypatch.setattr(OptimizerStep, "_check", spy)
    pt, metrics = run(fusion, name="pt")
    assert {key for key in metrics[0] if key.startswith("loss/")} == {"loss/text", "loss/total"}
    weights = load_file(pt / "adapter.safetensors")
    assert weights.keys() == seen[0].keys()
    assert {name.partition(".")[0] for name in weights} == {"projector"}
    assert len(weights) == (4 if fusion == "feature_concat" else 16)
    assert all(gradient.abs().max() > 0 for gradient in seen[0].values())

    ift, _ = run(fusion, "ift", name="ift", **{"init.from": pt, "data.file": mixed})
    assert {name.partition(".")[0] for name in seen[-1]} == {"projector", "llm"}
    model = OlaVLM.from_pretrained(ift)
    assert [teacher.name for teacher in model.config.teachers] == list(ORDER)
    assert (model.config.fusion, len(model.tasks), len(model.predictors)) == (fusion, 0, 0)
    saved = load_file(ift / "model.safetensors")
    assert not torch.equal(saved["llm.model.norm.weight"], torch.ones_like(saved["llm.model.norm.weight"]))
    assert {name.partition(".")[0] for name in saved} == {"vision", "projector", "llm"}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_features_matter_and_online_is_as_cached(run, fusion, mixed, store32, monkeypatch):
    """Online teachers see the same images: equal losses. The control: with other features they are not equal."""
    common = {"data.file": mixed, "train.max_steps": 1}
    _, cached = run(fusion, **common)
    _, live = run(fusion, name="online", **common, **{"targets.source": "online"})
    assert text_losses(live) == pytest.approx(text_losses(cached), abs=1e-5)
    finish = OnlineTargets.finish

    def other(self, loaded, device):
        features, valid = finish(self, loaded, device)
        return {name: values + 1 for name, values in features.items()}, valid

    monkeypatch.setattr(OnlineTargets, "finish", other)
    _, control = run(fusion, name="control", **common, **{"targets.source": "online"})
    assert abs(control[0]["loss/text"] - cached[0]["loss/text"]) > 1e-4


@pytest.mark.parametrize("fusion", FUSIONS)
def test_any_split_of_a_mixed_batch_is_the_same_and_a_stop_changes_nothing(run, fusion, mixed):
    """With one sample a micro-batch, some are of text alone: every part of the projector is in their graph too."""
    whole, expected = run(fusion, name="whole", **{"data.file": mixed, "train.batch_size": 4, "train.max_steps": 4})
    split = {"data.file": mixed, "train.batch_size": 1, "train.accumulation": 4}
    folder, metrics = run(fusion, name="split", **split, **{"train.max_steps": 2})
    assert len(metrics) == 2
    folder, metrics = run(fusion, name="split", **split, **{"train.max_steps": 4})
    assert text_losses(metrics) == pytest.approx(text_losses(expected), abs=1e-5)
    ours, theirs = (load_file(f / "adapter.safetensors") for f in (folder, whole))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-4, msg=name)


def test_text_alone_keeps_every_projector_in_the_graph(run, mixed):
    for fusion in FUSIONS:
        model, tokenizer = load_checkpoint(run(fusion, name=fusion, **{"train.max_steps": 1})[0])
        ids = torch.tensor([encode_prompt(tokenizer, [{"from": "human", "value": "Hello?"}], "llama_3")])
        model(input_ids=ids, labels=ids).text_loss_sum.backward()
        assert all((p.grad == 0).all() for p in model.projector.parameters())


def test_a_sample_whose_image_lacks_features_trains_nothing(run, make_store, pt_json, sample_images, tmp_path):
    """One image is broken for the extraction and whole for the training: it counts as one that cannot be read."""
    samples = json.loads(pt_json.read_text())[:4]
    (tmp_path / "four.json").write_text(json.dumps(samples))
    (tmp_path / "three.json").write_text(json.dumps(samples[1:]))
    images = tmp_path / "images"
    shutil.copytree(sample_images, images)
    victim = images / samples[0]["image"]
    good = victim.read_bytes()
    victim.write_bytes(b"")
    store = make_store("float32", images=images)
    assert FeatureStore(store)["depth"].failure(samples[0]["image"]).reason == "empty"
    victim.write_bytes(good)
    common = {"data.images": images, "targets.store": store, "train.max_steps": 1}
    for fusion in FUSIONS:
        _, (four,) = run(fusion, name=f"{fusion}4", **common, **{"data.file": tmp_path / "four.json"})
        three = {"data.file": tmp_path / "three.json", "train.batch_size": 3}
        _, (without,) = run(fusion, name=f"{fusion}3", **common, **three)
        assert (four["bad_images"], without["bad_images"]) == (1, 0)
        assert four["supervised_tokens"] == without["supervised_tokens"]
        assert four["loss/text"] == pytest.approx(without["loss/text"], abs=1e-5)
    # The control: with features, it does train.
    _, (whole,) = run(FUSIONS[0], name="c", **{"train.max_steps": 1, "data.file": tmp_path / "four.json"})
    assert whole["supervised_tokens"] > four["supervised_tokens"]
    assert whole["bad_images"] == 0


def test_features_that_are_not_finite_online_count_as_none(run, pt_json, monkeypatch):
    """Such as those of a teacher in float16 that overflows: known after its forward, and ahead of the loss."""
    finish = OnlineTargets.finish

    def overflow(self, loaded, device):
        features, valid = finish(self, loaded, device)
        features["seg"][0, 0, 0] = torch.inf
        valid["seg"] = valid["seg"] & features["seg"].isfinite().all(dim=(1, 2))
        return features, valid

    _, (clean, _) = run("token_concat", name="clean", **{"targets.source": "online"})
    monkeypatch.setattr(OnlineTargets, "finish", overflow)
    _, metrics = run("token_concat", **{"targets.source": "online"})
    assert [line["bad_images"] for line in metrics] == [1, 1]
    assert 0 < metrics[0]["supervised_tokens"] < clean["supervised_tokens"]


@pytest.fixture(scope="module")
def teachers_moved(tiny, tmp_path_factory):
    """The same teachers in other folders."""
    folder = tmp_path_factory.mktemp("moved")
    return {name: shutil.copytree(tiny[name], folder / name) for name in ORDER}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_teachers_at_inference_give_what_the_cache_gives(run, fusion, mixed, store32, sample_images, tmp_path):
    """Of the adapter and of the whole model; answers of `answer`, logits of the forward."""
    pt, _ = run(fusion, name="pt")
    ift, _ = run(fusion, "ift", name="ift", **{"init.from": pt, "data.file": mixed})
    image = FeatureStore(store32).rows.image_of(1)
    picture = Image.open(sample_images / image).convert("RGB")
    stored = {name: torch.from_numpy(FeatureStore(store32)[name][image])[None] for name in ORDER}
    for folder in (pt, ift):
        model, tokenizer = load_checkpoint(folder)
        model.eval()
        pixels = torch.from_numpy(model.config.image_transform(picture))[None]
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}]
        ids = torch.tensor([encode_prompt(tokenizer, turns, "llama_3")])
        answer = model.answer(tokenizer, picture, "What is this?", max_new_tokens=8)
        live = {name: teacher.encode([picture]) for name, teacher in model._teachers.items()}
        with torch.no_grad():
            cached = model(ids, pixel_values=pixels, teacher_features=stored).logits
            online = model(ids, pixel_values=pixels, teacher_features=live).logits
            other = model(ids, pixel_values=pixels, teacher_features={n: x + 1 for n, x in live.items()}).logits
        torch.testing.assert_close(online, cached, atol=1e-4, rtol=0)
        assert (other - cached).abs().max() > 1e-3
        new = model.generate(ids, pixel_values=pixels, teacher_features=stored, max_new_tokens=8, do_sample=False,
                             eos_token_id=model.stop_ids(tokenizer), pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        assert answer == tokenizer.decode(new[0], skip_special_tokens=True).strip()
        assert model.answer(tokenizer, None, "Hello?", max_new_tokens=3) is not None
        assert set(load_file(next(folder.glob("*.safetensors")))) <= set(model.state_dict()), "no teacher is a part"

    model.save_pretrained(tmp_path / "again")
    again = OlaVLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, pixel_values=pixels, teacher_features=stored).logits, cached)
    with pytest.raises(SampleError, match="row 0 has an image, but no teacher_features of gen are given"):
        again(ids, pixel_values=pixels)
    with pytest.raises(SampleError, match=r"teacher_features of gen are \(2, 48\) an image, .* with \(1, 48\)"):
        again(ids, pixel_values=pixels, teacher_features={**stored, "gen": torch.zeros(1, 2, 48)})


def test_several_pictures_at_once_are_as_one_by_one(run, monkeypatch):
    """In whatever parts the teachers see them; rows of dialogues without a picture stay zero."""
    folder, _ = run("token_concat", **{"train.max_steps": 1})
    model, _ = load_checkpoint(folder)
    monkeypatch.setattr("olavlm.student.fused_teachers._AT_ONCE", 2)
    pictures = [Image.new("RGB", (60, 40), colour) for colour in ("green", "red", "blue")]
    together = model.encode_teachers(*pictures)
    assert set(together) == set(ORDER)
    for row, picture in enumerate(pictures):
        for name, alone in model.encode_teachers(picture).items():
            torch.testing.assert_close(together[name][row : row + 1], alone, atol=1e-5, rtol=0)
    _, seen = model._seen([pictures[2], None, pictures[0]])
    for name, values in seen.items():
        torch.testing.assert_close(values[[0, 2]], together[name][[2, 0]], atol=1e-5, rtol=0)
        assert not values[1].any()


def test_which_teachers_a_checkpoint_takes(run, tiny, teachers_moved, tmp_path):
    folder, _ = run("token_concat", **{"train.max_steps": 1})
    record = json.loads((folder / "adapter.json").read_text())["config"]["fused_teachers"]
    for teacher in record:
        card = teacher["card"]
        assert card["model"] == str(tiny[teacher["name"]])
        assert {"revision", "recipe", "geometry", "compute_dtype", "fingerprint"} <= card.keys()
    model, tokenizer = load_checkpoint(folder)
    model.load_teachers(teachers_moved)
    picture = Image.new("RGB", (60, 40), "green")
    assert {name: t.card.model for name, t in model._teachers.items()} == {n: str(f) for n, f in teachers_moved.items()}
    answer = model.answer(tokenizer, picture, "What?", max_new_tokens=4)
    fresh, _ = load_checkpoint(folder)
    assert fresh.answer(tokenizer, picture, "What?", max_new_tokens=4) == answer

    other = make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"teacher depth: .*other.* has the fingerprint .*--teacher depth=MODEL"):
        model.load_teachers({"depth": other["depth"]})
    with pytest.raises(ModelError, match="teacher 'dpth': this model reads gen, depth, seg"):
        model.load_teachers({"dpth": other["depth"]})
    with pytest.raises(ModelError, match=r"teacher seg, which this model reads: .*; name the place of the right one"):
        FusedTeacher("seg", {**record[2]["card"], "model": str(tmp_path / "gone")}).load(None, torch.device("cpu"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                {"model.num_task_tokens": 8},
                "model.num_task_tokens is 8: model.fusion is .* no task tokens; set it to 0",
            ),
            ({"losses.stages": "[pt]"}, r"losses.stages is \['pt'\]: .* distils nothing; set it to \[\]"),
            ({f"tasks.{name}": "null" for name in ORDER}, "tasks is empty: .* name one at least"),
            ({"model.fusion": "concat"}, "model.fusion"),
            ({"targets.store": "null"}, "targets.store is not set; name a store of olavlm-extract"),
        ],
    )
    def test_a_recipe(self, run, overrides, message):
        with pytest.raises(RecipeError, match=message):
            run("feature_concat", **overrides)

    def test_a_store_that_does_not_serve(self, run, make_store, mixed, tmp_path):
        with pytest.raises(TargetsError, match="lacks gen, seg"):
            run("feature_concat", **{"targets.store": make_store("float16", teachers=("depth",))})
        first, *rest = json.loads(mixed.read_text())
        (tmp_path / "more.json").write_text(json.dumps([{**first, "image": "new.jpg"}, *rest]))
        for stage in ("pt", "ift"):
            with pytest.raises(TargetsError, match=r"1 of its 3 images .first: 'new.jpg'. are not in the plan"):
                run("feature_concat", stage, **{"data.file": tmp_path / "more.json"})

    def test_a_start_of_another_kind(self, run, mixed, tiny, pt_json, tmp_path):
        pt, _ = run("feature_concat", name="pt", **{"train.max_steps": 1})
        ift = {"init.from": pt, "data.file": mixed}
        with pytest.raises(RecipeError, match=r"model\.fusion is token_concat, .* was trained with feature_concat"):
            run("token_concat", "ift", **ift)
        with pytest.raises(RecipeError, match=r"tasks, in model\.order is \['depth', 'gen', 'seg'\]"):
            run("feature_concat", "ift", **ift, **{"model.order": "[depth, gen, seg]"})
        other = make_tiny(tmp_path / "other", seed=1)
        online = {"targets.source": "online", "targets.store": "null", "tasks.depth.model": other["depth"]}
        with pytest.raises(RecipeError, match=r"the fingerprint of depth's features is .* was trained with"):
            run("feature_concat", "ift", **ift, **online)


def test_two_processes_of_which_one_has_text_alone(run, recipe, store32, mixed, tmp_path):
    """Micro-batches of one sample: some step gives one process an image and the other none."""
    one, expected = run("token_concat", name="one", **{"data.file": mixed, "train.batch_size": 2})
    settings = {"data.file": mixed, "targets.store": store32, "train.batch_size": 1}
    settings |= {"train.output_dir": tmp_path / "two"}
    two = recipe(**{"model.fusion": "token_concat", **BASELINE, **settings})
    (tmp_path / "two.json").write_text(json.dumps(two.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
               "olavlm.pipelines.train", "pt", "--config", str(tmp_path / "two.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert text_losses(read_metrics(tmp_path / "two" / "metrics.jsonl")) == pytest.approx(
        text_losses(expected), abs=1e-5
    )
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in (tmp_path / "two", one))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-4, msg=name)


def test_text_alone_needs_no_features(run, mixed, tmp_path):
    texts = [sample for sample in json.loads(mixed.read_text()) if "image" not in sample]
    (tmp_path / "text.json").write_text(json.dumps(texts))
    _, metrics = run("token_concat", **{"data.file": tmp_path / "text.json"})
    assert all(line["loss/text"] > 0 for line in metrics)


def test_a_dry_run_checks_and_counts(recipe, store32, capsys, tmp_path):
    made = recipe(**{"model.fusion": "token_concat", **BASELINE, "targets.store": store32})
    (tmp_path / "r.json").write_text(json.dumps(made.to_dict()))
    command = ["pt", "--config", str(tmp_path / "r.json"), "--dry-run"]
    assert train_command.main(command) == 0
    out = capsys.readouterr().out
    for name in ORDER:
        assert f"{name}: fused, features from {made.targets.store}" in out
    assert "memory of a device, estimated" in out
    assert train_command.main([*command, "--targets.source=online", "--targets.store=null"]) == 0
    assert "no estimate: the shapes of the teachers' features are not known without a store" in capsys.readouterr().out
    assert train_command.main([*command, "--targets.store=none"]) == 1
    assert "not a feature store" in capsys.readouterr().err
