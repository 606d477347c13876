"""How much is measured: `full` has the paper's shapes where a CPU can, `toy` is for the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    samples: int
    """Of the synthetic datasets of `padding`."""
    steps: int
    llm: dict[str, int]
    """Of `packing`: the fields of a Llama config."""
    lengths: dict[str, tuple[int, ...]]
    """Tokens of the samples of a micro-batch, by what they are like."""
    width: int
    """H of `predictors`, which is also the depth predictor's inner width."""
    queries: int
    keys: int
    dim: int
    rounds: int
    predictor_rounds: int


SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SIZES = {
    "full": Size(
        samples=100_000,
        steps=400,
        llm=SMOLLM2 | {"num_hidden_layers": 2},
        lengths={"like pt": (650, 665, 680, 690), "mixed": (150, 690, 850, 1700)},
        width=4096,
        queries=576,
        keys=688,
        dim=1024,
        rounds=3,
        predictor_rounds=2,
    ),
    "toy": Size(
        samples=400,
        steps=3,
        llm={"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
             "num_hidden_layers": 1},
        lengths={"toy": (3, 5)},
        width=16,
        queries=4,
        keys=6,
        dim=8,
        rounds=1,
        predictor_rounds=1,
    ),
}  # fmt: skip
