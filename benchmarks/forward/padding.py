"""How much more a step computes than its tokens: padding, and waiting for the process that has most to do.

Lengths are synthetic. The datasets themselves are not needed for them, and their texts are not here:

- like LLaVA-665K: 624,610 of 665,298 samples have an image. Tokens of text are log-normal: with an image of median 180
  and sigma 0.7, without one of median 900 and sigma 0.9. An image has 600 tokens (576, and 24 of three tasks).
- like LLaVA's 558K captions: all have an image; text is log-normal around 100 tokens, sigma 0.2 (template included).

No sequence is longer than 4,096. The sampler sees estimates, off by a log-normal factor of sigma 0.15.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from olavlm.student.data.sampler import GlobalBatchSampler

from ..figures import Count
from .sizes import Size

IMAGE_TOKENS, LONGEST, BATCH = 600, 4096, 16
SPLITS = {"16 x 1 x 1": (1, 1), "16 x 8 x 1": (1, 8), "16 x 1 x 8": (8, 1), "16 x 2 x 8": (8, 2)}
"""Samples of a micro-batch x accumulation x processes -> (processes, accumulation)."""
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def llava_665k(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of text, and whether there is an image."""
    has_image = generator.random(samples) < 624_610 / 665_298
    with_image, alone = generator.lognormal(np.log(180), 0.7, samples), generator.lognormal(np.log(900), 0.9, samples)
    return np.where(has_image, with_image, alone), has_image


def captions(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    return generator.lognormal(np.log(100), 0.2, samples), np.ones(samples, bool)


def measure(size: Size, device: str, folder: Path) -> list[Count]:
    drawn: dict[str, Draw] = {"like LLaVA-665K": llava_665k, "like LLaVA's captions": captions}
    return [_counted(title, draw, size) for title, draw in drawn.items()]


def _counted(title: str, draw: Draw, size: Size) -> Count:
    generator = np.random.default_rng(0)
    text, has_image = draw(generator, size.samples)
    lengths = np.minimum(text + IMAGE_TOKENS * has_image, LONGEST).astype(np.int64)
    seen = (text * generator.lognormal(0, 0.15, size.samples) + IMAGE_TOKENS * has_image).astype(np.int64)
    arms = {
        "padded, as drawn": (None, False),
        "padded, by length": (seen, False),
        "packed, as drawn": (None, True),
        "packed, by length": (seen, True),
    }
    values = {}
    for arm, (of, packed) in arms.items():
        for grouped in (False, True):
            waste = {
                split: 100 * _waste(lengths, has_image, grouped, of, packed, *cut, size.steps)
                for split, cut in SPLITS.items()
            }
            values[arm + (", grouped by modality" if grouped else "")] = waste
    return Count(
        f"positions beyond the tokens there are, in %, {title}: {lengths.mean():.0f} tokens on average, "
        f"{lengths.max()} at most",
        values,
        notes=[
            f"{size.steps} steps of micro-batch x accumulation x processes. Counted is what the slowest process of a "
            "step computes, against an equal share of its tokens."
        ],
    )


def _waste(
    lengths: np.ndarray,
    has_image: np.ndarray,
    grouped: bool,
    of: np.ndarray | None,
    packed: bool,
    world: int,
    accumulation: int,
    steps: int,
) -> float:
    sampler = GlobalBatchSampler(has_image, BATCH * world * accumulation, 0, grouped, lengths=of, packed=packed)
    computed, tokens = 0.0, 0.0
    for step in range(min(steps, len(sampler))):
        parts = [[lengths[part] for part in sampler.slices(step, rank, world, accumulation)] for rank in range(world)]
        work = [sum(x.sum() if packed else x.max() * len(x) for x in of_rank) for of_rank in parts]
        computed += max(work) * world
        tokens += sum(x.sum() for of_rank in parts for x in of_rank)
    return computed / tokens - 1
