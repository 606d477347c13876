"""Cached targets: what the store holds, in whatever storage dtype, reaches the losses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from olavlm.cache import Dataset, FeatureStore, StoreBuilder, convert, pending
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.student.data.targets import CachedTargets, OnlineTargets, check_targets, extract_command
from olavlm.student.errors import RecipeError, TargetsError
from olavlm.student.losses.scaled_features import joined
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train


@pytest.fixture(scope="module", params=["float16", "int8", "int4"])
def small_store(request, store32, tmp_path_factory):
    """The shared store in another storage dtype."""
    target = tmp_path_factory.mktemp(request.param) / "features"
    convert(str(store32), str(target), dtype=request.param)
    return target


def test_a_batch_with_and_without_images(recipe, small_store):
    source = CachedTargets(recipe(**{"targets.store": small_store}))
    store = FeatureStore(small_store)
    images = [store.rows.image_of(7), None, store.rows.image_of(2)]
    loaded, _ = source.load(images)
    targets, valid = source.finish(loaded, torch.device("cpu"))
    for name in ("gen", "depth", "seg"):
        assert valid[name].tolist() == [True, False, True]
        for at, row in ((0, 7), (2, 2)):
            np.testing.assert_allclose(targets[name][at].float().numpy(), store[name][row], rtol=1e-6)
        assert not targets[name].float()[1].any()
        if store[name].layout.dtype == "int8":  # it crosses to the device, and is gathered, as it is stored
            assert loaded[name]["features"].dtype == torch.int8
            twice = joined([targets[name], targets[name][:1]], lambda x: torch.cat([x, x]))
            assert twice.values.dtype == torch.int8
            torch.testing.assert_close(twice.float()[[0, 3, 4, 7]], targets[name].float()[[0, 0, 0, 0]])
            assert len(twice) == 8


def test_losses_stay_near_those_of_exact_targets(recipe, store32, small_store, tmp_path):
    def losses(name: str, store) -> list[dict]:
        made = recipe(**{"train.max_steps": 2, "train.output_dir": tmp_path / name, "targets.store": store})
        folder = train(made, "pt", {})
        return [
            {k: v for k, v in step.items() if k.startswith("loss/")} for step in read_metrics(folder / "metrics.jsonl")
        ]

    exact, close = losses("exact", store32), losses("close", small_store)
    within = {"float16": 1e-3, "int8": 1e-2, "int4": 0.1}[FeatureStore(small_store)["depth"].layout.dtype]
    for ours, theirs in zip(close, exact, strict=True):
        assert ours.keys() == theirs.keys()
        assert len([k for k in ours if "smooth_l1" in k]) >= 3
        assert ours == pytest.approx(theirs, rel=within)
    assert close != exact  # the control: they are other targets


def test_two_processes_share_int8_targets(recipe, store32, tmp_path):
    """Each has the targets of both as negatives, gathered in int8: the losses of one process with the whole batch."""
    store = tmp_path / "int8"
    convert(str(store32), str(store), dtype="int8")
    one = recipe(**{"train.max_steps": 1, "targets.store": store, "train.output_dir": tmp_path / "one"})
    (expected,) = read_metrics(train(one, "pt", {}) / "metrics.jsonl")
    two = recipe(**{"train.max_steps": 1, "targets.store": store, "train.output_dir": tmp_path / "two",
                    "train.batch_size": one.train.batch_size // 2})  # fmt: skip
    (tmp_path / "two.json").write_text(json.dumps(two.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
               "olavlm.pipelines.train", "pt", "--config", str(tmp_path / "two.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = read_metrics(tmp_path / "two" / "metrics.jsonl")
    losses = {name: value for name, value in expected.items() if name.startswith("loss/")}
    assert len([name for name in losses if name.endswith("contrastive")]) >= 3
    assert {name: found[name] for name in losses} == pytest.approx(losses, rel=1e-5)


@pytest.fixture
def gen_store(tiny, pt_json, sample_images, tmp_path):
    """gen_store(geometry=..., compute_dtype=...) -> folder of a finished store of the tiny gen teacher."""

    def make(**options) -> str:
        folder, spec = str(tmp_path / "store"), TeacherSpec("gen", "gen", str(tiny["gen"]), **options)
        builder = StoreBuilder(folder)
        builder.extend_plan(Dataset([pt_json]).images())
        builder.ensure_teacher("gen", spec.load("cpu").card.to_dict(), dtype="float16", shard_rows=16)
        worker = ShardExtractor(folder, [spec], [str(sample_images)], batch_size=4, device="cpu", threads=1)
        worker.load()
        worker.extract(pending(FeatureStore(folder)["gen"]))
        return folder

    return make


class TestGeometry:
    """The store's must be the recipe's, and one that is to line up with the base encoder's must be the same as its."""

    @pytest.mark.parametrize("source", ["cache", "online"])
    @pytest.mark.parametrize(
        ("stage", "targets", "model", "base"),
        [("pt", "pad", "null", "square"), ("pt", "square", "pad", "pad"), ("ift", "square", "null", "pad")],
    )
    def test_grids_that_do_not_line_up(self, recipe, pt_json, source, stage, targets, model, base):
        made = recipe(stage, **{"targets.geometry": targets, "model.geometry": model, "targets.source": source})
        with pytest.raises(RecipeError, match=rf"is {targets}, and the base encoder sees {base} in {stage}.*set model"):
            check_targets(made, Dataset([pt_json]), stage)

    def test_the_papers_own_is_reference(self, recipe, pt_json):
        assert recipe().targets.geometry == "reference"
        check_targets(recipe(), Dataset([pt_json]), "pt")

    @pytest.mark.parametrize(("targets", "model"), [("square", "null"), ("pad", "pad")])
    def test_a_store_of_the_geometry_is_taken(self, recipe, gen_store, pt_json, targets, model):
        settings = {"targets.store": gen_store(geometry=targets), "tasks.depth": "null", "tasks.seg": "null"}
        check_targets(
            recipe(**{"targets.geometry": targets, "model.geometry": model}, **settings), Dataset([pt_json]), "pt"
        )
        with pytest.raises(TargetsError, match=rf"geometry is '{targets}', the recipe wants 'reference'.*make another"):
            check_targets(recipe(**settings), Dataset([pt_json]), "pt")


def test_online_teachers_compute_as_those_that_filled_the_store(recipe, gen_store):
    store = gen_store(compute_dtype="bfloat16")
    settings = {"targets.store": store, "tasks.depth": "null", "tasks.seg": "null"}
    made = recipe(**{"targets.source": "online", **settings})
    teacher = OnlineTargets(made, torch.device("cpu")).teachers["gen"]
    assert teacher.card.compute_dtype == "bfloat16"
    assert " --compute-dtype bfloat16 " in extract_command(made, ["gen"])


class TestExtractCommand:
    def test_flags_of_one_teacher_make_a_command_of_their_own(self, recipe):
        made = recipe(**{"tasks.depth.recipe": "last", "tasks.seg.key": "mine", "targets.store": "new"})
        together, depth, seg = extract_command(made, ["gen", "depth", "seg"]).split(" && ")
        assert [word in together for word in ("--teacher gen=", "--recipe", "--as")] == [True, False, False]
        assert ("--teacher depth=" in depth, "--recipe last" in depth) == (True, True)
        assert ("--teacher seg=" in seg, "--as mine" in seg) == (True, True)

    def test_a_generic_teacher(self, recipe):
        settings = {"teacher": "timm:test_vit", "model": "vit.safetensors", "recipe": "embedding"}
        made = recipe(**{f"tasks.gen.{key}": value for key, value in settings.items()}, **{"targets.store": "new"})
        command = extract_command(made, ["gen"])
        assert "--teacher timm:test_vit=vit.safetensors --recipe embedding" in command
        assert "--as" not in command

    def test_without_a_store_there_is_a_place_to_name_one(self, recipe):
        made = recipe(**{"tasks.gen.model": "unclip", "targets.store": "null"})
        assert extract_command(made, ["gen"]).startswith("olavlm-extract --teacher gen=unclip ")
        assert extract_command(made, ["gen"]).endswith(" --store STORE")


def test_a_task_without_a_key_is_where_extract_puts_it(recipe):
    made = recipe(**{"tasks.gen.teacher": "timm:test_vit", "tasks.depth": "null", "tasks.seg": "null"})
    with pytest.raises(KeyError, match="timm-test_vit"):
        CachedTargets(made)
    with pytest.raises(RecipeError, match=r"tasks.gen: teacher 'tim:vit': unknown; use one of depth, "):
        CachedTargets(recipe(**{"tasks.gen.teacher": "tim:vit"}))
