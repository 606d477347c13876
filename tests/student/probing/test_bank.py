"""A bank of probes: its sizes, what each starts from, what it reads, and how it is kept."""

import json

import pytest
import torch

from olavlm.student.errors import ModelError
from olavlm.student.probing.bank import ProbeBank, ProbedTeacher, ProbeRun
from olavlm.student.tokens import TaskSpec

PAPER = {"gen": (1, 1024), "seg": (576, 1536), "depth": (576, 1024)}


def specs(*layers, names=("gen", "grid")):
    shapes = {"gen": (1, 8), "grid": (4, 6)}
    return [TaskSpec(name, *shapes[name], layers) for name in names]


def test_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        bank = ProbeBank([TaskSpec(name, *shape, (1, 32)) for name, shape in PAPER.items()], 4096)
    assert bank.sizes() == {"gen": 7_875_584, "seg": 15_055_872, "depth": 8_464_384}  # of Llama-3
    assert sum(p.numel() for p in bank.parameters()) == 2 * sum(bank.sizes().values())


def test_a_probe_starts_the_same_whatever_stands_beside_it():
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    whole, alone = ProbeBank(specs(1, 2, 5), 16, seed=4), ProbeBank(specs(5, names=["grid"]), 16, seed=4)
    assert torch.equal(torch.rand(3), drawn), "the draws of others are not its own"
    other = ProbeBank(specs(5, names=["grid"]), 16, seed=5)
    for name, parameter in alone.named_parameters():
        assert torch.equal(whole.get_parameter(name), parameter)
    assert not torch.equal(other.probes["grid_5"].latents, alone.probes["grid_5"].latents)
    assert not torch.equal(whole.probes["grid_5"].latents, whole.probes["grid_2"].latents)


def test_padding_is_not_read_and_everything_else_is():
    bank = ProbeBank(specs(2), 16)
    states = torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    before = bank("grid", 2, states, mask)
    assert before.shape == (2, 4, 6)
    changed = states.clone()
    changed[1, 3:] = 100.0
    assert torch.equal(bank("grid", 2, changed, mask), before)
    for position in range(5):
        changed = states.clone()
        changed[0, position] += 1.0
        assert not torch.allclose(bank("grid", 2, changed, mask)[0], before[0], atol=1e-4), position


def test_what_is_kept_is_what_is_loaded_or_said_to_be_damaged(tmp_path):
    bank = ProbeBank(specs(1, 3), 16)
    teachers = {"gen": ProbedTeacher("gen", {"fingerprint": "a"}), "grid": ProbedTeacher("mine", {"fingerprint": "b"})}
    run = ProbeRun(
        "m", "abc", None, "float32", {"width": 16, "task_tokens": []}, specs(1, 3), teachers, seed=0, steps=7
    )
    with pytest.raises(ModelError, match=r"holds no probes\.json; give the run folder of olavlm-probe train"):
        ProbeRun.load(tmp_path)
    run.save(tmp_path, bank)
    loaded = ProbeRun.load(tmp_path)
    assert loaded == run
    assert loaded.teachers["grid"].fingerprint == "b"
    for name, parameter in loaded.bank(tmp_path).named_parameters():
        assert torch.equal(parameter, bank.get_parameter(name))
    weights = tmp_path / "probes.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"probes\.safetensors is damaged"):
        loaded.bank(tmp_path)
    content = json.loads((tmp_path / "probes.json").read_text())
    (tmp_path / "probes.json").write_text(json.dumps({**content, "tasks": [{"name": "x"}]}))
    with pytest.raises(ModelError, match=r"probes\.json is damaged"):
        ProbeRun.load(tmp_path)
