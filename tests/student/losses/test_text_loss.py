"""The text loss from states, in chunks: that of all logits at once, in values, gradients and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from olavlm.student.losses import text
from olavlm.student.losses.text import chunk_rows, text_loss_from_states, text_loss_sum
from olavlm.student.training.live_bytes import LiveBytes

WIDTH, WORDS, POSITIONS = 16, 50, 23


class LowRank(nn.Module):
    """A head with an update, as LoRA makes one."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WORDS, bias=False)
        self.base_layer.weight.requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WORDS, bias=False)

    def forward(self, states):
        return self.base_layer(states) + self.b(self.a(states))


HEADS = {
    "plain": lambda: nn.Linear(WIDTH, WORDS, bias=False),
    "with a bias": lambda: nn.Linear(WIDTH, WORDS),
    "with an update": LowRank,
    "frozen": lambda: nn.Linear(WIDTH, WORDS).requires_grad_(False),
}


def outcome(loss, states, *modules):
    states = states.clone().requires_grad_()
    for module in modules:
        module.zero_grad()
    loss(states).backward()
    return [loss(states).detach(), states.grad, *(p.grad for m in modules for p in m.parameters() if p.requires_grad)]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 7, 22, 23])
def test_chunks_give_the_loss_and_gradients_of_all_at_once(monkeypatch, name, rows):
    torch.manual_seed(0)
    head, states, labels = HEADS[name](), torch.randn(POSITIONS, WIDTH), torch.randint(0, WORDS, (POSITIONS,))
    wanted = outcome(lambda x: text_loss_sum(head(x), labels), states, head)
    monkeypatch.setattr(text, "CHUNK_LOGITS", rows * WORDS)
    assert chunk_rows(WORDS) == rows
    found = outcome(lambda x: text_loss_from_states(head, x, labels, WORDS), states, head)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert "forward" not in vars(head), "as it was"


def test_embeddings_that_are_tied_get_both_gradients(monkeypatch):
    torch.manual_seed(0)
    embed, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
    head.weight = embed.weight
    ids, labels = torch.randint(0, WORDS, (POSITIONS,)), torch.randint(0, WORDS, (POSITIONS,))
    gradients = []
    for rows in (POSITIONS, 5):
        monkeypatch.setattr(text, "CHUNK_LOGITS", rows * WORDS)
        embed.zero_grad()
        text_loss_from_states(head, embed(ids).tanh(), labels, WORDS).backward()
        gradients.append(embed.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [7, POSITIONS])
def test_the_head_is_called_once_whatever_the_chunks(monkeypatch, rows):
    """A wrapper that gathers weights by hooks does so once, on every rank alike; the hooks see the whole call."""
    monkeypatch.setattr(text, "CHUNK_LOGITS", rows * WORDS)
    head, calls = nn.Linear(WIDTH, WORDS), []
    head.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    text_loss_from_states(head, torch.randn(POSITIONS, WIDTH), torch.zeros(POSITIONS, dtype=torch.long), WORDS)
    assert calls == [POSITIONS]


def test_ranks_with_other_numbers_of_chunks_do_not_wait_for_each_other():
    program = Path(__file__).with_name("text_loss_ranks.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, program], capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_no_position_is_exactly_zero_with_a_graph():
    head = nn.Linear(WIDTH, WORDS)
    states = torch.zeros(0, WIDTH, requires_grad=True)
    loss = text_loss_from_states(head, states, torch.zeros(0, dtype=torch.long), WORDS)
    loss.backward()
    assert loss.item() == 0
    assert (head.weight.grad == 0).all()


def test_memory_is_that_of_one_chunk(monkeypatch):
    """Logits, their softmax and its gradient: at most four times those of a chunk, against as much of all positions."""
    head, labels = nn.Linear(WIDTH, 1000, bias=False), torch.zeros(256, dtype=torch.long)
    head.weight.grad = torch.zeros_like(head.weight)
    peaks = {}
    for rows in (32, 256):
        monkeypatch.setattr(text, "CHUNK_LOGITS", rows * 1000)
        states = torch.randn(256, WIDTH, requires_grad=True)
        with LiveBytes() as live:
            text_loss_from_states(head, states, labels, 1000).backward()
        peaks[rows] = live.peak
    weights = 2 * head.weight.numel() * 4  # their gradient of a chunk, and the sum
    assert peaks[256] > 2 * 256 * 1000 * 4
    assert peaks[32] < 4 * 32 * 1000 * 4 + weights + 5 * 256 * WIDTH * 4
