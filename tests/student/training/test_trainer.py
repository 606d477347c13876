"""Training: what gets gradients, equal splits, exact resume, cached against online targets, and refusals."""

import contextlib
import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from olavlm.cache import FeatureStore, StoreBuilder
from olavlm.student import OlaVLM, RecipeError, TargetsError, TrainingError, load_checkpoint, task
from olavlm.student.adapter import read_adapter
from olavlm.student.data.batches import _leave_signals_to_the_trainer
from olavlm.student.stages import ADAPTER
from olavlm.student.training import start
from olavlm.student.training import trainer as trainer_module
from olavlm.student.training.checkpoint import check_agreed, check_files, latest_step, save_step
from olavlm.student.training.loop import Schedule
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import train

LAYERS = {"gen": (4, 6), "depth": (2, 6), "seg": (3, 5)}
TERMS = [
    f"loss/{task}/{layer}/{term}"
    for task, layers in LAYERS.items()
    for layer in layers
    for term in ("smooth_l1", "contrastive")
]


def run(recipe, stage="pt"):
    folder = train(recipe, stage, {"test": "1"})
    return folder, read_metrics(folder / "metrics.jsonl")


def losses(metrics):
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in metrics]


def assert_close(a, b, tolerance):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert abs(x[name] - y[name]) <= tolerance * max(1.0, abs(y[name])), (name, x[name], y[name])


def test_every_term_is_logged_finite_and_not_zero_and_the_total_is_their_sum(recipe):
    folder, metrics = run(recipe(**{"train.max_steps": 3}))
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert all(line[name] > 0 for name in TERMS)
        assert set(losses([line])[0]) == {*TERMS, "loss/text", "loss/total"}
        embedding = sum(line[n] * (0.3 if n.endswith("contrastive") else 1.0) for n in TERMS)
        assert line["loss/total"] == pytest.approx(line["loss/text"] + 0.5 * embedding, rel=1e-6)
        assert line["data_wait_ms"] >= 0
    assert {"recipe.yaml", "versions.json", "stage.json", "adapter.safetensors"} <= {f.name for f in folder.iterdir()}


def grown(recipe, stage, monkeypatch):
    """Names of the parameters that changed in one step, by part, and of those with a gradient."""
    seen = {}
    original = OptimizerStep._check

    def spy(self, step, values, totals, micro_batches):
        model = self.parallel.model
        seen["gradients"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        seen["trainable"] = {n for n, p in model.named_parameters() if p.requires_grad}
        return original(self, step, values, totals, micro_batches)

    monkeypatch.setattr(OptimizerStep, "_check", spy)
    folder, _ = run(recipe, stage)
    return folder, seen


def test_pt_trains_projector_tokens_predictors_and_scales_alone(recipe, monkeypatch):
    _, seen = grown(recipe(**{"train.max_steps": 1}), "pt", monkeypatch)
    assert {n.partition(".")[0] for n in seen["gradients"]} == set(ADAPTER)
    assert seen["gradients"].keys() == seen["trainable"]
    for name, gradient in seen["gradients"].items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def test_ift_trains_llm_and_projector_alone(recipe, ift_json, monkeypatch):
    pt, _ = run(recipe(**{"train.max_steps": 1}))
    ift = recipe("ift", **{"init.from": pt, "data.file": ift_json, "train.max_steps": 1})
    folder, seen = grown(ift, "ift", monkeypatch)
    assert {n.partition(".")[0] for n in seen["gradients"]} == {"llm", "projector"}
    assert all(g.isfinite().all() for g in seen["gradients"].values())
    before, after = load_file(pt / "adapter.safetensors"), load_file(folder / "model.safetensors")
    for name in before:
        if name.startswith("task_tokens."):
            assert torch.equal(before[name], after[name]), name
        if name.startswith("projector."):
            assert not torch.equal(before[name], after[name]), name
    assert not any(name.startswith(("predictors.", "logit_scales.")) for name in after)
    assert OlaVLM.from_pretrained(folder).config.with_predictors is False


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_cached_and_online_targets_give_the_same_losses(recipe, make_store, store32, tmp_path, dtype, tolerance):
    store = store32 if dtype == "float32" else make_store(dtype)
    common = {"train.max_steps": 5, "targets.store": store}
    _, cached = run(recipe(**common, **{"train.output_dir": tmp_path / "cached"}))
    online = {"targets.source": "online", "targets.store": "null", "train.output_dir": tmp_path / "online"}
    _, live = run(recipe(**{**common, **online}))
    assert_close(losses(cached), losses(live), tolerance)


def test_online_teachers_are_those_that_filled_the_store(recipe, tiny, store32, tmp_path):
    """Without a model in the recipe the store's card names it; another one is refused."""
    unnamed = {f"tasks.{name}.model": "null" for name in LAYERS}
    common = {"train.max_steps": 1, "targets.source": "online", "targets.store": store32}
    _, named = run(recipe(**common, **{"train.output_dir": tmp_path / "named"}))
    _, found = run(recipe(**common, **unnamed, **{"train.output_dir": tmp_path / "found"}))
    assert losses(found) == losses(named)

    from olavlm.teachers.tiny import make_tiny

    other = make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(TargetsError, match="is not the one that filled"):
        run(recipe(**common, **{"tasks.depth.model": other["depth"], "train.output_dir": tmp_path / "other_run"}))
    with pytest.raises(TargetsError, match=r"tasks\.gen: .*hub"):
        run(recipe(**{**common, **unnamed, "targets.store": "null", "train.output_dir": tmp_path / "none"}))


@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_accumulation_equals_one_big_batch(recipe, ift_json, stage, tmp_path):
    common = {"train.max_steps": 3}
    if stage == "ift":
        pt, _ = run(recipe(**{"train.max_steps": 1, "train.output_dir": tmp_path / "start"}))
        common |= {"init.from": pt, "data.file": ift_json}
    settings = [(4, 1), (2, 2), (1, 4)]
    runs = [
        run(
            recipe(
                stage,
                **common,
                **{"train.batch_size": b, "train.accumulation": a, "train.output_dir": tmp_path / f"{b}x{a}"},
            ),
            stage,
        )
        for b, a in settings
    ]
    weights = [load_file(f / ("adapter.safetensors" if stage == "pt" else "model.safetensors")) for f, _ in runs]
    for (_, metrics), state in zip(runs[1:], weights[1:], strict=True):
        assert_close(losses(metrics), losses(runs[0][1]), 1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, weights[0][name], atol=1e-4, rtol=1e-4, msg=name)


def test_gradients_and_negatives_are_those_of_the_whole_batch(recipe, tmp_path, monkeypatch):
    """The control arm takes negatives from the micro-batch alone, as the public code does under accumulation."""

    def one_step(name, size):
        settings = {"train.max_steps": 1, "train.batch_size": size, "train.accumulation": 4 // size}
        folder, seen = grown(recipe(**settings, **{"train.output_dir": tmp_path / name}), "pt", monkeypatch)
        return seen["gradients"], read_metrics(folder / "metrics.jsonl")

    whole, expected = one_step("whole", 4)
    parts, metrics = one_step("parts", 1)
    assert_close(losses(metrics), losses(expected), 1e-5)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name

    original = task.embedding_loss_sums

    def own_alone(predictions, targets, labels, valid, targets_valid, scale, **options):
        own = torch.arange(len(labels))
        return original(predictions, targets[labels], own, valid, targets_valid[labels], scale, **options)

    monkeypatch.setattr(task, "embedding_loss_sums", own_alone)
    _, (control,) = one_step("control", 1)
    assert control["loss/depth/2/contrastive"] == pytest.approx(0.0, abs=1e-6)  # one target to choose from
    assert expected[0]["loss/depth/2/contrastive"] > 0.5


def test_the_newest_checkpoints_are_kept(recipe):
    folder, _ = run(recipe(**{"train.max_steps": 5, "train.save_every": 1, "train.keep": 2}))
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("stage", ["pt", "ift"])
@pytest.mark.parametrize("epochs", [1, 4])  # resumed within the schedule, and beyond it
def test_resume_is_bit_for_bit(recipe, ift_json, stage, epochs, tmp_path):
    common = {"train.epochs": epochs}
    if stage == "ift":
        pt, _ = run(recipe(**{"train.max_steps": 1, "train.output_dir": tmp_path / "start"}))
        common |= {"init.from": pt, "data.file": ift_json}
    whole, expected = run(recipe(stage, **common, **{"train.max_steps": 6, "train.output_dir": tmp_path / "a"}), stage)
    for steps in (2, 4, 6):  # resumed twice, and in the second epoch
        half, metrics = run(
            recipe(stage, **common, **{"train.max_steps": steps, "train.output_dir": tmp_path / "b"}), stage
        )
        assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    name = "adapter.safetensors" if stage == "pt" else "model.safetensors"
    assert (half / name).read_bytes() == (whole / name).read_bytes()
    assert losses(metrics) == losses(expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_finishes(recipe, tmp_path, number):
    stopped = recipe(**{"train.max_steps": 60, "data.workers": 2, "train.output_dir": tmp_path / "stopped"})
    (tmp_path / "recipe.json").write_text(json.dumps(stopped.to_dict()))
    command = [sys.executable, "-m", "olavlm.pipelines.train", "pt", "--config", str(tmp_path / "recipe.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on it, and this process has one thread
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, number)  # as Ctrl-C and schedulers do: the loaders get it too
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"stopped by {number.name} after step" in errors
    assert "Traceback" not in errors
    done = len(read_metrics(tmp_path / "stopped" / "metrics.jsonl"))
    assert 2 <= done < 60
    shorter = {"train.max_steps": done + 1}  # the schedule's length is that of the epochs and of the longer of the two
    resumed, metrics = run(recipe(**{**shorter, "train.epochs": 20, "train.output_dir": tmp_path / "stopped"}))
    whole, expected = run(recipe(**{**shorter, "train.epochs": 20, "train.output_dir": tmp_path / "whole"}))
    assert losses(metrics) == losses(expected)
    assert (resumed / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot ask to die with its parent")
def test_loaders_die_with_a_killed_trainer(recipe, tmp_path):
    """They are full of loaded batches that nobody will take: left alone, they would wait for ever."""
    made = recipe(**{"train.max_steps": 500, "data.workers": 2})
    (tmp_path / "recipe.json").write_text(json.dumps(made.to_dict()))
    command = [sys.executable, "-m", "olavlm.pipelines.train", "pt", "--config", str(tmp_path / "recipe.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    trainer = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert any(line.startswith("step 2/") for line in trainer.stdout)
        loaders = [int(p) for p in Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()]
        assert len(loaders) == 2
        descriptors = [os.pidfd_open(loader) for loader in loaders]
        trainer.kill()
        trainer.wait()
        for descriptor in descriptors:  # readable when the process has ended
            assert select.select([descriptor], [], [], 20)[0], "a loader outlived its trainer"
            os.close(descriptor)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
        trainer.stdout.close()


def test_a_loader_whose_trainer_is_dead_already_ends_at_once():
    """The trainer may be killed between the fork of a loader and the loader's wish to die with it."""

    def loader():
        os.getppid = lambda: 1
        _leave_signals_to_the_trainer(0)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=loader)
    process.start()
    process.join(60)
    assert process.exitcode == 1


def test_a_finished_run_is_not_trained_again(recipe):
    folder, metrics = run(recipe(**{"train.max_steps": 2}))
    before = (folder / "adapter.safetensors").read_bytes()
    _, again = run(recipe(**{"train.max_steps": 2}))
    assert again == metrics
    assert (folder / "adapter.safetensors").read_bytes() == before


def test_a_run_of_more_steps_is_not_called_finished(recipe):
    folder, _ = run(recipe(**{"train.max_steps": 3}))
    before = {name: (folder / name).read_bytes() for name in ("stage.json", "recipe.yaml", "adapter.safetensors")}
    with pytest.raises(TrainingError) as error:
        run(recipe(**{"train.max_steps": 2}))
    assert str(error.value) == (
        f"{folder} holds step 3, and this run ends at step 2: set train.max_steps to 3 or more, or use another output "
        "folder"
    )
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_another_recipe_does_not_resume_a_run(recipe):
    run(recipe(**{"train.max_steps": 1}))
    for changed, keys in (
        ({"train.lr": 0.5}, r"train\.lr was 0\.\d+, here 0\.5\); go back to that"),
        ({"train.lr": 0.5, "train.seed": 7, "train.epochs": 9, "train.warmup": 0.5}, r"train\..*; and 1 more\)"),
    ):
        with pytest.raises(TrainingError, match=rf"a run of another recipe \({keys}"):
            run(recipe(**{"train.max_steps": 2, **changed}))


def test_another_global_batch_does_not_resume_a_run(recipe):
    run(recipe(**{"train.max_steps": 1, "train.batch_size": 2, "train.accumulation": 2}))
    with pytest.raises(TrainingError, match="batches of 4 samples, and this launch makes 2: choose train"):
        run(recipe(**{"train.max_steps": 2, "train.batch_size": 2, "train.accumulation": 1}))
    run(recipe(**{"train.max_steps": 2, "train.batch_size": 1, "train.accumulation": 4}))


def test_other_samples_in_the_same_file_do_not_resume_a_run(recipe, pt_json, tmp_path):
    """Without one sample every epoch is another permutation: a fifth would be seen twice, and a fifth never."""
    file = tmp_path / "pt.json"
    file.write_bytes(pt_json.read_bytes())
    run(recipe(**{"train.max_steps": 1, "data.file": file}))
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    with pytest.raises(TrainingError, match="a run on other samples: what its dataset files say has changed"):
        run(recipe(**{"train.max_steps": 2, "data.file": file}))
    file.write_text(json.dumps(json.loads(pt_json.read_text()), indent=3))
    _, metrics = run(recipe(**{"train.max_steps": 2, "data.file": file}))
    assert [line["step"] for line in metrics] == [1, 2]


def test_features_of_another_teacher_do_not_resume_a_run(recipe, small_targets, monkeypatch):
    run(recipe(**{"train.max_steps": 1}))
    opened = trainer_module.open_targets

    def filled_anew(*arguments):
        source = opened(*arguments)
        source.cards = {name: {**card, "fingerprint": "0" * 64} for name, card in source.cards.items()}
        return source

    monkeypatch.setattr(trainer_module, "open_targets", filled_anew)
    with pytest.raises(TrainingError, match="a run on other features: the store was filled anew by other teachers"):
        run(recipe(**{"train.max_steps": 2}))


@pytest.mark.parametrize("name", ["optimizer.pt", "trained.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit", "removed"])
def test_a_damaged_checkpoint_is_not_resumed(recipe, name, damage):
    folder, _ = run(recipe(**{"train.max_steps": 1}))
    file = folder / "checkpoints" / "step-000001" / name
    whole = file.read_bytes()
    at = len(whole) // 2  # of tensors: both formats load another number there without a word
    flipped = whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :]
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[:at], "emptied": b"", "one bit": flipped}[damage])
    with pytest.raises(TrainingError) as error:
        run(recipe(**{"train.max_steps": 2}))
    if (name, damage) != ("state.json", "one bit"):  # which may have made it another recipe's
        assert f"step-000001 is damaged ({name}" in str(error.value)
        assert "remove it to resume from the one before" in str(error.value)
    file.write_bytes(whole)
    _, metrics = run(recipe(**{"train.max_steps": 2}))
    assert [line["step"] for line in metrics] == [1, 2]


def test_what_an_engine_writes_in_a_folder_of_its_own_is_checked_too(tmp_path):
    class Engine:
        accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)

        def trained(self):
            return {"weight": torch.ones(3)}

        def save_optimizer(self, folder: Path) -> None:
            (folder / "engine").mkdir()
            (folder / "engine" / "rank-0.pt").write_bytes(b"state")

    save_step(tmp_path, 7, Engine(), {}, 1)
    checkpoint, step = latest_step(tmp_path, {})
    assert step == 7
    check_files(checkpoint)
    (checkpoint / "engine" / "rank-0.pt").write_bytes(b"stale")
    with pytest.raises(TrainingError, match=r"is damaged \(engine/rank-0\.pt is not what was written\)"):
        check_files(checkpoint)


def test_a_damaged_line_of_metrics_is_left_out_on_resume(recipe):
    folder, _ = run(recipe(**{"train.max_steps": 2}))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n[1]\n{"step": "3"}\n{"loss\xff\n')
    _, metrics = run(recipe(**{"train.max_steps": 3}))
    assert [line["step"] for line in metrics] == [1, 2, 3]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_800, 1_000_000):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "identity": {}, "files": {}}))
    (tmp_path / "checkpoints" / "step-of-mine").mkdir()
    assert latest_step(tmp_path, {})[1] == 1_000_000


def test_processes_that_found_different_checkpoints_do_not_train(tmp_path):
    class Two:
        device = torch.device("cpu")

        def gather(self, step: torch.Tensor) -> torch.Tensor:
            return torch.cat([step, torch.tensor([0])])

    with pytest.raises(TrainingError, match=r"of steps \[0, 200\]: put the run folder on a file system that all"):
        check_agreed(200, tmp_path, Two())
    check_agreed(0, tmp_path, Two())


def test_losses_fall(recipe):
    """In pt the LLM is frozen, and random here: the text loss has little room, the embedding losses have more."""
    _, metrics = run(recipe(**{"train.epochs": 8, "train.lr": 3e-3}))
    first, last = (
        {n: sum(line[n] for line in part) / 4 for n in losses(metrics)[0]} for part in (metrics[:4], metrics[-4:])
    )
    assert last["loss/text"] < first["loss/text"] - 0.05
    for name in TERMS:
        if name.endswith("smooth_l1"):
            assert last[name] < 0.9 * first[name], name


def test_quarantined_rows_are_masked_and_counted(recipe, make_store, pt_json, tmp_path):
    """One image is broken for the extraction and whole for the training: its row trains text alone."""
    samples = json.loads(pt_json.read_text())
    images = tmp_path / "images"
    shutil.copytree(recipe().image_roots[0], images)
    victim = images / samples[0]["image"]
    good = victim.read_bytes()
    victim.write_bytes(b"")
    store = make_store("float32", images=images)
    assert FeatureStore(store)["depth"].failure(samples[0]["image"]).reason == "empty"
    victim.write_bytes(good)
    n = len(samples)
    whole_set = {"train.batch_size": n, "train.max_steps": 1, "targets.store": store}
    _, metrics = run(recipe(**whole_set, **{"data.images": images, "train.output_dir": tmp_path / "a"}))
    assert [metrics[0][f"valid/{t}"] for t in LAYERS] == [n - 1] * 3
    assert metrics[0]["bad_images"] == 0

    victim.write_bytes(b"")  # now the trainer cannot read it either: its text trains nothing
    _, masked = run(recipe(**whole_set, **{"data.images": images, "train.output_dir": tmp_path / "b"}))
    assert masked[0]["bad_images"] == 1
    assert 0 < masked[0]["supervised_tokens"] < metrics[0]["supervised_tokens"]


def times_smooth_l1(monkeypatch, factor):
    original = task.embedding_loss_sums

    def changed(*arguments, **options):
        smooth_l1, contrastive = original(*arguments, **options)
        return smooth_l1 * factor, contrastive

    monkeypatch.setattr(task, "embedding_loss_sums", changed)


def test_a_zero_embedding_loss_stops_the_run(recipe, monkeypatch):
    """The control: with the loss zeroed as the public code zeroed it, the guard speaks."""
    times_smooth_l1(monkeypatch, 0.0)
    with pytest.raises(TrainingError, match="exactly zero though the batch has valid targets"):
        run(recipe(**{"train.max_steps": 1}))


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(recipe, monkeypatch, pt_json):
    times_smooth_l1(monkeypatch, float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: .* is nan; samples of process 0: ") as error:
        run(recipe(**{"train.max_steps": 1}))
    assert any(s["id"] in str(error.value) for s in json.loads(pt_json.read_text()))


def test_an_adapter_comes_back_in_the_dtype_it_was_trained_on(recipe):
    folder, _ = run(recipe(**{"train.max_steps": 1, "model.dtype": "bfloat16", "train.mixed_precision": "bf16"}))
    for model in (load_checkpoint(folder)[0], OlaVLM.from_pretrained(folder)):
        assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.vision.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_checkpoint(folder, torch.float32)[0].llm.parameters()} == {torch.float32}


def test_adapter_builds_the_trained_model_again(recipe):
    folder, _ = run(recipe(**{"train.max_steps": 2}))
    model, _ = read_adapter(folder).build()
    weights = load_file(folder / "adapter.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert not any(name.startswith(("llm.", "vision.")) for name in weights)
    again = OlaVLM.from_pretrained(folder).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    generator, tokenizer = load_checkpoint(folder)
    assert isinstance(generator.answer(tokenizer, None, "Hello?", max_new_tokens=3), str)


def test_schedule_warms_up_and_falls_to_zero(recipe):
    made = recipe(**{"train.epochs": 10, "train.lr": 1.0, "train.warmup": 0.1})
    schedule = Schedule(made, steps_per_epoch=10)
    assert (schedule.total_steps, schedule.warmup_steps) == (100, 10)
    assert schedule.lr(0) == pytest.approx(0.1)
    assert schedule.lr(9) == schedule.lr(10) == pytest.approx(1.0)
    assert schedule.lr(55) == pytest.approx(0.5)
    assert 0 < schedule.lr(99) < 1e-3
    stopped = recipe(**{"train.epochs": 10, "train.lr": 1.0, "train.warmup": 0.1, "train.max_steps": 30})
    assert Schedule(stopped, 10).lr(29) == schedule.lr(29)


class TestRefusalBeforeAnyModelIsLoaded:
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        def start_model(*args):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(start, "start_model", start_model)

    def test_control(self, recipe):
        with pytest.raises(AssertionError, match="a model was loaded"):
            run(recipe())

    def test_store_that_does_not_exist(self, recipe, tmp_path):
        with pytest.raises(
            TargetsError, match=r"not a feature store.*olavlm-extract --teacher gen=.* --teacher depth="
        ):
            run(recipe(**{"targets.store": tmp_path / "none"}))

    def test_no_store(self, recipe):
        with pytest.raises(RecipeError, match=r"targets\.store is not set"):
            run(recipe(**{"targets.store": "null"}))

    def test_teacher_that_the_store_lacks(self, recipe, make_store, tiny):
        store = make_store("float16", teachers=("depth",))
        with pytest.raises(TargetsError) as error:
            run(recipe(**{"targets.store": store}))
        assert "lacks gen, seg (it has depth)" in str(error.value)
        assert f"olavlm-extract --teacher gen={tiny['gen']} --teacher seg={tiny['seg']} --data" in str(error.value)

    def test_card_of_another_recipe_and_geometry(self, recipe):
        with pytest.raises(TargetsError, match=r"'depth': recipe is 'mean4', the recipe wants 'last'.*--recipe last"):
            run(recipe(**{"tasks.depth.recipe": "last", "tasks.depth.key": "depth"}))
        with pytest.raises(TargetsError, match=r"lacks depth-last .*--recipe last --data"):
            run(recipe(**{"tasks.depth.recipe": "last"}))
        with pytest.raises(TargetsError, match=r"geometry is 'reference', the recipe wants 'pad'.*--geometry pad"):
            run(recipe(**{"targets.geometry": "pad", "model.geometry": "pad"}))
        with pytest.raises(TargetsError, match="'depth': name is 'depth', the recipe wants 'seg'"):
            run(recipe(**{"tasks.seg.key": "depth", "tasks.depth": "null", "tasks.gen": "null"}))

    def test_store_that_does_not_cover_the_dataset(self, recipe, pt_json, tmp_path, store32):
        more = json.loads(pt_json.read_text())
        more.append({**more[0], "id": "new", "image": "new.jpg"})
        (tmp_path / "more.json").write_text(json.dumps(more))
        with pytest.raises(TargetsError, match=r"1 of its 11 images .first: 'new.jpg'. are not in the plan.*extract"):
            run(recipe(**{"data.file": tmp_path / "more.json"}))

    def test_unfinished_store(self, recipe, store32, tmp_path):
        store = tmp_path / "half"
        shutil.copytree(store32, store)
        next((store / "seg" / "commits").glob("000001.*")).unlink()
        with pytest.raises(
            TargetsError, match=r"4 of its 10 images have no 'seg' features yet.*--teacher seg=.* --dtype float32 "
        ):
            run(recipe(**{"targets.store": store}))
        assert StoreBuilder(store).plan().num_images == 10

    def test_ift_without_a_start(self, recipe):
        made = recipe("ift")
        with pytest.raises(AssertionError, match="a model was loaded"):
            run(made, "ift")
