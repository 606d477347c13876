"""The words of docs/break-even.md, with places for the numbers of `page.py`."""

from __future__ import annotations

INTRODUCTION = """\
# When a feature cache pays

After how many runs, on which disks, and when teachers in the training loop are the better choice. This page is written
by `python -m benchmarks.train.page` from committed results ([training](../benchmarks/train/README.md), FLOPs of the run
`{counted}`; [extraction](../benchmarks/extract/README.md), run `{extracted}`) and from assumptions, which are named
where they are used. For your own recipe, store and disk, `olavlm-train pt --config RECIPE --dry-run` prints the same
comparison.

**One epoch reads each target once: a single run saves no arithmetic of the teachers.** An extraction does the same
forwards that a run with teachers in the loop does. What the cache gains is elsewhere: the teachers run in large
batches, beside their preparation and not one image at a time on the thread that trains; they are out of the step and
out of the memory of the GPU that trains; targets are the same bytes in every run; and above all they are used again.
The paper's tables take dozens of pre-training runs over the same 558K images, and a probe reads its targets twice for
each model. It costs {image:,} bytes an image, {tb:.2f} TB for LLaVA-558K, and the care that a store wants.

    n runs with a cache      extraction + n x waiting for the disk
    n runs with teachers     n x teachers in the loop

all in device-seconds beside what a run takes anyhow; the cache pays from the first n at which the upper line is below
the lower (`pipelines/break_even.py`).
"""

COSTS = """
## What an image costs

At the paper's shapes (Llama-3-8B, CLIP-ViT-L/14-336, gradient checkpointing) a step is {step:.1f} TFLOP an image and
{cached:.1f} with predictors and losses, counted; the three teachers are {teachers:.2f}, {share:.1%} of that. *A GPU,
computed* does {rate:.0f} TFLOP/s of either, {utilisation:.0%} of the {peak:.0f} that an H100 SXM is sold with. A GPU
that is given one image at a time will not reach that, so that for teachers *one by one* it is a floor; on it come
{prepare:.0f} ms of one core, measured, for which the GPU waits while an image is prepared.
"""

NOT_MEASURED = """
No run on a GPU is committed yet: `python -m benchmarks.train --size paper --name NAME` on one of 80 GB or more adds its
line here.
"""

RUNS = """
## After how many runs

Without waiting for a disk, and with a disk that is there anyway. *Pays from* is the first run after which all runs so
far, extraction included, took less device time than with teachers in the loop.
"""

RUNS_READING = """
Where teachers in the loop are batched and as fast as in an extraction, the first run is a draw and the second pays.
"""

DISKS = """
## On which disks

Bytes a second that training needs at {ms:.0f} ms an image and GPU (computed, as above), and the first run that pays
against batched teachers in the loop where a disk gives less. *Never*: the GPUs would wait for the disk longer than the
teachers would take to run. Rates are examples, of random reads of a megabyte by many readers at once; measure yours.
The measured machine's disk gave {depth:,.0f} MB/s of random rows of depth with the page cache dropped.
"""

MONEY = """
## Storage that is rented

A TB-month at {tb_month:.0f} dollars and a GPU-hour at {gpu_hour:.2f}, as examples: to keep an image's features for a
month costs what {month:.0f} ms of the GPU cost. Runs that the store must serve until it is cheaper than teachers in
the loop:
"""

CHOICE = """
## When online is the better choice

- One run, or one run for each set of teachers: nothing is used again.
- Storage is rented, and fewer runs a month than the last table says.
- The disk gives less than the table of disks asks for and a smaller codec (`--dtype int8`, `int4`) is no option.
- Images that are drawn anew each time (random crops, growing streams): there is no target to keep.
- A billion images read once ([scale](scale.md)).

`--targets.source online` then runs the teachers in batches, with images prepared by the loaders, {cores:.1f} cores for
each GPU at its computed pace: the same losses, and not the public code's loop over single images.

The cache is the better choice from the second run on, for ablations and for probes, where the targets are to be the
same bytes in every run, and where memory decides: {memory}
"""

MEMORY_KNOWN = "the teachers took {mb:,.0f} MB of the step's peak ({name})."
MEMORY_UNKNOWN = "the teachers' weights alone are {gb:.1f} GB in 16 bits."
