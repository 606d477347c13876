"""The main job on the bundled photographs, end to end, with the commands a user types.

    make demo            or: python -m olavlm.pipelines.demo --output demo_run

The small teachers that come with the package stand in for the real ones, and a tiny language model and base encoder,
which know nothing yet, for theirs; everything else is real: a Ray extraction, PT with cached targets, IFT, generated
answers and the report. Run again, it finishes what is not done and repeats nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from olavlm.teachers import miniature

from .cli import JobFailed, command

QUESTIONS = (
    ("cat.jpg", "What animal is in the picture?"),
    ("coffee.jpg", "What is in the cup?"),
    ("rocket.jpg", "Describe the image."),
)


@command("olavlm-demo")
def main(argv: list[str] | None = None) -> int:
    """The whole method on the sample: models, extraction, training, probes, report."""
    p = argparse.ArgumentParser(prog="python -m olavlm.pipelines.demo", description=__doc__.splitlines()[0])
    p.add_argument("--output", type=Path, default=Path("demo_run"), help="folder for everything the demo makes")
    out = p.parse_args(argv).output
    sample = Path(str(files("olavlm.pipelines") / "sample"))
    tiny, store, images = out / "tiny", out / "features", sample / "images"
    pt, ift = out / "pt", out / "ift"
    models = ["--model.llm", tiny / "llm", "--model.encoder", tiny / "encoder", "--data.images", images]

    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if not (tiny / "llm").is_dir():
        run("tiny", tiny)
    teachers = [word for name in miniature.NAMES for word in ("--teacher", f"{name}={miniature.folder(name)}")]
    run("extract", *teachers, "--data", sample / "pt.json", "--images", images, "--store", store, "--shard-rows", 8)
    run("store", "status", store)
    run("train", "pt", "--config", "tiny", *models, "--data.file", sample / "pt.json", "--targets.store", store,
        "--train.output_dir", pt)  # fmt: skip
    run("train", "ift", "--config", "tiny", *models, "--data.file", sample / "ift.json", "--init.from", pt,
        "--train.output_dir", ift)  # fmt: skip
    answers = []
    for image, question in QUESTIONS:
        answer = run(
            "generate", ift, "--image", images / image, "--prompt", question, "--max-new-tokens", 40, keep=True
        )
        answers.append({"image": str(images / image), "prompt": question, "answer": answer.strip()})
    (ift / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    report = out / "report.html"
    run("report", pt, ift, "--output", report)
    print(f"\ndone in {time.monotonic() - began:.0f} s; open {report}")
    return 0


def run(module: str, *words: object, keep: bool = False) -> str:
    """Run one of our commands as a process of its own, shown as a user would type it."""
    arguments = [str(w) for w in words]
    name = {"store": "cache"}.get(module, module)
    print(f"\n$ {shlex.join([f'olavlm-{name}', *arguments])}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", f"olavlm.pipelines.{module}", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE if keep else None,
        text=True,
        check=False,
    )
    if keep:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        raise JobFailed(f"olavlm-{name} ended with status {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
