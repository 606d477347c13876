"""Probe runs: equal splits, exact resume, stock LLaVA and ours, the model's own frame, fusion baselines, refusals."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from olavlm.cache import Dataset, ImageRoots
from olavlm.student import ModelError, RecipeError, TargetsError, TrainingError
from olavlm.student.formats.llava_hf import from_llava_hf
from olavlm.student.probing import scores as scoring
from olavlm.student.probing.bank import ProbeRun
from olavlm.student.probing.model import TURNS, check_layout, load_probed, probe_collator, token_layout
from olavlm.student.probing.predictions import ProbePredictions
from olavlm.student.probing.rows import ProbeRows
from olavlm.student.probing.scores import probe_cosines
from olavlm.student.probing.settings import ProbeData, ProbeSettings
from olavlm.student.probing.training import train_probes
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train

TASKS = {"gen": "gen", "grid": "grid"}


@pytest.fixture(scope="module")
def data(write_store, pt_json, sample_images, tmp_path_factory):
    """The photographs of `pt_json`, twice each, and a store of random features; one has no target for grid."""
    folder = tmp_path_factory.mktemp("probe-data")
    samples = json.loads(pt_json.read_text())
    (folder / "twice.json").write_text(json.dumps(samples + samples[::-1]))
    images = [sample["image"] for sample in samples]
    random = np.random.default_rng(0)
    features = {"gen": (1, 8), "grid": (4, 6)}
    features = {k: random.standard_normal((len(images), *v)).astype(np.float32) for k, v in features.items()}
    write_store(folder / "store", images, features, bad={})
    return ProbeData([str(folder / "twice.json")], [str(sample_images)], str(folder / "store"))


@pytest.fixture(scope="module")
def start(recipe_in, tmp_path_factory):
    """The run folder of a pt, with task tokens."""
    return train(recipe_in(tmp_path_factory.mktemp("start"), **{"train.max_steps": 1}), "pt", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="module")
def settings(start, data, folder):
    """settings(name, **changes) of a run of five steps."""

    def make(name="run", **changes):
        usual = {"layers": [2, 6], "batch_size": 4, "max_steps": 5, "warmup": 0.0, "workers": 0, **changes}
        return ProbeSettings(str(usual.pop("model", start)), data, TASKS, str(folder / name), **usual)

    return make


def run(settings, on_step=lambda *_: None):
    folder = train_probes(settings, {"test": "1"}, on_step)
    return folder, read_metrics(folder / "metrics.jsonl")


def told(metrics):
    return [{k: v for k, v in line.items() if k.startswith(("loss/", "cosine/"))} for line in metrics]


@pytest.fixture(scope="module")
def whole(settings):
    return run(settings("whole"))


def test_what_a_run_logs_and_leaves(whole, start):
    folder, metrics = whole
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    terms = [f"{task}/{layer}" for task in TASKS for layer in (2, 6)]
    for line in metrics:
        assert line["loss/total"] == pytest.approx(sum(line[f"loss/{term}/smooth_l1"] for term in terms))
        assert all(-1 <= line[f"cosine/{term}"] <= 1 for term in terms)
        assert (line["valid/gen"], line["valid/grid"], line["bad_images"]) == (4, 4, 0)
    assert metrics[0]["lr"] == pytest.approx(1e-3)
    assert metrics[2]["epoch"] == pytest.approx(1.0), "an image is seen once an epoch, though the data has it twice"
    kept = ProbeRun.load(folder)
    assert (kept.model, kept.steps, kept.layout["geometry"]) == (str(start), 5, "square")
    assert kept.layout["task_tokens"] == [["gen", 8], ["depth", 8], ["seg", 8]]
    assert [task.layers for task in kept.tasks] == [(2, 6), (2, 6)]
    assert {"recipe.yaml", "versions.json", "train_images.parquet"} <= {file.name for file in folder.iterdir()}


def test_a_stop_changes_no_bit_and_neither_does_what_else_is_probed(settings, whole):
    def stop(step, _total, _values):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = settings("stopped")
    with pytest.raises(TrainingError, match="stopped by SIGTERM after step 2, which is saved"):
        run(stopped, stop)
    with pytest.raises(ModelError, match=r"holds no probes\.json"):
        ProbeRun.load(whole[0].parent / "stopped")
    resumed, metrics = run(stopped)
    assert told(metrics) == told(whole[1])
    weights = (whole[0] / "probes.safetensors").read_bytes()
    assert (resumed / "probes.safetensors").read_bytes() == weights
    with pytest.raises(TrainingError, match="another recipe"):
        run(replace(stopped, lr=0.5))

    alone, _ = run(replace(settings("alone", layers=[6]), tasks={"grid": "grid"}))
    expected = load_file(whole[0] / "probes.safetensors")
    found = load_file(alone / "probes.safetensors")
    assert {name.split(".")[1] for name in found} == {"grid_6"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_run_of_more_steps_is_not_called_finished(settings, whole):
    with pytest.raises(TrainingError, match=r"whole holds step 5, and this run ends at step 4: set --max-steps to 5"):
        run(settings("whole", max_steps=4))
    assert ProbeRun.load(whole[0]).steps == 5


def test_forwards_of_fewer_images_give_the_same(settings, whole):
    _, metrics = run(settings("cut", micro_batch=1))
    for one, other in zip(told(metrics), told(whole[1]), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_stock_llava_and_the_same_weights_in_our_format(llava, settings, data, tmp_path):
    stock = llava("llama_clip")
    from_llava_hf(stock).model.save_pretrained(tmp_path / "ours")
    results, scores = {}, {}
    for name, model in {"stock": stock, "ours": tmp_path / "ours"}.items():
        folder, results[name] = run(settings(name, model=model, layers=None))
        scores[name] = probe_cosines(folder, data, workers=0).values
    assert [task.layers for task in ProbeRun.load(folder).tasks] == [(1, 2, 3)] * 2, "all layers"
    for one, other in zip(told(results["stock"]), told(results["ours"]), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for task in TASKS:
        for layer in (1, 2, 3):
            np.testing.assert_allclose(scores["stock"][task][layer], scores["ours"][task][layer], atol=1e-4)

    # And both are what the library's own model computes.
    ours, _ = load_probed(tmp_path / "ours")
    rows, dataset = ProbeRows(data, TASKS), Dataset(data.files).asking(TURNS)
    micro = probe_collator(ours, dataset, ImageRoots(data.images), rows).collate([0, 3, 7])
    states, mask = ours.states({1, 2, 3}, **rows.on_device(micro, torch.device("cpu")).inputs)
    count, image = ours.num_image_tokens, ours.config.image_token_id
    ids = [[y for x in row for y in [x] * (count if x == image else 1)] for row in micro.input_ids.tolist()]
    reference = LlavaForConditionalGeneration.from_pretrained(stock).eval()
    with torch.no_grad():
        wanted = reference(
            input_ids=torch.tensor(ids), pixel_values=micro.pixel_values, output_hidden_states=True
        ).hidden_states
    assert mask.all()
    for layer in (1, 2, 3):
        assert (states[layer] - wanted[layer]).abs().max() < 1e-4, layer


def test_a_finetuned_model_sees_padded_pictures_and_its_probes_take_no_other_model(
    recipe_in, start, settings, ift_json, data, sample_images, tmp_path
):
    changes = {"init.from": start, "data.file": ift_json, "train.max_steps": 1}
    ift = train(recipe_in(tmp_path, "ift", **changes), "ift", {})
    folder, _ = run(settings("padded", model=ift, max_steps=1))
    kept = ProbeRun.load(folder)
    assert kept.layout["geometry"] == "pad"
    models = {name: load_probed(path)[0] for name, path in {"ift": ift, "pt": start}.items()}
    dataset, roots = Dataset(data.files).asking(TURNS), ImageRoots([str(sample_images)])
    image = next(x for x in dataset.images().to_pylist() if len(set(roots.open(x).size)) == 2)
    pixels = {}
    for name, model in models.items():
        collator = probe_collator(model, dataset, roots, ProbeRows(data, TASKS))
        pixels[name] = collator.collate([dataset.images().to_pylist().index(image)]).pixel_values[0].numpy()
        assert np.array_equal(pixels[name], model.config.image_transform(roots.open(image)))
    assert not np.array_equal(pixels["ift"], pixels["pt"])
    check_layout(models["ift"], kept.layout, folder)
    weights = ift / "model.safetensors"
    weights.rename(tmp_path / "kept")
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(ModelError, match="has other weights than when the probes"):
        probe_cosines(folder, data, workers=0)
    with pytest.raises(ModelError, match=f"{start} is not the model that the probes in .* read: it has other weights"):
        probe_cosines(folder, data, model_path=str(start), workers=0)
    with pytest.raises(ModelError, match="trained with geometry pad, and this model has square"):
        check_layout(models["pt"], kept.layout, folder)
    weights.unlink()
    (tmp_path / "kept").rename(weights)
    moved = ift.rename(tmp_path / "moved")
    for look in (
        lambda **where: probe_cosines(folder, data, workers=0, **where),
        lambda **where: ProbePredictions(folder, roots, torch.device("cpu"), **where),
    ):
        with pytest.raises(ModelError, match=f"{ift} holds no weights, and the probes in .* name where it lies now"):
            look()
        assert look(model_path=str(moved)) is not None
    other = token_layout(models["ift"]) | {"task_tokens": [["depth", 8], ["gen", 8], ["seg", 8]]}
    with pytest.raises(ModelError, match="trained with task_tokens"):
        check_layout(models["ift"], other, folder)


def test_images_without_a_target_or_that_cannot_be_read_are_left_out(
    settings, whole, data, write_store, sample_images, tmp_path
):
    """Of the ten: one is quarantined, one is no picture. Their rows change nothing, and are counted."""
    images = Dataset(data.files).images().to_pylist()
    (tmp_path / "images").mkdir()
    for image in images:
        content = b"" if image == images[3] else (sample_images / image).read_bytes()
        (tmp_path / "images" / image).write_bytes(content)
    store = ProbeRows(data, TASKS).store
    features = {name: store[name].read(store.rows.rows_of(images))[0] for name in TASKS}
    write_store(tmp_path / "store", images, features, bad={images[5]: "truncated"})
    damaged = replace(data, images=[str(tmp_path / "images")], store=str(tmp_path / "store"))

    found = probe_cosines(whole[0], damaged, workers=0, batch_size=3)
    complete = probe_cosines(whole[0], data, workers=0, batch_size=3)
    assert (found.unreadable, found.quarantined, found.seen) == (1, {"gen": 1, "grid": 1}, 10)
    assert (complete.unreadable, complete.quarantined) == (0, {"gen": 0, "grid": 0})
    for task in TASKS:
        for layer in (2, 6):
            expected = complete.values[task][layer].copy()
            expected[[3, 5]] = np.nan
            np.testing.assert_allclose(found.values[task][layer], expected, atol=1e-6)

    _, metrics = run(replace(settings("damaged", batch_size=10, max_steps=1), data=damaged))
    _, sound = run(settings("sound", batch_size=10, max_steps=1))
    assert (metrics[0]["valid/gen"], metrics[0]["bad_images"]) == (8, 1)
    assert (sound[0]["valid/gen"], sound[0]["bad_images"]) == (10, 0)
    assert np.isfinite(metrics[0]["loss/total"])
    assert metrics[0]["loss/total"] != sound[0]["loss/total"]


def test_a_store_of_int8_gives_nearly_the_same(settings, whole, data, write_store, tmp_path):
    images = Dataset(data.files).images().to_pylist()
    store = ProbeRows(data, TASKS).store
    features = {name: store[name].read(store.rows.rows_of(images))[0] for name in TASKS}
    small = replace(data, store=str(write_store(tmp_path / "int8", images, features, dtype="int8")))
    exact, rounded = (probe_cosines(whole[0], x, workers=0).values["grid"][2] for x in (data, small))
    np.testing.assert_allclose(rounded, exact, atol=0.02)
    assert not np.array_equal(rounded, exact)
    _, metrics = run(replace(settings("int8", max_steps=1), data=small))
    assert metrics[0]["loss/total"] == pytest.approx(whole[1][0]["loss/total"], rel=0.01)


def test_a_fusion_baseline_is_fed_what_it_was_trained_on(recipe_in, store32, pt_json, data, settings, tmp_path):
    fused = {"model.fusion": "feature_concat", "model.num_task_tokens": 0, "losses.stages": "[]", "train.max_steps": 1}
    fused["targets.store"] = store32
    model = train(recipe_in(tmp_path, **fused), "pt", {})
    whole = replace(data, store=str(store32))
    common = {"model": model, "layers": [3], "batch_size": 2, "max_steps": 1}
    gen = replace(settings("fused", **common), data=whole, tasks={"gen": "gen"})
    folder, metrics = run(gen)
    before = probe_cosines(folder, whole, workers=0).values["gen"][3]
    assert metrics[0]["valid/gen"] == 2
    with pytest.raises(TargetsError, match=r"lacks the features of gen that the model reads .* olavlm-extract"):
        run(settings("unfed", **common))

    original = ProbeRows.on_device

    def starve(self, micro, device):
        batch = original(self, micro, device)
        for features in batch.inputs["teacher_features"].values():
            features.zero_()
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeRows, "on_device", starve)
        after = scoring.probe_cosines(folder, whole, workers=0).values["gen"][3]
    assert np.abs(after - before).max() > 1e-4, "what it is fed matters"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, RecipeError, "--batch-size is 0: at least 1"),
        ({"batch_size": 6, "micro_batch": 4}, RecipeError, "1 processes with forwards of 4 images do not divide it"),
        ({"lr": 0.0}, RecipeError, "--lr is 0.0: above 0"),
        ({"layers": [7]}, RecipeError, "layer 7 of an LLM of 6 blocks"),
        ({"template": "phi_3"}, RecipeError, "template phi_3: .* knows its own"),
        ({"model": "no/such/model"}, ModelError, "neither a local folder nor reachable"),
    ],
)
def test_refusals(settings, changes, error, message):
    with pytest.raises(error, match=message):
        run(settings(**changes))


def test_a_store_that_does_not_serve_is_refused_with_the_command(settings, data, whole, write_store, tmp_path):
    def refused(message, **changes):
        with pytest.raises(TargetsError, match=message):
            train_probes(replace(settings("refused"), **changes), {})

    refused("lacks depth-last .it has gen, grid.; make it with: olavlm-extract --teacher depth --recipe last --data",
            tasks={"depth": "depth-last"})  # fmt: skip
    refused("lacks other .* --teacher gen --as other", tasks={"gen": "other"})
    refused("not a feature store.*olavlm-extract --teacher gen ", data=replace(data, store=str(tmp_path)))
    images = Dataset(data.files).images().to_pylist()
    part = write_store(tmp_path / "part", images[:4], {"gen": np.ones((4, 1, 8), np.float32)})
    refused("6 of its 10 images", tasks={"gen": "gen"}, data=replace(data, store=str(part)))
    other = write_store(tmp_path / "other", images, {k: np.ones((10, *s), np.float32) for k, s in
                        {"gen": (1, 8), "grid": (4, 5)}.items()})  # fmt: skip
    zero = {"gen": np.zeros((10, 1, 8), np.float32), "grid": np.ones((10, 4, 6), np.float32)}
    zeros = replace(data, store=str(write_store(tmp_path / "zeros", images, zero)))
    with pytest.raises(ModelError, match=r"gen, layer 2, .*: no cosine, for prediction or target is zero"):
        probe_cosines(whole[0], zeros, workers=0)
    with pytest.raises(TargetsError, match=r"'grid': fingerprint .*, and the probes in .* were trained on"):
        probe_cosines(whole[0], replace(data, store=str(other)), workers=0)
