"""Pictures during training: of samples that are not trained on, without a trace in the run, the same after a resume."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.cache import Dataset, ImageRoots
from olavlm.student import RecipeError, TargetsError
from olavlm.student.training import pictures as module
from olavlm.student.training import trainer
from olavlm.student.training.metrics import TensorBoard, read_metrics
from olavlm.student.training.pictures import PictureTracker, evaluating, held_out, local_decoders
from olavlm.student.training.trainer import train

DRAWN = {"train.pictures_every": 2, "train.pictures": 2, "data.fraction": 0.6, "train.batch_size": 2}
DEPTH_ALONE = {"tasks.seg.model": "null"}  # is decoded


def run(recipe, **overrides):
    folder = train(recipe(**{"train.max_steps": 4, "data.fraction": 0.6, "train.batch_size": 2, **overrides}), "pt", {})
    lines = read_metrics(folder / "metrics.jsonl")
    return folder, [{k: v for k, v in line.items() if not k.endswith("_ms")} for line in lines]


def files(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.png"))}


@pytest.fixture
def taken(monkeypatch):
    """What a tracker of the runs is given: {step: names}."""
    seen = {}

    class Tracker:
        def log(self, step, values):
            pass

        def log_pictures(self, step, pictures):
            seen[step] = {name: picture.size for name, picture in pictures.items()}

        def close(self):
            pass

    opened = trainer.open_trackers
    monkeypatch.setattr(trainer, "open_trackers", lambda *arguments: [*opened(*arguments), Tracker()])
    return seen


def test_they_leave_no_trace_and_a_resumed_run_draws_the_same(recipe, tmp_path, taken):
    _, without = run(recipe, **DEPTH_ALONE, **{"train.output_dir": tmp_path / "without"})
    assert taken == {}
    drawn, values = run(recipe, **DRAWN, **DEPTH_ALONE, **{"train.output_dir": tmp_path / "drawn"})
    assert values == without  # to the last bit
    pictures = files(drawn / "pictures")
    names = [name.removesuffix(".png") for name in pictures]
    assert {name.partition("/")[0] for name in names} == {"step-000002", "step-000004"}
    assert len(pictures) == 4
    assert {step: sorted(f"step-{step:06d}/{name}" for name in given) for step, given in taken.items()} == {
        2: names[:2],
        4: names[2:],
    }
    resumed = recipe(**DRAWN, **DEPTH_ALONE, **{"train.output_dir": tmp_path / "resumed", "train.max_steps": 2})
    train(resumed, "pt", {})
    assert len(files(tmp_path / "resumed" / "pictures")) == 2
    run(recipe, **DRAWN, **DEPTH_ALONE, **{"train.output_dir": tmp_path / "resumed"})
    assert files(tmp_path / "resumed" / "pictures") == pictures
    first, last = (pictures[f"{name}.png"] for name in (names[0], names[2]))
    assert first != last  # the predictors learnt something in between


def test_a_sheet_has_a_row_a_task_and_one_for_each_decoder(recipe, tmp_path, taken):
    """gen; depth and seg, each with a decoded row; across: photograph, target, two layers."""
    run(recipe, **DRAWN, **{"train.max_steps": 2})
    bare = {f"tasks.{name}.model": "null" for name in ("depth", "seg")}
    (size,) = set(taken[2].values())
    run(recipe, **DRAWN, **bare, **{"train.max_steps": 2, "train.output_dir": tmp_path / "bare"})
    (bare_size,) = set(taken[2].values())
    row = 280 + 8 + 2 * 19 + 16
    assert size == (4 * (280 + 16) + 16, 5 * row + 16)
    assert bare_size == (size[0], 3 * row + 16)


def test_they_are_of_samples_that_are_not_trained_on(recipe, pt_json):
    drawn = held_out(recipe(**DRAWN), "pt")
    everything = Dataset([pt_json])
    trained, _ = trainer.open_data(recipe(**DRAWN))
    assert len(drawn) == 2
    assert {s.id for s in drawn} <= {s.id for s in everything} - {s.id for s in trained}
    named = held_out(recipe(**DRAWN | {"data.held_out": pt_json, "data.fraction": 1.0, "train.pictures": 3}), "pt")
    assert [s.image for s in named] == [everything[i].image for i in range(3)]
    assert held_out(recipe(**DRAWN | {"train.pictures_every": "null"}), "pt") is None
    assert held_out(recipe(**DRAWN, **{"losses.stages": "[]"}), "pt") is None


def test_a_run_that_trains_on_everything_is_asked_for_more(recipe, tmp_path, ift_json):
    with pytest.raises(RecipeError, match=r"trains on every sample: name a dataset file .* data\.held_out"):
        train(recipe(**DRAWN | {"data.fraction": 1.0}), "pt", {})
    (tmp_path / "other.json").write_text(
        '[{"id": "1", "image": "unknown.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, '
        '{"from": "gpt", "value": "That."}]}]'
    )
    with pytest.raises(TargetsError, match=r"olavlm-extract .*other\.json"):
        train(recipe(**DRAWN, **{"data.held_out": tmp_path / "other.json"}), "pt", {})
    with pytest.raises(RecipeError, match=r"train\.pictures_every is 0"):
        recipe(**DRAWN | {"train.pictures_every": 0})


def test_a_teacher_folder_without_a_decoder_is_refused_at_the_start(recipe, tiny, tmp_path):
    bare = shutil.copytree(tiny["seg"], tmp_path / "seg", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(TargetsError, match=r"train\.pictures_every, tasks\.seg\.model: .*tokenizer"):
        train(recipe(**DRAWN, **{"tasks.seg.model": bare, "train.max_steps": 2}), "pt", {})


def test_seg_is_not_decoded_on_a_part_of_the_photograph(recipe):
    square = {"targets.geometry": "square", "model.geometry": "square"}
    whole, part = (local_decoders(recipe(**DRAWN, **more), torch.device("cpu")) for more in ({}, square))
    assert (sorted(whole), sorted(part)) == (["depth", "seg"], ["depth"])


def test_drawing_does_not_change_what_counts_for_a_resume(recipe):
    other = recipe(**DRAWN, **{"data.held_out": "x.json"})
    assert other.hash() == recipe(**{"data.fraction": 0.6, "train.batch_size": 2}).hash()


def test_modes_are_as_they_were():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    network[1].eval()
    network[1][1].train()
    before = [part.training for part in network.modules()]
    assert len(set(before)) == 2
    with contextlib.suppress(KeyError), evaluating(network):
        assert not any(part.training for part in network.modules())
        raise KeyError
    assert [part.training for part in network.modules()] == before


def test_panels_of_what_cannot_be_drawn():
    target = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    broken = np.full_like(target, np.nan)
    assert len(module._colour_panels("depth", {"target": broken, "layer 2": target}, (4, 4))) == 1
    assert len(module._colour_panels("depth", {"target": target, "layer 2": broken}, (4, 4))) == 2


def test_tensorboard_takes_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path, 0)
    assert isinstance(tracker, PictureTracker)
    tracker.log_pictures(7, {"00-cat": Image.new("RGB", (5, 3), (9, 8, 7))})
    tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("pictures/00-cat")
    assert (event.step, event.width, event.height) == (7, 5, 3)


def test_photographs_that_are_gone_are_none(sample_images):
    assert module._open(ImageRoots([str(sample_images)]), "nothing.jpg") is None
