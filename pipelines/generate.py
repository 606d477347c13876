"""olavlm-generate: ask a trained model about an image.

olavlm-generate runs/ift --image cat.jpg --prompt "What is on the sofa?"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from olavlm.cache import decode_rgb
from olavlm.student import load_checkpoint

from .cli import JobFailed, command, quiet_models


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="olavlm-generate",
        description="Answer a question about an image, greedily.",
        epilog='example: olavlm-generate runs/ift --image cat.jpg --prompt "What is on the sofa?"',
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder of olavlm-train")
    p.add_argument("--image", metavar="FILE", type=Path, help="without one, the question is asked as text alone")
    p.add_argument("--prompt", metavar="TEXT", required=True)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return p


@command("olavlm-generate")
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    image = None if args.image is None else decode_rgb(args.image.read_bytes(), str(args.image))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise JobFailed("--device cuda: this machine has no usable CUDA device; use --device cpu")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    quiet_models()
    model, tokenizer = load_checkpoint(args.checkpoint)
    print(model.to(device).answer(tokenizer, image, args.prompt, max_new_tokens=args.max_new_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
