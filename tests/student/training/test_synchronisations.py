"""What makes the host wait for the device, counted by the operators that a CPU has too.

A copy to the host (`cpu`, `tolist`) leaves no trace here; on CUDA `torch.cuda.set_sync_debug_mode` finds those.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from olavlm.student.training.step import OptimizerStep
from olavlm.student.training.trainer import train

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2)


class Waits(TorchDispatchMode):
    """Counts operators whose result, or its shape, the host must read: `item`, `bool`, `nonzero`, indexing by bool."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_bool = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in WAITS or by_bool:
            self.count[str(packet)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: float(x[0]),
    ],
)
def test_the_meter_moves(function):
    with Waits() as waits:
        function(torch.arange(3.0))
    assert sum(waits.count.values()) == 1


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_wait_for_nothing(recipe, monkeypatch, packing):
    """Up to the one fetch of all metrics. The library's own mask asks once a forward whether samples are packed."""
    waits, micro_batches, checked = Waits(), [], []
    step, check = OptimizerStep.__call__, OptimizerStep._check

    def counted(self, number, batches):
        micro_batches.extend(batches)
        waits.__enter__()
        return step(self, number, batches)

    def at_the_fetch(self, *args):
        waits.__exit__(None, None, None)
        checked.append(args)
        return check(self, *args)

    monkeypatch.setattr(OptimizerStep, "__call__", counted)
    monkeypatch.setattr(OptimizerStep, "_check", at_the_fetch)
    train(
        recipe(**{"train.max_steps": 1, "train.batch_size": 2, "train.accumulation": 3, "model.packing": packing,
                  "train.gradient_checkpointing": False}), "pt", {"test": "1"},
    )  # fmt: skip
    assert len(micro_batches) == 3
    assert len(checked) == 1
    library = 0 if packing else len(micro_batches)
    assert dict(waits.count) == ({"aten._local_scalar_dense": library} if library else {})
