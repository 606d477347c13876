"""Several processes: equal to one, with and without shards; checkpoints that any number of processes resumes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from olavlm.pipelines.launch_configs import launch_configs
from olavlm.student.data.order import make_sampler
from olavlm.student.errors import RecipeError
from olavlm.student.probing.settings import ProbeData, ProbeSettings
from olavlm.student.probing.training import train_probes
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import open_data, train

pytestmark = pytest.mark.timeout(900)  # the first test waits for the runs of all
PROGRAM = Path(__file__).with_name("distributed_runs.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
RESULT = {"pt": "adapter.safetensors", "ift": "model.safetensors"}


def command(config, program):
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_configs()[config]),
            "--num_processes", "2", "--main_process_port", "0", *map(str, program)]  # fmt: skip


def launch(config, jobs, folder, *others):
    """Runs of (stage, recipe), and after them what `distributed_runs.py` runs else."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([{"stage": stage, "recipe": recipe.to_dict()} for stage, recipe in jobs] + [*others]))
    done = subprocess.run(
        command(config, [PROGRAM, file]), capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr  # the process that failed first may stand anywhere in it


SCENES = {
    "pt": ("pt", {"train.gradient_checkpointing": True}),
    "ift": (
        "ift",
        {
            "train.lr": 1e-4,
            "train.max_grad_norm": 0.5,
            "data.group_by_modality": True,
            "losses.stages": "[pt, ift]",
            "model.packing": False,
        },
    ),
    # Distillation over dialogues, some of them without an image.
    "mixed": ("pt", {"train.max_grad_norm": 0.5}),
    "lora": ("ift", {"train.lr": 1e-4, "lora.rank": 4, "train.gradient_checkpointing": True}),
}
SPLITS = {"": (2, 1), "-accumulated": (1, 2)}  # batch size and accumulation of two processes; of one they are 4 and 1
CUT = [(name, split) for name in SCENES for split in SPLITS if (name, split) != ("lora", "-accumulated")]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def scene(recipe_in, store32, ift_json, folder):
    """scene(name, place, **overrides) -> stage and recipe, whose run folder is below the place.

    In `pt`, AdamW makes differences as large as a step of the rounding of gradients that are nearly zero, which among
    those towards the few random targets of other tests some are.
    """
    start = train(recipe_in(folder / "start", **{"train.max_steps": 1}), "pt", {"test": "1"})

    def make(name, place, **overrides):
        stage, settings = SCENES[name]
        data = {"targets.store": store32} if name == "pt" else {"data.file": ift_json}
        init = {"init.from": start} if stage == "ift" else {}
        always = {"train.max_steps": STEPS, "train.save_every": 2, "train.output_dir": folder / place}
        return stage, recipe_in(folder, stage, **{**settings, **data, **init, **always, **overrides})

    return make


@pytest.fixture(scope="module")
def alone(scene, folder):
    """Run folders of one process, by scene."""
    return {name: run_alone(*scene(name, f"alone/{name}")) for name in SCENES}


def test_the_comparison_is_not_of_weights_that_stand_still(alone):
    for name, (stage, _) in SCENES.items():
        assert_moved(alone[name], stage, 2)


def test_shards_are_used_where_the_launch_asks_for_them(together):
    launch_of = json.loads((together / "pt" / "stage.json").read_text())
    assert launch_of["processes"] == 2
    assert launch_of["sharded"] is (together.name == "fsdp")


def test_the_main_process_draws_and_the_model_is_cut_again(together):
    """After the last step no backward follows; that what is saved is whole, `test_two_processes_equal_one` sees."""
    assert len(list((together / "pt-accumulated" / "pictures" / f"step-{STEPS:06d}").iterdir())) == 1


def run_alone(stage, recipe):
    torch.set_num_threads(1)
    return train(recipe, stage, {"test": "1"})


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def together(request, scene, alone, folder, pt_json, probes):
    """Run folders of two processes, by scene and split, and by scene for those resumed."""
    place = folder / request.param
    place.mkdir()
    jobs = []
    pictures = {"data.held_out": pt_json, "train.pictures_every": STEPS, "train.pictures": 1}
    for name, split in CUT:
        size, accumulation = SPLITS[split]
        cut = {"train.batch_size": size, "train.accumulation": accumulation}
        if split or name not in RESULT:
            cut["train.save_every"] = STEPS  # a checkpoint of the middle is used of the others
        drawn = pictures if (name, split) == ("pt", "-accumulated") else {}
        jobs.append(scene(name, place / f"{name}{split}", **cut, **drawn))
    for name, stops in {"pt": (1, 3, STEPS), "ift": (2, STEPS)}.items():
        cut = {"train.batch_size": 2}
        jobs += [scene(name, place / f"{name}-halves", **cut, **{"train.max_steps": steps}) for steps in stops]
        take_checkpoint(alone[name], place / f"{name}-of-one", 2)
        jobs.append(scene(name, place / f"{name}-of-one", **cut))
    launch(request.param, jobs, place, *([{"probe": probes(place / "probes")}] if request.param == "ddp" else []))
    return place


@pytest.fixture(scope="module")
def probes(scene, folder, write_store, pt_json, sample_images):
    """probes(place) -> settings of probes on the model that ift starts from."""
    images = list(dict.fromkeys(sample["image"] for sample in json.loads(pt_json.read_text())))
    features = np.random.default_rng(0).standard_normal((len(images), 4, 6)).astype(np.float32)
    store = write_store(folder / "probed", images, {"grid": features})

    def make(place):
        data = {"files": [str(pt_json)], "images": [str(sample_images)], "store": str(store)}
        return {"model": str(folder / "start" / "pt"), "data": data, "tasks": {"grid": "grid"}, "output": str(place),
                "layers": [2, 6], "batch_size": 4, "max_steps": STEPS, "workers": 0}  # fmt: skip

    return make


def test_probes_of_two_processes_are_those_of_one(together, probes, folder, monkeypatch):
    settings = probes(folder / "probes-alone")
    settings = ProbeSettings(**settings | {"data": ProbeData(**settings["data"])})
    if together.name == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(RecipeError, match="probes are whole on each process"):
            train_probes(settings, {})
        return
    alone = train_probes(settings, {})
    (expected, found) = (read_metrics(run / "metrics.jsonl") for run in (alone, together / "probes"))
    for one, two in zip(expected, found, strict=True):
        for name in (name for name in one if name.startswith(("loss/", "cosine/", "valid/"))):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    first, last = (expected[i]["loss/total"] for i in (0, -1))
    assert first != last


def take_checkpoint(run, other, step):
    shutil.copytree(run / "checkpoints" / f"step-{step:06d}", other / "checkpoints" / f"step-{step:06d}")


def metrics(run):
    names = ("loss/", "grad_norm", "scale/", "supervised_tokens", "valid/")
    return [{k: v for k, v in line.items() if k.startswith(names)} for line in read_metrics(run / "metrics.jsonl")]


def assert_moved(run, stage, step):
    """What trains, scalars apart, moved by more than the tolerance of comparisons since a step of its run."""
    before = load_file(run / "checkpoints" / f"step-{step:06d}" / "trained.safetensors")
    after = load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "trained.safetensors")
    moved = [float((after[name] - before[name]).abs().max()) for name in before if before[name].ndim]
    assert min(moved) > 1e-4


def assert_equal_runs(run, expected, stage, skip=0):
    """Metrics and what was trained agree to 1e-5."""
    ours, theirs = metrics(run), metrics(expected)[skip:]
    assert len(ours) == len(theirs) == STEPS - skip
    for x, y in zip(ours, theirs, strict=True):
        assert x == pytest.approx(y, rel=1e-5, abs=1e-5)
    ours, theirs = load_file(run / RESULT[stage]), load_file(expected / RESULT[stage])
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert worst <= 1e-5


@pytest.mark.parametrize(("name", "split"), CUT)
def test_two_processes_equal_one(together, alone, name, split):
    assert_equal_runs(together / f"{name}{split}", alone[name], SCENES[name][0])


@pytest.mark.parametrize("name", ["pt", "ift"])
def test_two_processes_resume_bit_for_bit(together, name):
    """Twice in a row, and in the second epoch."""
    halves, whole = together / f"{name}-halves", together / name
    assert (halves / RESULT[name]).read_bytes() == (whole / RESULT[name]).read_bytes()
    assert metrics(halves) == metrics(whole)


@pytest.mark.parametrize("name", ["pt", "ift"])
def test_one_process_and_two_resume_each_other(together, scene, alone, name):
    assert_equal_runs(together / f"{name}-of-one", alone[name], name, skip=2)
    back = together / f"{name}-back"
    take_checkpoint(together / name, back, 2)
    assert_equal_runs(run_alone(*scene(name, back)), alone[name], name, skip=2)


def test_some_micro_batch_is_text_alone_on_one_process(scene):
    """What the mixed scene is for."""
    _, recipe = scene("mixed", "unused")
    dataset, _ = open_data(recipe)
    has_image = np.asarray(dataset.has_image())
    sampler = make_sampler(recipe, dataset, None, 4, image_tokens=100)
    kinds = {
        tuple(bool(has_image[sampler.slices(step, rank, 2, 2)[part]].any()) for rank in range(2))
        for step in range(STEPS)
        for part in range(2)
    }
    assert kinds & {(True, False), (False, True)}


def test_sharded_processes_in_bfloat16_save_and_leave_at_a_signal(recipe, tmp_path):
    """And the losses until then are those of one process, as far as bfloat16 tells."""
    half = {"model.dtype": "bfloat16", "train.mixed_precision": "bf16", "train.epochs": 20}
    stopped = recipe(**half, **{"train.batch_size": 2, "train.output_dir": tmp_path / "stopped"})
    (tmp_path / "recipe.json").write_text(json.dumps(stopped.to_dict()))
    program = ["-m", "olavlm.pipelines.train", "pt", "--config", tmp_path / "recipe.json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command("fsdp", program), env=ENVIRONMENT, start_new_session=True, **pipes)
    try:
        assert any(line.startswith("step 2/") for line in launcher.stdout), launcher.stderr.read()[-4000:]
        launcher.send_signal(signal.SIGTERM)  # the launcher passes it on
        _, errors = launcher.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode != 0
    assert "after step" in errors
    done = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert 2 <= len(done) < 60
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{len(done):06d}"
    alone = recipe(**half, **{"train.max_steps": 2, "train.output_dir": tmp_path / "alone"})
    expected = read_metrics(run_alone("pt", alone) / "metrics.jsonl")
    for ours, theirs in zip(done, expected, strict=False):
        losses = [name for name in theirs if name.startswith("loss/")]
        assert len(losses) > 10
        assert {n: ours[n] for n in losses} == pytest.approx({n: theirs[n] for n in losses}, rel=2e-2)
