"""A micro-batch crosses from loader to trainer, and into pinned memory, as one buffer."""

import multiprocessing
import os
import pickle
import re
import resource
import signal
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from olavlm.student.data.batches import batches
from olavlm.student.data.micro_batch import MicroBatch
from olavlm.student.data.sampler import GlobalBatchSampler
from olavlm.student.data.shared_tensors import allocate, pack, unpack
from olavlm.student.errors import TrainingError
from olavlm.student.placement import Inserted, place

STEPS, SAMPLES = 6, 4
SHAPES = {
    "input_ids": ((SAMPLES, 3), torch.long),
    "labels": ((SAMPLES, 3), torch.long),
    "attention_mask": ((SAMPLES, 3), torch.long),
    "pixel_values": ((SAMPLES, 3, 100, 100), torch.float32),
    "complete": ((SAMPLES,), torch.bool),
    "targets": {"depth": {"features": ((SAMPLES, 5, 7), torch.int8), "scales": ((SAMPLES, 5), torch.float32)}},
    "encoder_features": {"features": ((SAMPLES, 5), torch.float16)},
}


def leaves(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        elif isinstance(value, torch.Tensor):
            yield "/".join((*path, name)), value


def tensors(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return dict(leaves({**vars(batch), "placement": batch.placement.tensors()}))


def collate(indices) -> MicroBatch:
    """Every item of a tensor is the sum of the samples' numbers and of the letters of its name."""
    ids = torch.arange(3).repeat(SAMPLES, 1) + sum(map(int, indices))
    placement = place(ids, torch.ones_like(ids), ids, Inserted(-1, 3, 0, 0), None)
    room = allocate({**SHAPES, "placement": placement.tensors()})
    for name, tensor in leaves({key: room[key] for key in SHAPES}):
        tensor.fill_((sum(map(int, indices)) + sum(map(ord, name))) % 100)
    placed = {**room, "placement": replace(placement, **room["placement"])}
    return MicroBatch(**placed, ids=[str(i) for i in indices], images=[None] * SAMPLES, bad_images=[])


def assert_same(ours: MicroBatch, theirs: MicroBatch) -> None:
    assert tensors(ours).keys() == tensors(theirs).keys()
    for name, tensor in tensors(theirs).items():
        assert tensor.dtype == tensors(ours)[name].dtype, name
        assert torch.equal(tensor, tensors(ours)[name]), name
    assert (ours.ids, ours.images, ours.bad_images) == (theirs.ids, theirs.images, theirs.bad_images)


def loading(collator, workers=1):
    sampler = GlobalBatchSampler(has_image=np.zeros(STEPS * SAMPLES, bool), global_batch_size=SAMPLES, seed=0)
    order = [[int(i) for i in sampler.slices(step, 0, 1, 1)[0]] for step in range(STEPS)]
    steps = batches(
        collator, sampler, range(STEPS), rank=0, world_size=1, accumulation=1, workers=workers, pin_memory=False
    )
    return steps, order


@pytest.mark.parametrize(
    "shapes",
    [
        SHAPES,
        {"odd": ((3,), torch.bool), "then": ((2, 2), torch.float64), "none": ((0, 4), torch.int8)},
        {"scalar": ((), torch.float16)},
        {},
    ],
)
def test_tensors_lie_side_by_side_in_one_buffer(shapes):
    room = allocate(shapes)
    for number, (_, tensor) in enumerate(leaves(room)):
        tensor.fill_(number)
    found = dict(leaves(room))
    for number, tensor in enumerate(found.values()):
        assert torch.equal(tensor, torch.full_like(tensor, number)), "they overlap"
        assert tensor.numel() == 0 or tensor.data_ptr() % tensor.element_size() == 0
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        name: shape for name, shape in _flat(shapes)
    }
    buffer, content = pack({**room, "text": "x"})
    assert all(t.untyped_storage().data_ptr() == buffer.data_ptr() for t in found.values() if t.numel())
    for name, tensor in leaves(unpack(buffer.clone(), content)):
        assert torch.equal(tensor, found[name])


def _flat(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, name))
        else:
            yield "/".join((*path, name)), value


def test_tensors_of_several_buffers_are_copied_into_one():
    whole = collate([1, 2, 3, 4])
    masked = whole.without(torch.tensor([True, False, False, False]))
    again = pickle.loads(pickle.dumps(masked))
    assert_same(again, masked)
    assert len({t.untyped_storage().data_ptr() for t in tensors(again).values()}) == 1
    assert not torch.equal(again.labels, whole.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_loader_writes_is_what_the_trainer_reads(workers):
    loader, order = loading(collate, workers)
    with loader as steps:
        for (batch,), indices in zip(steps, order, strict=True):
            assert_same(batch, collate(indices))
            assert all(tensor.is_shared() == bool(workers) for tensor in tensors(batch).values())
            assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(batch).values()}) == 1


def test_nothing_of_its_tensors_is_pickled_and_a_batch_takes_one_descriptor():
    with loading(collate)[0] as steps:
        first = next(steps)
        assert len(ForkingPickler.dumps(first[0])) < 4096 < first[0].pixel_values.nbytes
        before = len(list(Path("/proc/self/fd").iterdir()))
        held = list(steps)
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= len(held)


def test_it_is_pinned_by_one_copy_as_the_loader_asks_for_it(monkeypatch):
    """By the loader's own function; there need not be a device."""
    pinned = []

    def pin(tensor, device=None):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = collate([3, 1, 4, 1])
    result = pin_memory(batch)
    assert_same(result, batch)
    (buffer,) = pinned
    assert {t.untyped_storage().data_ptr() for t in tensors(result).values()} == {buffer.data_ptr()}


class TestTrouble:
    @pytest.mark.parametrize(
        ("limit", "message"),
        [
            (resource.RLIMIT_FSIZE, r"no shared memory for a micro-batch of 0 MB .* MB left: give the container more"),
            (resource.RLIMIT_NOFILE, r"too many files open .* raise the limit \(ulimit -n\), or lower data.workers"),
        ],
    )
    def test_a_buffer_that_cannot_be_had(self, monkeypatch, limit, message):
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "as in a loader process")
        allocate(SHAPES)  # the control
        before = resource.getrlimit(limit)
        resource.setrlimit(limit, (3, before[1]))
        try:
            with pytest.raises(TrainingError) as error:
                allocate(SHAPES)
        finally:
            resource.setrlimit(limit, before)
        assert re.search(message, str(error.value))

    @pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
    def test_a_loader_that_dies(self, number):
        """The trainer says what may be the reason, and no file stays in shared memory."""
        before = set(Path("/dev/shm").glob("torch_*"))
        steps, _ = loading(lambda indices: (collate(indices), os.kill(os.getpid(), number)))
        message = r"a loader process died \(.*\), perhaps for lack of memory: .* MB"
        with pytest.raises(TrainingError, match=message), steps as loaded:
            next(loaded)
        assert set(Path("/dev/shm").glob("torch_*")) <= before

    def test_a_loader_that_waits_for_a_disk_does_not_outlive_the_batches(self, monkeypatch):
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds that it is given to end
        waits = multiprocessing.get_context("fork").Event()
        steps, _ = loading(lambda indices: (waits.set(), signal.pause()))
        with steps:
            assert waits.wait(60)
            (loader,) = multiprocessing.active_children()
        loader.join(60)
        assert loader.exitcode == -signal.SIGKILL

    def test_an_error_of_ours_is_not_called_a_death(self, monkeypatch):
        def wrong(*args, **options):
            raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")  # as the library passes it on
            yield

        monkeypatch.setattr("olavlm.student.data.batches.DataLoader", wrong)
        steps, _ = loading(collate, workers=0)
        with pytest.raises(RuntimeError, match="Caught") as error, steps as loaded:
            next(loaded)
        assert not isinstance(error.value, TrainingError)
