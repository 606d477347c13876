"""Every switch of the recipe acts: the metric it is for changes, and what it must not touch stays."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from olavlm.cache import DatasetError
from olavlm.student import RecipeError, SampleError, TrainingError
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import train

DEPTH, GEN, SEG = "loss/depth/2/smooth_l1", "loss/gen/4/smooth_l1", "loss/seg/3/smooth_l1"
CONTRASTIVE = "loss/depth/2/contrastive"


@pytest.fixture
def run(recipe, tmp_path):
    def start(stage="pt", name="run", **overrides):
        overrides = {"train.max_steps": 2, "train.warmup": 0, "train.output_dir": tmp_path / name, **overrides}
        folder = train(recipe(stage, **overrides), stage, {})
        return folder, read_metrics(folder / "metrics.jsonl")

    return start


@pytest.fixture(scope="module")
def baseline():
    return {}


@pytest.mark.parametrize(
    ("overrides", "changed", "kept"),
    [
        ({"losses.contrastive": "false"}, ["loss/total"], [CONTRASTIVE, DEPTH, "loss/text"]),
        ({"losses.contrastive_weight": 0.7}, ["loss/total"], [CONTRASTIVE, DEPTH, "loss/text"]),
        ({"tasks.depth.weight": 0.1}, ["loss/total"], [DEPTH, GEN, "loss/text"]),
        ({"model.geometry": "pad"}, ["loss/text", DEPTH], []),
        ({"model.select_layer": -1}, ["loss/text", DEPTH], []),
        ({"model.gen_query": "raw"}, [GEN], [DEPTH, SEG, "loss/text"]),
        ({"model.key_blocks": "img+t"}, [GEN, DEPTH, SEG], ["loss/text"]),
        ({"model.key_blocks": "sys+img+t"}, [GEN, DEPTH, SEG], ["loss/text"]),
        ({"model.include_answer": "false"}, [GEN, DEPTH, SEG], ["loss/text"]),
        ({"model.order": "[seg, depth, gen]"}, ["loss/text"], []),
        ({"model.num_task_tokens": 4}, ["loss/text", GEN], []),
        ({"model.template": "plain"}, ["loss/text"], []),
        ({"train.seed": 1}, ["loss/text", DEPTH], []),
        ({"data.fraction": 0.5}, ["epoch"], []),
        ({"model.packing": False}, [], ["loss/total", "loss/text", DEPTH, GEN, SEG, CONTRASTIVE]),
    ],
    ids=str,
)
def test_first_step(run, baseline, overrides, changed, kept):
    if not baseline:
        baseline.update(run(name="baseline")[1][0])
    _, (first, _) = run(**overrides)
    for name in changed:
        assert abs(first[name] - baseline[name]) > 1e-6, name
    for name in kept:
        assert first[name] == pytest.approx(baseline[name], abs=1e-6), name


@pytest.mark.parametrize(
    "overrides",
    [{"train.lr": 0.02}, {"train.weight_decay": 20.0}, {"train.max_grad_norm": 1e-4}, {"train.warmup": 0.9}],
    ids=str,
)
def test_update(run, overrides):
    """The first step is the same and the second, after the update, is not."""
    _, expected = run(name="baseline")
    _, metrics = run(**overrides)
    assert metrics[0]["loss/total"] == expected[0]["loss/total"]
    assert metrics[1]["loss/total"] != expected[1]["loss/total"]
    assert metrics[0]["lr"] == pytest.approx(
        {"train.lr": 0.02, "train.warmup": 1e-3 / 54}.get(next(iter(overrides)), 1e-3)
    )


def test_mixed_precision_is_near_and_not_the_same(run):
    """Of two runs in one process, too, as of the stages of `all`: accelerate by itself keeps the first one's."""
    _, (exact, _) = run(name="exact")
    _, (near, _) = run(name="near", **{"train.mixed_precision": "bf16"})
    for name in ("loss/text", DEPTH, GEN, SEG):
        assert near[name] != exact[name], name
        assert near[name] == pytest.approx(exact[name], rel=2e-2), name


@pytest.fixture
def seen(monkeypatch):
    """What the optimizer steps of a run were called on and with."""
    calls = []
    original = OptimizerStep.__call__

    def spy(self, step, micro_batches):
        calls.append((self, micro_batches))
        return original(self, step, micro_batches)

    monkeypatch.setattr(OptimizerStep, "__call__", spy)
    return calls


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing(run, seen, on):
    run(**{"train.gradient_checkpointing": on})
    model = seen[0][0].parallel.model
    assert model.llm.is_gradient_checkpointing is on


@pytest.mark.parametrize("grouped", [True, False])
def test_group_by_modality(run, seen, ift_json, tmp_path, grouped):
    pt, _ = run(name="pt")
    seen.clear()
    samples = json.loads(ift_json.read_text())
    (tmp_path / "mixed.json").write_text(json.dumps(samples + samples))  # 12 with an image, 4 without
    run("ift", **{"init.from": pt, "data.file": tmp_path / "mixed.json", "data.group_by_modality": grouped,
                  "train.max_steps": 4})  # fmt: skip
    kinds = [set(m.complete.tolist()) for _, micro_batches in seen for m in micro_batches]
    assert len(kinds) == 4
    assert all(len(kind) == 1 for kind in kinds) is grouped


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_tokens(run, ift_json, frozen):
    pt, _ = run(name="pt")
    ift, _ = run("ift", **{"init.from": pt, "data.file": ift_json, "train.freeze_tokens": frozen})
    before, after = load_file(pt / "adapter.safetensors"), load_file(ift / "model.safetensors")
    names = [name for name in before if name.startswith("task_tokens.")]
    assert len(names) == 3
    assert all(torch.equal(before[name], after[name]) for name in names) is frozen


def test_embedding_losses_in_ift(run, ift_json, make_small_targets):
    both = {"losses.stages": "[pt, ift]", "targets.store": make_small_targets(ift_json)}
    pt, _ = run(name="pt")
    _, (first, _) = run("ift", **{"init.from": pt, "data.file": ift_json, **both})
    assert first[DEPTH] > 0


def test_tokens_without_losses(run):
    folder, (first, _) = run(**{"losses.stages": "[]"})
    assert not any(name.startswith("loss/depth") for name in first)
    weights = load_file(folder / "adapter.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"projector", "task_tokens"}


class TestStart:
    """Later stages cannot be told otherwise what the model is."""

    @pytest.fixture
    def pt(self, run):
        return run(name="pt")[0]

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"model.template": "vicuna_v1"}, r"model\.template is vicuna_v1, .* was trained with llama_3"),
            ({"model.select_layer": -3}, r"model\.select_layer is -3, .* was trained with -2"),
            ({"model.num_task_tokens": 4}, r"model\.num_task_tokens is 4, .* was trained with 8"),
            ({"model.order": "[seg, depth, gen]"}, r"tasks, in model\.order is .*seg.*, .* was trained with"),
        ],
    )
    def test_ift_from_pt(self, run, pt, ift_json, override, message):
        with pytest.raises(RecipeError, match=message):
            run("ift", **{"init.from": pt, "data.file": ift_json, **override})

    def test_another_llm(self, run, pt, ift_json, tmp_path):
        from olavlm.teachers.tiny import make_tiny

        other = make_tiny(tmp_path / "other", seed=1)
        with pytest.raises(RecipeError, match=r"model\.llm is .*other"):
            run("ift", **{"init.from": pt, "data.file": ift_json, "model.llm": other["llm"]})

    def test_vpt_then_ift_keeps_geometry_and_refuses_another_template(self, run, pt, ift_json, pt_json):
        vpt, _ = run("vpt", name="vpt", **{"init.from": pt, "data.file": pt_json})
        ift, _ = run("ift", name="ift", **{"init.from": vpt, "data.file": ift_json, "model.geometry": "square"})
        assert json.loads((ift / "config.json").read_text())["geometry"] == "square"
        with pytest.raises(RecipeError, match=r"model\.template is phi_3"):
            run("ift", **{"init.from": vpt, "data.file": ift_json, "model.template": "phi_3"})

    def test_a_run_is_not_resumed_on_other_weights(self, run, pt, ift_json):
        ift = {"init.from": pt, "data.file": ift_json}
        run("ift", **ift)
        (pt / "metrics.jsonl").unlink()
        for left in (pt / "checkpoints").rglob("*"):
            if left.is_file():
                left.unlink()
        import shutil

        shutil.rmtree(pt)
        run(name="pt", **{"train.seed": 5})
        with pytest.raises(Exception, match="started from other weights than lie there now"):
            run("ift", **ift)


class TestData:
    def write(self, tmp_path, samples):
        (tmp_path / "made.json").write_text(json.dumps(samples))
        return {"data.file": tmp_path / "made.json"}

    def test_images_cut_by_max_length_are_masked(self, run, pt_json, tmp_path):
        """The second sample has its image in the second turn, where it no longer fits."""
        first = json.loads(pt_json.read_text())[0]
        image, answer = first["conversations"]
        long = [{"from": "human", "value": "word " * 40}, {"from": "gpt", "value": "yes"}, image, answer]
        both = self.write(tmp_path, [first, {**first, "id": "late", "conversations": long}])
        _, (cut, _) = run(**both, **{"train.batch_size": 2, "model.max_length": 120})
        _, (whole, _) = run(name="whole", **both, **{"train.batch_size": 2})
        assert (cut["valid/depth"], whole["valid/depth"]) == (1, 2)
        assert cut[DEPTH] > 0

    def test_a_batch_without_valid_rows_trains_text_alone(self, run, tmp_path, pt_json):
        samples = json.loads(pt_json.read_text())[:1]
        text = [{"id": f"t{i}", "conversations": [{"from": "human", "value": "Hi <image> tag"},
                                                  {"from": "gpt", "value": "Hello."}]} for i in range(3)]  # fmt: skip
        _, metrics = run(**self.write(tmp_path, samples + text), **{"train.batch_size": 1, "train.max_steps": 4})
        assert sorted(line["valid/depth"] for line in metrics) == [0, 0, 0, 1]
        for line in metrics:
            assert (line[DEPTH] > 0) == bool(line["valid/depth"])
            assert line["loss/text"] > 0

    def test_paths_with_colons(self, run, tmp_path, pt_json, sample_images, make_store):
        images = tmp_path / "images"
        images.mkdir()
        samples = json.loads(pt_json.read_text())[:4]
        for i, sample in enumerate(samples):
            (images / f"a:{i}.jpg").write_bytes((sample_images / sample["image"]).read_bytes())
            sample["image"] = f"a:{i}.jpg"
        written = self.write(tmp_path, samples)
        store = make_store("float32", data=written["data.file"], images=images)
        (images / "a:0.jpg").write_bytes(b"")
        _, (first, _) = run(**written, **{"data.images": images, "targets.store": store})
        assert (first["bad_images"], first["valid/depth"]) == (1, 3)

    def test_a_wrong_image_root_is_refused(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DatasetError, match=r"none of 10 images tried can be read.*check data\.images"):
            run(**{"data.images": tmp_path / "empty"})

    def test_a_length_that_leaves_no_text_is_refused(self, run):
        with pytest.raises(RecipeError, match=r"model\.max_length is 40: a short question about an image") as refused:
            run(**{"model.max_length": 40})
        least = int(re.search(r"takes (\d+) tokens", str(refused.value))[1])
        assert least > 40
        with pytest.raises(TrainingError, match=rf"no token of the batch .* cut at model\.max_length {least} before"):
            run(**{"model.max_length": least})  # which a short question fits in, and none of these captions'

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            ([("human", "no place"), ("gpt", "x")], "sample odd: it has an image"),
            ([("human", "<image>"), ("human", "again")], "sample odd: .*roles must alternate"),
            ([("human", "<image> <image>"), ("gpt", "x")], "sample odd: more than one <image>"),
        ],
    )
    def test_an_odd_sample_is_named_before_training(self, run, tmp_path, pt_json, turns, message):
        samples = json.loads(pt_json.read_text())
        samples[7] = {**samples[7], "id": "odd", "conversations": [{"from": f, "value": v} for f, v in turns]}
        with pytest.raises(SampleError, match=message):
            run(**self.write(tmp_path, samples))
