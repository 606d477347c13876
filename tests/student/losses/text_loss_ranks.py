"""Two ranks whose text loss has four chunks and one: run by `test_text_loss.py` under torch's launcher, with FSDP."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from olavlm.student.losses import text

POSITIONS, WIDTH, WORDS = (23, 5), 16, 50
CHUNK, ALL = 7 * WORDS, 10**9


class Model(nn.Module):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS).requires_grad_(not frozen)

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return text.text_loss_from_states(self.head, self.body(states), labels, WORDS)


def compare(frozen: bool) -> None:
    """Loss of this rank and gradients of both are those of a whole model and all logits at once."""
    sharded, whole = Model(frozen), Model(frozen)
    for unit in (sharded.head, sharded):
        fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    batches = [(torch.randn(n, WIDTH), torch.randint(0, WORDS, (n,))) for n in POSITIONS]
    text.CHUNK_LOGITS = ALL
    losses = [whole(*batch) for batch in batches]
    torch.stack(losses).sum().backward()
    text.CHUNK_LOGITS = CHUNK
    for _ in range(2):
        sharded.zero_grad()
        loss = sharded(*batches[dist.get_rank()])
        loss.backward()
    torch.testing.assert_close(loss.detach(), losses[dist.get_rank()].detach())
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert (ours.grad is None) is (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for head_is_frozen in (False, True):
        compare(head_is_frozen)
    dist.destroy_process_group()
