"""What ends a run from outside, such as a damaged row, a dead loader, a full disk or images that are gone: one line, no
process is left, and the same command goes on."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from olavlm.cache import TeacherFeatures
from olavlm.student.data import targets
from olavlm.student.errors import TargetsError, TrainingError
from olavlm.student.probing.scores import probe_cosines
from olavlm.student.probing.settings import ProbeData, ProbeSettings
from olavlm.student.probing.training import ProbeStep, train_probes
from olavlm.student.training import trainer as trainer_module
from olavlm.student.training.checkpoint import check_files
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import train
from olavlm.teachers import TeacherError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def ended(program):
    """Status and standard error of a Python program that has to end by itself."""
    process = subprocess.Popen(
        [sys.executable, *map(str, program)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, errors


def command(name, *words):
    """A command as a program, in which no garbage collection ends loaders by chance."""
    return ["-c", f"import gc, sys; gc.disable(); from olavlm.pipelines.{name} import main; sys.exit(main())", *words]


@pytest.fixture(scope="module")
def start(recipe_in, tmp_path_factory):
    """The run folder of a pt."""
    return train(recipe_in(tmp_path_factory.mktemp("start"), **{"train.max_steps": 1}), "pt", {})


@pytest.fixture
def probes(start, pt_json, sample_images, small_targets, tmp_path):
    """probes(store=..., images=..., **changes) -> settings of probes."""

    def make(store=small_targets, images=sample_images, **changes):
        usual = {"layers": [2], "batch_size": 4, "max_steps": 6, "save_every": 1, "warmup": 0.0, "workers": 0}
        data = ProbeData([str(pt_json)], [str(images)], str(store))
        return ProbeSettings(str(start), data, {"gen": "gen"}, str(tmp_path / "probes"), **usual | changes)

    return make


@pytest.fixture
def damaged(small_targets, tmp_path):
    """A store with one bit flipped in each first row."""
    store = tmp_path / "damaged"
    shutil.copytree(small_targets, store)
    for file in store.glob("*/features/c/0/0/0"):
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)
    return store


class TestDamagedRow:
    def test_training_ends(self, recipe, damaged, tmp_path):
        made = recipe(**{"data.workers": 2, "targets.store": damaged, "train.max_steps": 5})
        (tmp_path / "recipe.json").write_text(json.dumps(made.to_dict()))
        status, errors = ended(command("train", "pt", "--config", tmp_path / "recipe.json"))
        assert status == 1, errors
        assert errors.startswith("olavlm-train: error: "), errors
        assert " is damaged: its bytes in " in errors
        assert errors.count("\n") == 1, errors

    def test_training_of_probes_ends(self, damaged, start, pt_json, sample_images, tmp_path):
        data = ["--data", pt_json, "--images", sample_images, "--store", damaged, "--workers", 2]
        what = ["--model", start, "--tasks", "gen", "--batch-size", 4, "--output", tmp_path / "probes"]
        status, errors = ended(command("probe", "train", *data, *what))
        assert status == 1, errors
        assert errors.startswith("olavlm-probe: error: "), errors
        assert " is damaged: its bytes in " in errors
        assert errors.count("\n") == 1, errors


class TestLoaders:
    def test_a_trainer_that_does_not_close_them_ends_all_the_same(self):
        program = """
from types import SimpleNamespace
import numpy as np
from olavlm.student.data.batches import batches
from olavlm.student.data.sampler import GlobalBatchSampler
sampler = GlobalBatchSampler(np.zeros(8, bool), 2, 0)
loading = batches(lambda indices: SimpleNamespace(images=[]), sampler, range(4), rank=0, world_size=1, accumulation=1,
                  workers=2, pin_memory=False)
next(loading.__enter__())
raise SystemExit(3)
"""
        status, _ = ended(["-c", program])
        assert status == 3

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
    @pytest.mark.parametrize("what", [OptimizerStep, ProbeStep])
    def test_one_that_dies_during_a_step_is_named(self, recipe, probes, monkeypatch, what, number):
        """The library raises its error wherever the trainer is when the signal comes."""

        def killing(*_):
            os.kill(multiprocessing.active_children()[0].pid, number)
            time.sleep(30)  # until the trainer hears of it
            raise AssertionError("no word of it")

        runs = {
            OptimizerStep: lambda: train(recipe(**{"data.workers": 2, "train.max_steps": 5}), "pt", {}),
            ProbeStep: lambda: train_probes(probes(workers=2), {}),
        }
        monkeypatch.setattr(what, "__call__", killing)
        with pytest.raises(TrainingError, match=r"^a loader process died \(.*killed by signal.*run the same command"):
            runs[what]()
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_store_that_cannot_be_read_is_named(self, recipe, small_targets, monkeypatch, workers):
        def failing(*_, **__):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(TeacherFeatures, "read_stored", failing)
        with pytest.raises(TrainingError) as error:
            train(recipe(**{"data.workers": workers, "train.max_steps": 1}), "pt", {})
        assert str(error.value) == (
            f"a loader could not read {small_targets}/gen: Input/output error; make it readable, then run the same "
            "command again"
        )

    def test_an_object_store_that_answers_nothing_is_told_in_one_line(self, recipe, monkeypatch):
        def failing(*_, **__):
            raise OSError("s3://bucket/store/gen: EndpointConnectionError: no route")  # as the cache says it

        monkeypatch.setattr(TeacherFeatures, "read_stored", failing)
        with pytest.raises(TrainingError, match=r"^a loader could not read s3://bucket/store/gen: .*: no route; make"):
            train(recipe(**{"data.workers": 1, "train.max_steps": 1}), "pt", {})

    def test_a_teacher_that_refuses_an_image_is_told_in_one_line(self, recipe, store32, monkeypatch):
        def refusing(*_):
            raise TeacherError("depth: not this picture")

        def load_teacher(*asked):
            teacher = loaded(*asked)
            blank = teacher.prepare(Image.new("RGB", (1, 1)))
            monkeypatch.setattr(teacher, "prepare", lambda image: blank if image.size == (1, 1) else refusing())
            return teacher

        loaded = targets._load_teacher
        monkeypatch.setattr(targets, "_load_teacher", load_teacher)
        made = {"targets.source": "online", "targets.store": store32, "data.workers": 1, "train.max_steps": 1}
        with pytest.raises(TargetsError, match=r"^depth: not this picture$"):
            train(recipe(**made), "pt", {})


@pytest.fixture
def small_files():
    """small_files(bytes): from now on no file of this process grows beyond that, which looks to those who write as a
    full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFullDisk:
    @pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "state.json"])
    def test_the_last_checkpoint_stays_and_the_same_command_goes_on(self, recipe, small_files, tmp_path, file):
        made = recipe(**{"train.max_steps": 3, "train.save_every": 1, "train.keep": 1})
        checkpoints = tmp_path / "pt" / "checkpoints"

        def fill(step, _total, _values):
            if step == 2:
                sizes = {f.name: f.stat().st_size for f in (checkpoints / "step-000001").iterdir()}
                smaller = [size for size in sizes.values() if size < sizes[file]]
                small_files(max(smaller, default=sizes[file] // 2))

        with pytest.raises(TrainingError) as error:
            train(made, "pt", {}, fill)
        small_files(resource.RLIM_INFINITY)
        message = str(error.value)
        assert message.startswith(f"checkpoint {checkpoints}/step-000002 could not be written ("), message
        assert " MB left there; make room, then run the same command again to go on from the last ch" in message
        assert "\n" not in message
        assert [f.name for f in checkpoints.iterdir()] == ["step-000001"]
        check_files(checkpoints / "step-000001")
        whole = train(recipe(**{"train.max_steps": 3, "train.output_dir": tmp_path / "whole"}), "pt", {})
        assert (train(made, "pt", {}) / "adapter.safetensors").read_bytes() == (
            whole / "adapter.safetensors"
        ).read_bytes()

    @pytest.mark.parametrize("limit", [2**10, 2**20])  # the tokenizer, and the weights
    def test_a_result_that_cannot_be_written(self, recipe, small_files, monkeypatch, limit):
        made, save = recipe(**{"train.max_steps": 1}), trainer_module.save_result

        def full(*arguments):
            small_files(limit)
            try:
                save(*arguments)
            finally:
                small_files(resource.RLIM_INFINITY)

        monkeypatch.setattr(trainer_module, "save_result", full)
        with pytest.raises(TrainingError, match=r"the result in .* could not be written \(.*\), with .* MB left"):
            train(made, "pt", {})
        monkeypatch.setattr(trainer_module, "save_result", save)
        assert (train(made, "pt", {}) / "adapter.safetensors").is_file()

    def test_a_checkpoint_of_probes(self, probes, small_files):
        with pytest.raises(TrainingError, match=r"checkpoint .*step-000002 could not be written .* MB left there"):
            train_probes(probes(), {}, lambda step, *_: small_files(2**14) if step == 2 else None)


class TestImages:
    @pytest.fixture
    def images(self, pt_json, sample_images, tmp_path):
        folder = tmp_path / "images"
        folder.mkdir()
        for sample in json.loads(pt_json.read_text()):
            shutil.copy(sample_images / sample["image"], folder)
        return folder

    def test_that_are_gone_stop_the_run_before_a_step_and_the_same_command_goes_on(self, recipe, images, tmp_path):
        settings = {"data.images": images, "train.max_steps": 5, "train.save_every": 1, "train.keep": 2}
        run, elsewhere = tmp_path / "pt", tmp_path / "elsewhere"
        with pytest.raises(TrainingError) as error:
            train(recipe(**settings), "pt", {}, lambda step, *_: images.rename(elsewhere) if step == 2 else None)
        message = str(error.value)
        assert message.startswith("the images are gone: none of 10 images tried can be read, the first: "), message
        assert message.endswith("; check data.images; then run the same command again")
        assert len(read_metrics(run / "metrics.jsonl")) == 2
        assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
        elsewhere.rename(images)
        train(recipe(**settings), "pt", {})
        whole = train(recipe(**settings, **{"train.output_dir": tmp_path / "whole"}), "pt", {})
        assert (run / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()

    def test_that_are_gone_stop_probes_too(self, probes, images, tmp_path):
        elsewhere = tmp_path / "elsewhere"

        def lose(*_):
            images.rename(elsewhere)

        with pytest.raises(TrainingError, match="the images are gone: none of 10"):
            train_probes(probes(images=images), {}, lose)
        elsewhere.rename(images)
        run = train_probes(probes(images=images), {})
        with pytest.raises(TrainingError, match="the images are gone: none of 10"):
            probe_cosines(run, probes(images=images).data, batch_size=4, workers=0, on_images=lose)

    def test_bad_ones_are_masked_though_they_are_all_of_some_batch(self, recipe, images):
        for image in sorted(images.iterdir())[:6]:
            image.write_bytes(b"")
        run = train(recipe(**{"data.images": images, "train.batch_size": 1, "train.max_steps": 10}), "pt", {})
        assert sum(step["bad_images"] for step in read_metrics(run / "metrics.jsonl")) == 6
