"""How gradients, optimizer and launch settings are handled, in one process."""

from types import SimpleNamespace

import pytest
import torch

from olavlm.student import RecipeError
from olavlm.student.config import TrainConfig
from olavlm.student.training.parallel import Replicated, Sharded, make_optimizer
from olavlm.student.training.zero import Zero, engine_settings


@pytest.fixture
def settings():
    return TrainConfig(output_dir="unused", lr=0.1, batch_size=4, accumulation=2, max_grad_norm=0.5)


class Two(torch.nn.Module):
    """A matrix and a scalar."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(2, 2))
        self.scalar = torch.nn.Parameter(torch.tensor(0.0))


def test_gradients_are_clipped_by_their_common_norm():
    parallel = Replicated.__new__(Replicated)
    parallel.model = Two()
    parallel.model.matrix.grad = torch.tensor([[2.0, 4.0], [0.0, 4.0]])
    parallel.model.scalar.grad = torch.tensor(8.0)
    assert parallel.clip_gradients(5.0) == pytest.approx(10.0)  # sqrt(4 + 16 + 16 + 64)
    torch.testing.assert_close(parallel.model.matrix.grad, torch.tensor([[1.0, 2.0], [0.0, 2.0]]))
    torch.testing.assert_close(parallel.model.scalar.grad, torch.tensor(4.0))
    assert parallel.clip_gradients(20.0) == pytest.approx(5.0)
    torch.testing.assert_close(parallel.model.scalar.grad, torch.tensor(4.0))  # below the norm: as it was


def test_scalars_are_a_group_of_their_own_and_what_is_frozen_is_in_none(settings):
    model = Two()
    groups = make_optimizer(model, settings, torch.device("cpu")).param_groups
    assert [group["params"] for group in groups] == [[model.matrix], [model.scalar]]
    assert all(group["lr"] == 0.1 for group in groups)
    model.scalar.requires_grad_(False)
    (group,) = make_optimizer(model, settings, torch.device("cpu")).param_groups
    assert group["params"] == [model.matrix]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("FSDP_VERSION", "1", "fsdp_version is 1"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "set it to false")],
)
def test_fsdp_settings_that_cannot_work_are_refused(settings, monkeypatch, name, value, says):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=says):
        Sharded(Two(), SimpleNamespace(device=torch.device("cpu")), settings)


class Engine:
    """Notes what a DeepSpeed engine is asked for."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, []

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.calls.append(f"boundary {is_boundary}")

    def backward(self, loss):
        self.calls.append(f"backward {float(loss)}")

    def step(self):
        self.calls.append("step")

    def get_global_grad_norm(self):
        return 7.0 if "step" in self.calls else None


def zero(settings, stage):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"gradient_accumulation_steps": "auto"})
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin),
        device=torch.device("cpu"),
        num_processes=2,
        prepare=lambda model, optimizer: (Engine(optimizer), optimizer),
    )
    return Zero(Two(), accelerator, settings), plugin.deepspeed_config


def test_zero_updates_once_a_step_after_the_last_micro_batch(settings):
    parallel, config = zero(settings, 2)
    assert config == engine_settings(settings)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (1, 0.5)
    for last in (False, True):
        with parallel.micro_batch(last):
            parallel.backward(torch.tensor(3.0), last)
    assert parallel.update(0.5) == 7.0
    assert parallel.module.calls == ["boundary False", "backward 6.0", "boundary True", "backward 6.0", "step"]


def test_zero_with_weights_in_parts_is_refused(settings):
    with pytest.raises(RecipeError, match="zero_stage is 3: use 1 or 2, or shard the weights too with fsdp"):
        zero(settings, 3)


def test_zero_without_an_accelerator_is_refused(settings):
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    with pytest.raises(RecipeError, match="DeepSpeed on no CPU; launch with the configuration ddp or fsdp"):
        Zero(Two(), accelerator, settings)
