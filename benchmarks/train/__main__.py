"""Measures one optimizer step of PT without distillation, with cached targets and with teachers in the loop.

    python -m benchmarks.train                                  shapes of SmolLM2-135M, 15 minutes on two cores
    python -m benchmarks.train --size tiny                      a look, half a minute
    python -m benchmarks.train --size paper --name my-gpu       Llama-3-8B, one GPU of 80 GB or more

Run it from the repository's root. Weights are random; no hub, no Ray, no checkpoint is needed. `--name` keeps the
figures as results/NAME.json, and writes README.md and docs/break-even.md anew.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import harness
from ..machine import describe
from . import arithmetic, data, memory, page, step
from .scene import make_scene
from .sizes import SIZES

BENCHMARKS = {"memory": memory.measure, "step": step.measure, "data": data.measure, "arithmetic": arithmetic.measure}
"""Memory first: on a GPU its processes need all of it."""
PACKAGES = ("torch", "transformers", "accelerate", "pillow")
FOLDER = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments("benchmarks.train", __doc__, BENCHMARKS, SIZES, FOLDER, default="small")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = harness.parsed(parser, argv, BENCHMARKS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device not in ("auto", device):
        parser.error(f"--device {args.device}: the trainer takes {device} here; CUDA_VISIBLE_DEVICES= hides a GPU")
    if SIZES[args.size].needs_gpu and device == "cpu":
        parser.error(f"--size {args.size} needs a GPU: it is 16 GB of bfloat16 weights; take --size small")
    machine = describe(args.dir, PACKAGES)
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    with TemporaryDirectory(prefix=".benchmark.", dir=args.dir) as shared:
        scene = cache(lambda: make_scene(Path(shared).absolute(), args.size))

        def measured(work, _folder: Path) -> list:
            return work(scene(), device)

        harness.measure(args, {name: partial(measured, work) for name, work in BENCHMARKS.items()}, machine)
    if args.name and args.results == FOLDER:
        page.write()


if __name__ == "__main__":
    main()
