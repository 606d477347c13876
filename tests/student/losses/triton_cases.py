"""Embedding losses by the Triton kernels beside the eager ones, in a process of its own for the interpreter.

TRITON_INTERPRET=1 python tests/student/losses/triton_cases.py     prints the largest deviation of each case, as JSON
"""

import json
from dataclasses import dataclass

import torch

from olavlm.student.losses.embedding import embedding_loss_sums
from olavlm.student.losses.scaled_features import ScaledFeatures


@dataclass(frozen=True)
class Case:
    """Shapes that fill blocks and shapes that do not."""

    b: int
    m: int
    n: int
    dim: int
    predictions: torch.dtype = torch.float32
    targets: torch.dtype = torch.float16
    contiguous: bool = True

    def deviation(self, device: str) -> float:
        """The largest of values and gradients, relative to the largest value of their kind.

        A third of the targets is not valid and NaN; the last row has a target and does not count.
        """
        torch.manual_seed(self.b * self.m + self.dim)
        source = torch.randn(2, self.b, self.n, self.dim, device=device)
        targets = torch.randn(self.m, self.n, self.dim, device=device)
        labels = torch.randperm(self.m, device=device)[: self.b]
        valid = torch.arange(self.m, device=device) % 3 != 1
        valid[labels[0]] = True
        targets[labels[0]] += 0.5 * source[0, 0]  # a cosine that is not about zero
        if self.targets == torch.int8:
            scales = targets.abs().amax(dim=-1) / 127
            values = (targets / scales[..., None]).round().to(torch.int8)
            scales[~valid] = torch.nan
            given = ScaledFeatures(values, scales)
        else:
            given = targets.to(self.targets)
            given[~valid] = torch.nan
        rows = torch.arange(self.b, device=device) < max(1, self.b - 1)
        found = {}
        for kernels in ("eager", "triton"):
            leaf = source.to(self.predictions, copy=True).requires_grad_()
            scale = torch.tensor(2.0, device=device, requires_grad=True)
            layers = [layer * 2 for layer in leaf]
            if not self.contiguous:
                layers = [layer.transpose(1, 2).contiguous().transpose(1, 2) for layer in layers]
            sums = embedding_loss_sums(layers, given, labels, rows, valid, scale, kernels=kernels, overwrite=True)
            (sums[0] + 0.3 * sums[1]).sum().backward()
            found[kernels] = [*sums, leaf.grad, scale.grad]
        worst = 0.0
        for ours, theirs in zip(found["triton"], found["eager"], strict=True):
            assert ours.isfinite().all()
            assert ours.dtype == theirs.dtype
            ours, theirs = ours.detach().double(), theirs.detach().double()
            worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item())
        return worst


CASES = {
    "blocks filled": Case(16, 64, 2, 64),
    "nothing filled": Case(3, 5, 3, 5),
    "several blocks": Case(35, 70, 3, 100),
    "int8": Case(4, 70, 5, 24, targets=torch.int8),
    "int8, several blocks": Case(33, 65, 3, 72, targets=torch.int8),
    "float32": Case(4, 6, 2, 40, targets=torch.float32),
    "bfloat16 targets": Case(4, 6, 2, 40, targets=torch.bfloat16),
    "bfloat16 predictions": Case(4, 6, 2, 40, predictions=torch.bfloat16),
    "not contiguous": Case(4, 6, 3, 40, contiguous=False),
}

if __name__ == "__main__":
    from olavlm.student.losses import triton_kernels

    triton_kernels._PROGRAMS = 3  # so that each goes through several blocks of features, and the last through fewer
    torch.set_num_threads(1)
    print(json.dumps({name: case.deviation("cpu") for name, case in CASES.items()}))
